"""Finds radial groups by experiment, and checks given groups by experiment.

A group is radially invariant exactly when, at every point, the gradient of every function of the
network's outputs is orthogonal to it: d/da f(a x) = <grad f, x> = 0. So a single gradient of a
random function of the outputs, at a random point, tests all leaves and partitions at once. The
groups found are then confirmed: all are scaled by random factors, which must not change the
outputs.
"""

import inspect
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

from spherical_optax import _complex, _trees
from spherical_optax.detection import _doubts
from spherical_optax.detection._confirm import confirm, moving
from spherical_optax.detection._experiment import Experiment, Progress
from spherical_optax.detection._search import NO_EFFECT, Result, search
from spherical_optax.groups import (
    Finding,
    FoundGroups,
    Groups,
    Joint,
    RadialGroup,
    group_size,
    joints_of,
)

SEEMING = 0.1  # a leaf with at least this deviation is not tested again at other scales


def find_radial_groups(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    explain: bool = False,
    vectors: bool = False,
    progress: Callable[[str], Any] | None = None,
) -> Any:
    """Finds which parameters are radially invariant, and their finest groups.

    Invariance is a property of the architecture, so it is tested at several points: near the given
    parameters, and at random ones, with some layers made larger or smaller. A group must be
    invariant at all points. Where the evidence is weak, there is no group, and a warning.

    A normalization layer's epsilon disturbs invariance, most of all where the variance is small. It
    is therefore made smaller in the traced program. So in your program, a group that was found may
    change the outputs where epsilon outweighs the variance.

    For each leaf, the finest invariant partition wins. Groups may be indexed by one axis, several
    axes, or contiguous blocks of an axis (GroupNorm), or be the whole array. A leaf that is not
    invariant alone may be invariant jointly with other leaves of its module or of a neighboring
    module, such as a convolution and a time projection that are added before a norm.

    Args:
      fn: The forward pass, called as `fn(params, *args)`. It is a pure function that returns the
        network's outputs, in any pytree. BatchNorm must be in *training* mode, because with
        running statistics the lengths of filters do matter. Do not return its updated statistics.
        Turn dropout off, or fix its key.
      params: The parameters. `jax.ShapeDtypeStruct` leaves are accepted, but the values of a
        trained or freshly initialized network give one more point to test.
      *args: The other arguments of `fn`. A small batch is enough. One or two samples are too few,
        because their statistics hide effects of the weights. One-hot rows make each row of a kernel
        a group of its own. The statistics of a constant batch hide effects of the weights too. So a
        constant floating array of two or more axes that a kernel multiplies, such as
        `jnp.ones((1, 28, 28, 1))`, is varied by up to half. `progress`, warnings and `FoundGroups`
        report this. Other constants, such as a mask of ones, are not varied.
      explain: Whether to return `FoundGroups`, with the evidence for each leaf.
      vectors: Whether to also report one-dimensional leaves without a kernel. Under ReLU, for
        example, the scale and bias of a normalization layer are often jointly invariant.
      progress: A function, such as `print`, that is called with lines of text during the search.

    Returns:
      A tree like `params` with a `RadialGroup` or `None` for each leaf, or with `explain` a
      `FoundGroups`. Both are accepted wherever `groups` is.

    Raises:
      TypeError: If `fn` cannot be called with these arguments.
      ValueError: If there is no floating leaf, or if `fn` returns no floating array, returns NaN,
        or is not deterministic.

    Warns:
      UserWarning: If no group is found, or if most kernels have no effect on the outputs. The
        warning lists the usual causes. A warning also names leaves whose deviation is neither small
        nor large, or whose scaling changes the outputs. These leaves get no group.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import spherical_optax as so
      >>> def fn(params, x):
      ...     x = x @ params["hidden"]["kernel"] + params["hidden"]["bias"]
      ...     x = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)  # BatchNorm
      ...     return jax.nn.relu(x) @ params["head"]
      >>> params = {"hidden": {"kernel": jnp.zeros((4, 8)), "bias": jnp.zeros(8)},
      ...           "head": jnp.zeros((8, 3))}
      >>> groups = so.find_radial_groups(fn, params, jnp.eye(4))
      >>> print(so.describe_groups(params, groups))
      path           shape   groups  entries per group  label
      head           (8, 3)  -       -                  -
      hidden/bias    (8,)    -       -                  -
      hidden/kernel  (4, 8)  8       4                  -

    References:
      Roburin et al., Neurocomputing 2022, section 2 (radial invariance).
    """
    _check_order("find_radial_groups", fn, params)
    if _complex.is_complex(params):
        params, fn = _complex.split(params), _complex.of_pairs(fn)
    progress = _named("find_radial_groups", progress)
    experiment, result = _searched("find_radial_groups", fn, params, args, vectors, progress)
    joints, dropped = confirm(experiment, result, progress)
    for line in _doubts.doubts(experiment, result, joints, dropped):
        text = " ".join([line, *_doubts.varied_arguments(experiment)])
        warnings.warn(f"find_radial_groups: {text}", UserWarning, stacklevel=2)
    group_of = {i: group for joint in joints for i, group in joint.items()}
    boxes, treedef = _trees.flatten_boxes(params)
    groups = treedef.unflatten([group_of.get(i) for i in range(len(boxes))])
    groups = _complex.groups_of_pairs(groups)
    if not explain:
        return groups
    tried, verdicts = result.tried, result.verdicts
    findings = [
        Finding(leaf.path, tuple(tried.get(i, ())), verdicts.get(i, "not floating"))
        for i, leaf in enumerate(experiment.leaves)
    ]
    limit = 3 * experiment.thresholds.invariant
    deviations = [deviation for each in tried.values() for _, deviation in each]
    return FoundGroups(
        groups=groups,
        findings=tuple(findings),
        invariant_up_to=max(map(experiment.deviation, joints), default=0.0),
        others_from=min((d for d in deviations if d > limit), default=math.inf),
        forward_passes=experiment.forward_passes,
        varied=tuple(experiment.varied),
    )


