"""Radial groups found by experiment, and masks checked by it.

A group is radially invariant exactly when, at every point, the gradient of every
function of the network's outputs is orthogonal to it: d/da f(a x) = <grad f, x> = 0. So
at a random point, for a random function of the outputs, one gradient decides for all
leaves and all partitions at once. What is found is then confirmed by what it claims: all
groups are scaled by random factors, and the outputs must stay.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

from spherical_optax import _complex, _trees
from spherical_optax.detection._experiment import Experiment, Progress, Unit
from spherical_optax.detection._search import NO_EFFECT, Found, search
from spherical_optax.groups import (
    Finding,
    FoundGroups,
    Groups,
    RadialGroup,
    group_size,
    joints_of,
)

SEEMING = 0.1  # deviation from which on a leaf need not be looked at again
CHANGED = 1e-2  # relative change of the outputs
FEW = 2  # kernels that are scaled to learn why no group is found

CAUSES = (
    "Usual causes: BatchNorm in evaluation mode (its running statistics do not follow the weights; "
    "use training mode); fn returns updated statistics beside the outputs, or a loss with L2 "
    "regularisation; inputs of one pixel, or a batch of one or two; no normalization layer follows "
    "directly."
)

STOPPED = (
    "Usual causes: jax.lax.stop_gradient on a norm or a scale that follows from the weights, or a "
    "straight-through estimator; what projects or transports moments does not fit such gradients."
)

UNUSED = (
    "the outputs of fn do not depend on params: it seems to use other parameters, such as those of "
    "a model that it closes over; pass them on, as in nnx.merge(graphdef, params) or "
    "model.apply({'params': params}, x)."
)

HALF = "fn computes in half precision, whose rounding may hide what is invariant; try float32."

ON_PURPOSE = (
    "Spheres may be imposed on other matrices too, for the angle, as Hyperball, AdamH, MuonH, "
    "nGPT, SimbaV2 and any retract do: there this is to be expected."
)


def find_radial_groups(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    explain: bool = False,
    vectors: bool = False,
    progress: Callable[[str], Any] | None = None,
) -> Any:
    """Finds which parameters are radially invariant, and their finest groups.

    Invariance is a property of the architecture, so it is asked for at several points: near
    the parameters given, and at random ones, some of whose layers are larger and some
    smaller. A group is one that is invariant at all of them; where the evidence is weak,
    there is none, and a warning. A normalization layer's epsilon, which disturbs invariance
    as much as the variance is small, is made smaller in the traced program; so a group found
    may in truth change the outputs where epsilon outweighs the variance.

    For each leaf the finest invariant partition wins: index axes, several together,
    contiguous blocks of an axis (GroupNorm), the whole array; where a leaf is not invariant
    alone, then jointly with others of its module, or of modules beside it (a convolution
    and a time projection that are added before a norm).

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
    if _complex.is_complex(params):
        params, fn = _complex.split(params), _complex.of_pairs(fn)
    say = _spoken("find_radial_groups", progress)
    experiment, found = _searched("find_radial_groups", fn, params, args, vectors, say)
    units, dropped = _confirm(experiment, found, say)
    for line in _doubts(experiment, found, units, dropped):
        varied = f" Varied, being constant: {', '.join(experiment.varied)}."
        line += varied if experiment.varied else ""
        warnings.warn(f"find_radial_groups: {line}", UserWarning, stacklevel=2)
    found_groups = _tree_of(params, {i: group for unit in units for i, group in unit.items()})
    groups = _complex.groups_of_pairs(found_groups)
    if not explain:
        return groups
    limit = 3 * experiment.thresholds.invariant
    rejected = [deviation for tried in found.tried.values() for _, deviation in tried]
    return FoundGroups(
        groups=groups,
        findings=tuple(
            Finding(
                leaf.path,
                tuple(found.tried.get(i, ())),
                found.verdicts.get(i, "not floating"),
            )
            for i, leaf in enumerate(experiment.leaves)
        ),
        invariant_up_to=max((experiment.deviation(unit) for unit in units), default=0.0),
        others_from=min((each for each in rejected if each > limit), default=math.inf),
        forward_passes=experiment.forward_passes,
        varied=tuple(experiment.varied),
    )


