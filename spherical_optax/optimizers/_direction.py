"""Whether a transformation gives a direction, or a whole step, whose sign is turned already."""

from typing import Any

import numpy as np
import optax

from spherical_optax import _trees
from spherical_optax._trial import Trial, trials
from spherical_optax.transforms._units import Unit

STEPS = 3  # the first of a warm-up has length 0


def check_direction(
    who: str, inner: optax.GradientTransformation, params: Any, units: list[Unit]
) -> None:
    """Raises a `ValueError` if the updates of a transformation point against the gradients.

    One that cannot be tried passes.
    """
    for run in trials(inner, params, units, STEPS, same=True):
        opposed = _opposed(run)
        if opposed is not None:
            path = _trees.visible_leaves(params)[opposed].path
            raise ValueError(
                f"{who}: expected inner to give a direction, found that its update of "
                f"{path or 'the parameters'} points against the gradient, as that "
                f"of a whole optimizer: groups would climb. Pass the scale_by_* that it is made "
                f"of, optax.scale_by_adam() for optax.adam(...); {who} has the learning rate."
            )
        return


def _opposed(run: list[Trial]) -> int | None:
    """The number of a leaf whose updates point against its gradient, if there is one."""
    cosines = []
    for trial in run:
        pairs = zip(
            _trees.flatten(trial.updates)[0], _trees.flatten(trial.gradients)[0], strict=True
        )
        cosines.append([0.0 if b is None else _cosine(a, b) for a, b in pairs])
    each = np.array(cosines)
    against = (each.min(0) < -0.1) & (each.max(0) <= 0)
    return int(against.argmax()) if against.any() else None


def _cosine(a: Any, b: Any) -> float:
    a, b = (np.asarray(each, np.complex128).ravel() for each in (a, b))
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.vdot(a, b).real) / length if 0 < length < np.inf else 0.0
