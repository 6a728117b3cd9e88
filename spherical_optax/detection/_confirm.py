"""Confirms the groups that were found: scaling them must not change the outputs."""

import functools
from collections.abc import Callable, Iterator
from typing import TypeVar

from spherical_optax.detection._experiment import Experiment, Progress
from spherical_optax.detection._search import NO_EFFECT, Result
from spherical_optax.groups import Joint

CHANGED = 1e-2  # relative change of the outputs up to which they count as unchanged

T = TypeVar("T")


def confirm(
    experiment: Experiment, result: Result, progress: Progress
) -> tuple[list[Joint], dict[int, float]]:
    """The joints that may be scaled, and the leaves of all other joints.

    Each of these leaves comes with how much scaling its groups changes the outputs. Wrong verdicts
    are corrected in `result`.
    """
    dropped = moving(experiment, result.joints, progress)
    for i, change in dropped.items():
        result.verdicts[i] = f"unclear: scaling changes the outputs by {change:.0e}"
    without_effect = [i for i, verdict in result.verdicts.items() if verdict == NO_EFFECT]
    change_of = functools.partial(experiment.change, 0, [])
    for i, _ in _culprits(without_effect, change_of, limit_of_change(experiment)):
        result.verdicts[i] = "not invariant: no gradient, but an effect on the outputs"
    return [joint for joint in result.joints if not dropped.keys() & joint.keys()], dropped


def moving(
    experiment: Experiment, joints: list[Joint], progress: Progress = lambda line: None
) -> dict[int, float]:
    """How much scaling its groups changes the outputs, for each leaf whose groups change them.

    All groups are scaled at once, at two points. Groups that change the outputs are located by
    bisection.
    """
    change_of_leaf: dict[int, float] = {}
    for number in (0, 1):
        progress(f"scaling all groups at point {number + 1}")
        others = [joint for joint in joints if not change_of_leaf.keys() & joint.keys()]
        change_of = functools.partial(experiment.change, number)
        for joint, change in _culprits(others, change_of, limit_of_change(experiment)):
            change_of_leaf.update(dict.fromkeys(joint, change))
    return change_of_leaf


def limit_of_change(experiment: Experiment) -> float:
    """The relative change up to which outputs count as unchanged."""
    return max(CHANGED, 10 * experiment.unrest)


def _culprits(
    scaled: list[T], change_of: Callable[[list[T]], float], limit: float
) -> Iterator[tuple[T, float]]:
    """The items whose scaling changes the outputs, each with the change, located by bisection."""
    change = change_of(scaled) if scaled else 0.0
    if change <= limit:
        return
    if len(scaled) == 1:
        yield scaled[0], change
        return
    half = len(scaled) // 2
    yield from _culprits(scaled[:half], change_of, limit)
    yield from _culprits(scaled[half:], change_of, limit)
