"""Radial groups found by experiment, and masks checked by it.

A group is radially invariant exactly when, at every point, the gradient of every function of the
network's outputs is orthogonal to it: d/da f(a x) = <grad f, x> = 0. So at a random point, for a
random function of the outputs, one gradient decides for all leaves and partitions at once. What is
found is confirmed by what it claims: all groups are scaled by random factors, and the outputs stay.
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

SEEMING = 0.1  # deviation from which on a leaf need not be looked at again


def find_radial_groups(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    explain: bool = False,
    vectors: bool = False,
    progress: Callable[[str], Any] | None = None,
) -> Any:
    """Finds which parameters are radially invariant, and their finest groups.

    Invariance is a property of the architecture, so it is asked for at several points: near the
    parameters given, and at random ones, some of whose layers are larger and some smaller. A group
    is one that is invariant at all of them; where the evidence is weak, there is none, and a
    warning. A normalization layer's epsilon, which disturbs invariance as much as the variance is
    small, is made smaller in the traced program; so a group found may in truth change the outputs
    where epsilon outweighs the variance.

    For each leaf the finest invariant partition wins: index axes, several together, contiguous
    blocks of an axis (GroupNorm), the whole array; where a leaf is not invariant alone, jointly
    with others of its module, or of modules beside it (a convolution and a time projection that
    are added before a norm).

    Args:
      fn: The forward pass, called as `fn(params, *args)`: a pure function that returns the
        network's outputs, in any pytree. BatchNorm must be in *training* mode and its
        updated statistics left out of the outputs: with running statistics the filters'
        lengths do matter. Dropout must be off, or its key fixed.
      params: The parameters; `jax.ShapeDtypeStruct` leaves will do, but the values of a
        trained or freshly initialised network are one more point to look at.
      *args: Whatever else `fn` takes; a small batch is enough. A constant floating array of two
        or more axes that a kernel multiplies, as `jnp.ones((1, 28, 28, 1))`, is varied by up to
        half: statistics of a constant batch hide what the weights do. `progress`, warnings and
        `FoundGroups` say so; other constants, as a mask of ones, stay. Statistics of one or two
        samples hide it too, and one-hot rows make each row of a kernel a group of its own.
      explain: Whether to return `FoundGroups`, with the evidence for each leaf.
      vectors: Whether to report one-dimensional leaves without a kernel too: under ReLU a
        normalization layer's own scale and bias are often jointly invariant.
      progress: Called with a line of text as the search goes on, such as `print`.

    Returns:
      A tree like `params` of `RadialGroup` and `None`, or with `explain` a `FoundGroups`.
      Either is accepted wherever `groups` is.

    Raises:
      TypeError: If `fn` cannot be called with these arguments.
      ValueError: If there is no floating leaf, or `fn` returns nothing, returns NaN, or is
        not deterministic.

    Warns:
      UserWarning: If no group is found, or most kernels have no effect on the outputs, with
        the usual causes; and names leaves whose deviation is neither small nor large, or
        whose scaling changes the outputs: they get no group.

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
    """Checks a mask by experiment: every group invariant, and none coarser than it could be.

    Args:
      fn: The forward pass, as in `find_radial_groups`.
      params: The parameters.
      groups: See [`spherical_optax.groups`][].
      *args: Whatever else `fn` takes.

    Raises:
      TypeError: If `fn` cannot be called with these arguments.
      ValueError: If a group is wrong; the message lists all leaves with their shapes, what
        was measured and what was found instead.

    Warns:
      UserWarning: Names kernels without a group that are invariant.

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
      ValueError: check_radial_groups: 1 of 1 groups:
      kernel of shape (4, 8): expected an invariant group, found a deviation of 1 for \
so.per_filter(); invariant is so.per_layer().
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
        lines = [f"{who}: {len(faults)} of {len(joints)} groups:", *faults]
        lines += [_rules(experiment, fitting)] if fitting else []
        lines += hints
        raise ValueError("\n".join([*lines, *_doubts.varied_arguments(experiment)]))
    grouped = {i for joint in joints for i in joint}
    if grouped & result.finer.keys():
        text = f"{who}: {_doubts.too_coarse(experiment, result)}"
        warnings.warn(text, UserWarning, stacklevel=2)
    left = [
        f"{experiment.leaves[i].path} ({_written(group)})"
        for joint in search(experiment, False, progress).joints
        if not grouped & joint.keys()
        for i, group in joint.items()
    ]
    if left:
        text = f"{who}: these have no group, and are invariant: {', '.join(left)}."
        warnings.warn(text, UserWarning, stacklevel=2)


def _check_order(who: str, fn: Any, params: Any, groups: Any = None) -> None:
    """Raises a `TypeError` where arguments have changed places."""
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
    """What is wrong with a joint of the user's, and the usual causes; `None` where nothing is.

    For its first leaf the joint `better` was found, if one was; scaling its groups changes the
    outputs by `change`, if it does.
    """
    first = next(iter(joint.values()))
    values = [leaf.value for leaf in experiment.leaves]
    path = [f"{experiment.leaves[i].path} of shape {tuple(values[i].shape)}" for i in joint]
    expected = f"{', '.join(path)}: expected"
    invariant = None if better is None else _written(better[next(iter(joint))])
    deviation = experiment.deviation(joint)
    if all(result.verdicts.get(i) == NO_EFFECT for i in joint):
        return (
            f"{expected} an invariant group, found no effect on the outputs; "
            "give it None, no group."
        ), None
    if deviation > experiment.thresholds.invariant:
        instead = f"invariant is {invariant}" if invariant else "none tried is invariant"
        hint = None if invariant else f"{_doubts.CAUSES} {_doubts.ON_PURPOSE}"
        if not moving(experiment, [joint]):
            instead += "; the outputs stay where it is scaled, and only the gradient differs"
            hint = _doubts.STOPPED
        return (
            f"{expected} an invariant group, found a deviation of {deviation:.1g} for "
            f"{_written(first)}; {instead}."
        ), hint
    if change is not None:
        return (
            f"{expected} outputs that stay where the group is scaled, found that they "
            f"change by {change:.1g}, although gradients are tangent; batch renormalization "
            "and other corrections that are constants to the gradient do this."
        ), None
    if better is not None and group_size(better, values) < group_size(joint, values):
        return (
            f"{expected} the finest invariant groups, found {_written(first)}; finer and "
            f"invariant is {invariant}."
        ), None
    return None, None


def _written(group: RadialGroup) -> str:
    """The group as one would write it."""
    axes, blocks = group.index_axes, group.num_blocks
    joint = [f"joint={group.joint!r}"] if group.joint is not None else []
    ndim = [f"ndim={group.ndim}"] if group.ndim is not None else []
    if axes == () and blocks is None:
        name, fields = "per_layer", []
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
    """The groups that were found for some leaves, as rules to paste."""
    group_of = {
        rf"^{re.escape(experiment.leaves[i].path)}$": _written(group)
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
    """The experiment, and what is invariant at all its points.

    The points do not depend on `vectors`: what one search finds, the other confirms.
    """
    experiment = Experiment(who, fn, params, args, progress)
    first = search(experiment, False, lambda line: None)
    seeming = {i for joint in first.joints for i in joint}
    # What has no effect stays small beside what has: a bias before BatchNorm.
    seeming |= {i for i, verdict in first.verdicts.items() if verdict == NO_EFFECT}
    seeming |= {i for i, tried in first.tried.items() if tried and tried[0][1] < SEEMING}
    experiment.look_at_scales(seeming, progress)
    return experiment, search(experiment, vectors, progress)


def _named(who: str, progress: Progress | None) -> Progress:
    """Progress that says of which function it is; silent without a listener."""
    if progress is None:
        return lambda line: None
    return lambda line: progress(f"{who}: {line}")
