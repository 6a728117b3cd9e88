"""Warnings that the user should read before using the groups, with the usual causes."""

from spherical_optax.detection._confirm import limit_of_change
from spherical_optax.detection._experiment import Experiment
from spherical_optax.detection._search import NO_EFFECT, Result
from spherical_optax.groups import Joint, RadialGroup

FEW = 2  # kernels that are scaled to find out why there is no group

CAUSES = (
    "Usual causes: (1) BatchNorm in evaluation mode: its running statistics do not follow the "
    "weights, so use training mode. (2) fn returns updated statistics with the outputs, or a loss "
    "with L2 regularization. (3) Inputs of one pixel, or a batch of one or two. (4) No "
    "normalization layer follows directly."
)

STOPPED = (
    "Usual causes: jax.lax.stop_gradient on a norm or a scale computed from the weights, or a "
    "straight-through estimator. Do not project or transport moments of such gradients."
)

UNUSED = (
    "the outputs of fn do not depend on params. It seems to use other parameters, such as those of "
    "a model that it closes over. Use params inside fn, as in nnx.merge(graphdef, params) or "
    "model.apply({'params': params}, x)."
)

HALF = "fn computes in half precision, and rounding may hide invariance. Try float32."

ON_PURPOSE = (
    "Hyperball, AdamH, MuonH, nGPT, SimbaV2 and retract also keep matrices on a sphere that are "
    "not invariant, to set the angle per step. For such matrices this result is expected."
)


def doubts(
    experiment: Experiment, result: Result, joints: list[Joint], dropped: dict[int, float]
) -> list[str]:
    """The doubts about a search, one paragraph each.

    `joints` are the joints that were confirmed. `dropped` has the leaves of the others, each with
    how much scaling it changes the outputs.
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
            f"expected deviations of at most {limits.invariant:.0e} (invariant) or at least "
            f"{limits.varying:.0e} (not invariant), found deviations in between for {unclear}. "
            f"These parameters get no group. A larger batch may decide.{half}"
        )
    if dropped:
        moved = [f"{path[i]} ({change:.0e})" for i, change in dropped.items()]
        lines.append(
            f"expected outputs that do not change when groups are scaled, found that they change "
            f"for {moved}. These parameters get no group."
        )
    if not experiment.used:
        return [*lines, UNUSED]
    if result.finer:
        lines.append(too_coarse(experiment, result))
    kernels = [i for i in experiment.floating if experiment.leaves[i].value.ndim > 1]
    idle = [i for i in kernels if result.verdicts[i] == NO_EFFECT]
    if kernels and 2 * len(idle) > len(kernels):
        lines.append(
            f"{len(idle)} of {len(kernels)} kernels have no effect on the outputs, for example "
            f"{path[idle[0]]}. {CAUSES}"
        )
    elif not (joints or lines):
        limit = limit_of_change(experiment)
        # The gradients of these kernels are not tangent, although the outputs do not change.
        stopped = [
            i for i in kernels[:FEW] if experiment.change(0, [{i: RadialGroup((-1,))}]) <= limit
        ]
        why = f". {CAUSES}"
        if stopped:
            why = (
                f", although the outputs do not change when {path[stopped[0]]} is scaled. {STOPPED}"
            )
        lines.append(f"no group is radially invariant{why}{half}")
    return lines


def too_coarse(experiment: Experiment, result: Result) -> str:
    """The warning about groups that are finer than `RadialGroup` can express."""
    finer = [f"{experiment.leaves[i].path} ({what})" for i, what in result.finer.items()]
    return (
        f"expected groups that RadialGroup can express, found finer ones for {', '.join(finer)}, "
        "as in grouped transposed convolutions. The groups in use are invariant, but coarser. For "
        "the finer ones, store the kernel as one leaf per block, or split its axis in two."
    )


def varied_arguments(experiment: Experiment) -> list[str]:
    """A sentence about the constant arguments that were varied, if there are any."""
    return [f"Varied because constant: {', '.join(experiment.varied)}."] * bool(experiment.varied)