def check_radial_groups(fn: Callable[..., Any], params: Any, groups: Groups, *args: Any) -> None:
    """Checks groups by experiment: each must be invariant, and as fine as possible.

    Args:
      fn: The forward pass, as in `find_radial_groups`.
      params: The parameters.
      groups: See [`spherical_optax.groups`][].
      *args: The other arguments of `fn`.

    Raises:
      TypeError: If `fn` cannot be called with these arguments.
      ValueError: If a group is wrong. The message lists each wrong leaf with its shape, what was
        measured, and the group found instead.

    Warns:
      UserWarning: If kernels without a group are invariant; the warning names them. Also if there
        are groups finer than `RadialGroup` can express.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import spherical_optax as so
      >>> def fn(params, x):
      ...     x = x @ params["kernel"]
      ...     return x / jnp.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-6)  # RMSNorm
      >>> params, x = {"kernel": jnp.ones((4, 8))}, jax.random.normal(jax.random.key(0), (6, 4))
      >>> so.check_radial_groups(fn, params, {"kernel": so.per_layer()}, x)
      >>> so.check_radial_groups(fn, params, {"kernel": so.per_filter()}, x)
      Traceback (most recent call last):
          ...
      ValueError: check_radial_groups: wrong groups in 1 of 1 parameters:
      kernel of shape (4, 8): expected an invariant group, found a deviation of 1 for \
so.per_filter(). Use so.per_layer(), which is invariant.
      Rules that fit: so.groups_by_path({r"^kernel$": so.per_layer()})
    """
    who = "check_radial_groups"
    _check_order(who, fn, params, groups)
    if _complex.is_complex(params):
        params, fn = _complex.split(params), _complex.of_pairs(fn)
    joints = joints_of(groups, params)
    progress = _named(who, None)
    experiment, result = _searched(who, fn, params, args, True, progress)
    confirmed, _ = confirm(experiment, result, progress)
    if not experiment.used:
        raise ValueError(f"{who}: {_doubts.UNUSED}")
    limit = experiment.thresholds.invariant
    tangent = [joint for joint in joints if experiment.deviation(joint) <= limit]
    changes = moving(experiment, tangent)
    found_for = {i: joint for joint in confirmed for i in joint}
    faults: list[str] = []
    fitting: list[Joint] = []
    hints = dict.fromkeys([_doubts.HALF] if experiment.is_narrow else [])
    for joint in joints:
        i = next(iter(joint))
        fault, hint = _fault(experiment, result, joint, found_for.get(i), changes.get(i))
        faults += [fault] if fault else []
        fitting += [found_for[i]] if fault and i in found_for else []
        hints |= {hint: None} if hint else {}
    if faults:
        lines = [f"{who}: wrong groups in {len(faults)} of {len(joints)} parameters:", *faults]
        lines += [_rules(experiment, fitting)] if fitting else []
        lines += hints
        raise ValueError("\n".join([*lines, *_doubts.varied_arguments(experiment)]))
    grouped = {i for joint in joints for i in joint}
    if grouped & result.finer.keys():
        text = f"{who}: {_doubts.too_coarse(experiment, result)}"
        warnings.warn(text, UserWarning, stacklevel=2)
    left = [
        f"{experiment.leaves[i].path} ({_written(experiment.leaves[i], group)})"
        for joint in search(experiment, False, progress).joints
        if not grouped & joint.keys()
        for i, group in joint.items()
    ]
    if left:
        text = f"{who}: these parameters are invariant, but have no group: {', '.join(left)}."
        warnings.warn(text, UserWarning, stacklevel=2)


def _check_order(who: str, fn: Any, params: Any, groups: Any = None) -> None:
    """Raises a `TypeError` if arguments are in the wrong order."""
    order = "fn, params, groups, *args" if who == "check_radial_groups" else "fn, params, *args"
    named = {"fn": not callable(fn), "params": inspect.isroutine(params)}
    named["groups"] = hasattr(groups, "dtype")
    for name, value in (("fn", fn), ("params", params), ("groups", groups)):
        if named[name]:
            found = "an array" if name == "groups" else f"a {type(value).__name__}"
            raise TypeError(f"{who}: expected {who}({order}), found {found} as {name}.")