def check_radial_groups(fn: Callable[..., Any], params: Any, groups: Groups, *args: Any) -> None:
    """Checks a mask by experiment: every group invariant, and none coarser than it could be.

    Args:
      fn: The forward pass, as in `find_radial_groups`.
      params: The parameters.
      groups: See the module `spherical_optax.groups`.
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
RadialGroup(index_axes=(-1,)); invariant is RadialGroup(index_axes=()).
    """
    who = "check_radial_groups"
    if _complex.is_complex(params):
        params, fn = _complex.split(params), _complex.of_pairs(fn)
    given = joints_of(groups, params)
    say = _spoken(who, None)
    experiment, found = _searched(who, fn, params, args, True, say)
    units, _ = _confirm(experiment, found, say)
    better_of = {i: unit for unit in units for i in unit}
    shapes = {i: leaf.value for i, leaf in enumerate(experiment.leaves) if leaf.value is not None}
    if not experiment.used:
        raise ValueError(f"{who}: {UNUSED}")
    limit = experiment.thresholds.invariant
    tangent = [unit for unit in given if experiment.deviation(unit) <= limit]
    moving = _moving(experiment, tangent)
    wrong, hints = [], dict.fromkeys([HALF] if experiment.is_narrow else [])
    for unit in given:
        i = next(iter(unit))
        better = better_of.get(i)
        instead = "none tried is invariant" if better is None else f"invariant is {_say(better[i])}"
        deviation = experiment.deviation(unit)
        where = ", ".join(
            f"{experiment.leaves[j].path} of shape {tuple(shapes[j].shape)}" for j in unit
        )
        if all(found.verdicts.get(j) == NO_EFFECT for j in unit):
            wrong.append(
                f"{where}: expected an invariant group, found no effect on the outputs; "
                "give it None, no group."
            )
        elif deviation > limit:
            if _stays(experiment, unit):
                instead += "; the outputs stay where it is scaled, and only the gradient differs"
                hints[STOPPED] = None
            elif better is None:
                hints[f"{CAUSES} {ON_PURPOSE}"] = None
            wrong.append(
                f"{where}: expected an invariant group, found a deviation of {deviation:.1g} for "
                f"{_say(unit[i])}; {instead}."
            )
        elif i in moving:
            wrong.append(
                f"{where}: expected outputs that stay where the group is scaled, found that they "
                f"change by {moving[i]:.1g}, although gradients are tangent; batch renormalization "
                "and other corrections that are constants to the gradient do this."
            )
        elif better is not None and group_size(better, shapes) < group_size(unit, shapes):
            wrong.append(
                f"{where}: expected the finest invariant groups, found {_say(unit[i])}; finer and "
                f"invariant is {_say(better[i])}."
            )
    if wrong:
        lines = [f"{who}: {len(wrong)} of {len(given)} groups:", *wrong, *hints]
        lines += [f"Varied, being constant: {', '.join(experiment.varied)}."] * bool(
            experiment.varied
        )
        raise ValueError("\n".join(lines))
    grouped = {i for unit in given for i in unit}
    if grouped & found.finer.keys():
        warnings.warn(f"{who}: {_coarse(experiment, found)}", UserWarning, stacklevel=2)
    plain = search(experiment, False, say).units
    left = [unit for unit in plain if not grouped & set(unit)]
    if left:
        lines = [
            f"{experiment.leaves[i].path} ({_say(group)})"
            for unit in left
            for i, group in unit.items()
        ]
        warnings.warn(
            f"{who}: these have no group, and are invariant: {', '.join(lines)}.",
            UserWarning,
            stacklevel=2,
        )


def _say(group: RadialGroup) -> str:
    """The group as one would write it."""
    fields = [f"index_axes={group.index_axes}"]
    fields += [f"num_blocks={group.num_blocks}"] if group.num_blocks is not None else []
    fields += [f"joint={group.joint!r}"] if group.joint is not None else []
    return f"RadialGroup({', '.join(fields)})"


def _tree_of(params: Any, found: Unit) -> Any:
    boxes, treedef = _trees.flatten_boxes(params)
    return treedef.unflatten([found.get(i) for i in range(len(boxes))])


def _searched(
    who: str,
    fn: Callable[..., Any],
    params: Any,
    args: tuple[Any, ...],
    vectors: bool,
    progress: Progress,
) -> tuple[Experiment, Found]:
    """The experiment, and what is invariant at all its points.

    The points do not depend on `vectors`, so that a mask that is found is found right.
    """
    experiment = Experiment(who, fn, params, args, progress)
    first = search(experiment, False, lambda line: None)
    seeming = {i for unit in first.units for i in unit}
    # What has no effect stays small beside what has: a bias before BatchNorm.
    seeming |= {i for i, verdict in first.verdicts.items() if verdict == NO_EFFECT}
    seeming |= {i for i, tried in first.tried.items() if tried and tried[0][1] < SEEMING}
    experiment.look_at_scales(seeming, progress)
    return experiment, search(experiment, vectors, progress)


def _spoken(who: str, progress: Progress | None) -> Progress:
    if progress is None:
        return lambda line: None
    return lambda line: progress(f"{who}: {line}")


