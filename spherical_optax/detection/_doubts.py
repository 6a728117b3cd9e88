"""What the user should know before the groups are used, with the usual causes."""

from spherical_optax.detection._confirm import limit_of_change
from spherical_optax.detection._experiment import Experiment
from spherical_optax.detection._search import NO_EFFECT, Result
from spherical_optax.groups import Joint, RadialGroup

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


def doubts(
    experiment: Experiment, result: Result, joints: list[Joint], dropped: dict[int, float]
) -> list[str]:
    """The doubts about a search, a paragraph each.

    Of what it found these joints are confirmed; the leaves of others are in `dropped`, with how
    much their scaling changes the outputs.
    """
    path = [leaf.path for leaf in experiment.leaves]
    half = f" {HALF}" if experiment.is_narrow else ""
    lines = []
    unclear = [
        f"{path[i]} ({', '.join(f'{name} {deviation:.0e}' for name, deviation in result.tried[i])})"
        for i in experiment.floating
        if result.verdicts[i] == "unclear"
    ]
    if unclear:
        limits = experiment.thresholds
        lines.append(
            f"expected deviations up to {limits.invariant:.0e} or from {limits.varying:.0e} on, "
            f"found ones between for {unclear}; they get no group. A larger batch may decide.{half}"
        )
    if dropped:
        moved = [f"{path[i]} ({change:.0e})" for i, change in dropped.items()]
        lines.append(
            f"expected outputs that stay where groups are scaled, found that they change "
            f"for {moved}; these get no group."
        )
    if not experiment.used:
        return [*lines, UNUSED]
    if result.finer:
        lines.append(too_coarse(experiment, result))
    kernels = [i for i in experiment.floating if experiment.leaves[i].value.ndim > 1]
    idle = [i for i in kernels if result.verdicts[i] == NO_EFFECT]
    if kernels and 2 * len(idle) > len(kernels):
        lines.append(
            f"{len(idle)} of {len(kernels)} kernels have no effect on the outputs, "
            f"{path[idle[0]]} first. {CAUSES}"
        )
    elif not (joints or lines):
        limit = limit_of_change(experiment)
        # The gradients of these are not tangent, and yet the outputs stay.
        stopped = [
            i for i in kernels[:FEW] if experiment.change(0, [{i: RadialGroup((-1,))}]) <= limit
        ]
        why = f". {CAUSES}"
        if stopped:
            why = f"; the outputs stay where {path[stopped[0]]} is scaled. {STOPPED}"
        lines.append(f"no group is radially invariant{why}{half}")
    return lines


def too_coarse(experiment: Experiment, result: Result) -> str:
    """The warning of groups that are finer than `RadialGroup` can say."""
    finer = [f"{experiment.leaves[i].path} ({what})" for i, what in result.finer.items()]
    return (
        f"expected groups that RadialGroup can say, found finer ones for {', '.join(finer)}, as of "
        "grouped transposed convolutions; those found are invariant, but coarser. Keep such a "
        "kernel with one leaf for each block, or split its axis in two."
    )


def varied_arguments(experiment: Experiment) -> list[str]:
    """The sentence on constant arguments that were varied, if any were."""
    return [f"Varied, being constant: {', '.join(experiment.varied)}."] * bool(experiment.varied)