def _fault(
    experiment: Experiment, result: Result, joint: Joint, better: Joint | None, change: float | None
) -> tuple[str | None, str | None]:
    """The fault of a joint that the user gave, and its usual causes; `None` if there is no fault.

    `better` is the joint that was found for its first leaf, if any. `change` is how much scaling
    the user's groups changes the outputs, if it does.
    """
    i = next(iter(joint))
    values = [leaf.value for leaf in experiment.leaves]
    given = _written(experiment.leaves[i], joint[i])
    path = [f"{experiment.leaves[k].path} of shape {tuple(values[k].shape)}" for k in joint]
    expected = f"{', '.join(path)}: expected"
    invariant = None if better is None else _written(experiment.leaves[i], better[i])
    deviation = experiment.deviation(joint)
    if all(result.verdicts.get(k) == NO_EFFECT for k in joint):
        return (
            f"{expected} an invariant group, found no effect on the outputs. "
            "Give it no group, that is, None."
        ), None
    if deviation > experiment.thresholds.invariant:
        instead = f"Use {invariant}, which is invariant" if invariant else "None tried is invariant"
        hint = None if invariant else f"{_doubts.CAUSES} {_doubts.ON_PURPOSE}"
        if not moving(experiment, [joint]):
            instead += ". Scaling the given group keeps the outputs; only the gradient differs"
            hint = _doubts.STOPPED
        return (
            f"{expected} an invariant group, found a deviation of {deviation:.1g} for "
            f"{given}. {instead}."
        ), hint
    if change is not None:
        return (
            f"{expected} outputs that do not change when the group is scaled, found that they "
            f"change by {change:.1g}, although gradients are tangent. Batch renormalization and "
            "other corrections that the gradient takes as constants do this."
        ), None
    if better is not None and group_size(better, values) < group_size(joint, values):
        return (
            f"{expected} the finest invariant groups, found {given}. Use {invariant}, "
            "which is finer and also invariant."
        ), None
    return None, None


def _written(leaf: _trees.Leaf, group: RadialGroup) -> str:
    """The code that creates the group of a leaf."""
    axes, blocks = group.index_axes, group.num_blocks
    joint = [f"joint={group.joint!r}"] if group.joint is not None else []
    ndim = [f"ndim={group.ndim}"] if group.ndim is not None else []
    if axes == () and blocks is None:
        name, fields = "per_layer", []
    elif leaf.value.ndim == 3 and axes in ((1,), (-2,)) and blocks is None and not ndim:
        name, fields = "per_head", ["axis=-2"]
    elif len(axes) == 1 and blocks is None:
        name, fields = "per_filter", [f"axis={axes[0]}"] if axes != (-1,) else []
    elif len(axes) == 1 and not ndim:
        name = "per_channel_block"
        fields = [str(blocks), *([f"axis={axes[0]}"] if axes != (-1,) else [])]
    else:
        name = "RadialGroup"
        fields = [str(axes), *([f"num_blocks={blocks}"] if blocks is not None else [])]
    return f"so.{name}({', '.join([*fields, *joint, *ndim])})"


def _rules(experiment: Experiment, joints: list[Joint]) -> str:
    """The groups that were found for some leaves, as rules to paste into a program."""
    group_of = {
        rf"^{re.escape(experiment.leaves[i].path)}$": _written(experiment.leaves[i], group)
        for joint in joints
        for i, group in joint.items()
    }
    rules = ", ".join(f'r"{pattern}": {group}' for pattern, group in group_of.items())
    return f"Rules that fit: so.groups_by_path({{{rules}}})"


def _searched(
    who: str,
    fn: Callable[..., Any],
    params: Any,
    args: tuple[Any, ...],
    vectors: bool,
    progress: Progress,
) -> tuple[Experiment, Result]:
    """The experiment, and the groups that are invariant at all its points.

    The points do not depend on `vectors`. So `check_radial_groups` accepts all groups that
    `find_radial_groups` finds.
    """
    experiment = Experiment(who, fn, params, args, progress)
    first = search(experiment, False, lambda line: None)
    seeming = {i for joint in first.joints for i in joint}
    # Leaves without effect are scaled too, so that they stay small: a bias before BatchNorm.
    seeming |= {i for i, verdict in first.verdicts.items() if verdict == NO_EFFECT}
    seeming |= {i for i, tried in first.tried.items() if tried and tried[0][1] < SEEMING}
    experiment.look_at_scales(seeming, progress)
    return experiment, search(experiment, vectors, progress)


def _named(who: str, progress: Progress | None) -> Progress:
    """Progress whose lines begin with the function's name; silent if `progress` is `None`."""
    if progress is None:
        return lambda line: None
    return lambda line: progress(f"{who}: {line}")