# --- the confirmation, and what is in doubt ---------------------------------------------


def _confirm(
    experiment: Experiment, found: Found, progress: Progress
) -> tuple[list[Unit], dict[int, float]]:
    """The units that may be scaled, and by how much the others' scaling changes the outputs."""
    dropped = _moving(experiment, found.units, progress)
    for i, moved in dropped.items():
        found.verdicts[i] = f"unclear: scaling changes the outputs by {moved:.0e}"
    units = [unit for unit in found.units if not dropped.keys() & unit.keys()]
    changed = _changed(experiment)

    def still(leaves: list[int]) -> None:
        if experiment.change(0, [], leaves) <= changed:
            return
        if len(leaves) == 1:
            found.verdicts[leaves[0]] = "not invariant: no gradient, but an effect on the outputs"
            return
        half = len(leaves) // 2
        still(leaves[:half])
        still(leaves[half:])

    without = [i for i, verdict in found.verdicts.items() if verdict == NO_EFFECT]
    if without:
        still(without)
    return units, dropped


def _changed(experiment: Experiment) -> float:
    """From which relative change on the outputs do not stay."""
    return max(CHANGED, 10 * experiment.unrest)


def _moving(
    experiment: Experiment, units: list[Unit], progress: Progress = lambda line: None
) -> dict[int, float]:
    """By how much the outputs change where groups are scaled, for leaves whose groups do it.

    All are scaled at once at two points; where the outputs change, halves find the culprits.
    """
    moving: dict[int, float] = {}

    def culprits(number: int, units: list[Unit]) -> None:
        moved = experiment.change(number, units) if units else 0.0
        if moved <= _changed(experiment):
            return
        if len(units) == 1:
            moving.update(dict.fromkeys(units[0], moved))
            return
        half = len(units) // 2
        culprits(number, units[:half])
        culprits(number, units[half:])

    for number in (0, 1):
        progress(f"scaling all groups at point {number + 1}")
        culprits(number, [unit for unit in units if not moving.keys() & unit.keys()])
    return moving


def _stays(experiment: Experiment, unit: Unit) -> bool:
    """Whether the outputs stay where the groups of a unit are scaled."""
    return not _moving(experiment, [unit])


def _coarse(experiment: Experiment, found: Found) -> str:
    """Of groups that are finer than they can be said."""
    finer = [f"{experiment.leaves[i].path} ({what})" for i, what in found.finer.items()]
    return (
        f"expected groups that RadialGroup can say, found finer ones for {', '.join(finer)}, as of "
        "grouped transposed convolutions; those found are invariant, but coarser. Keep such a "
        "kernel with one leaf for each block, or split its axis in two."
    )


def _doubts(
    experiment: Experiment, found: Found, units: list[Unit], dropped: dict[int, float]
) -> list[str]:
    """What the user should know before the groups are used."""
    lines = []
    path = [leaf.path for leaf in experiment.leaves]
    unclear = [
        f"{path[i]} ({', '.join(f'{name} {d:.0e}' for name, d in found.tried[i])})"
        for i in experiment.floating
        if found.verdicts[i] == "unclear"
    ]
    if unclear:
        limits = experiment.thresholds
        lines.append(
            f"expected deviations up to {limits.invariant:.0e} or from {limits.varying:.0e} on, "
            f"found ones between for {unclear}; they get no group. A larger batch may "
            f"decide.{f' {HALF}' if experiment.is_narrow else ''}"
        )
    if dropped:
        moved = [f"{path[i]} ({change:.0e})" for i, change in dropped.items()]
        lines.append(
            f"expected outputs that stay where groups are scaled, found that they change "
            f"for {moved}; these get no group."
        )
    if not experiment.used:
        return [*lines, UNUSED]
    if found.finer:
        lines.append(_coarse(experiment, found))
    kernels = [i for i in experiment.floating if experiment.leaves[i].value.ndim > 1]
    idle = [i for i in kernels if found.verdicts[i] == NO_EFFECT]
    if kernels and 2 * len(idle) > len(kernels):
        lines.append(
            f"{len(idle)} of {len(kernels)} kernels have no effect on the outputs, "
            f"{path[idle[0]]} first. {CAUSES}"
        )
    elif not (units or lines):
        changed = _changed(experiment)
        still = [
            i for i in kernels[:FEW] if experiment.change(0, [{i: RadialGroup((-1,))}]) <= changed
        ]
        why = f"the outputs stay where {path[still[0]]} is scaled. {STOPPED}" if still else CAUSES
        half = f" {HALF}" if experiment.is_narrow else ""
        lines.append(
            f"no group is radially invariant; {why}{half}"
            if still
            else f"no group is radially invariant. {why}{half}"
        )
    return lines
