"""Whether a transformation gives a direction, or a whole step, whose sign is turned already."""

from typing import Any

import jax
import numpy as np
import optax

from spherical_optax import _trees
from spherical_optax._checks import check_transformation
from spherical_optax._checks.trial import Trial, trials
from spherical_optax._masks import in_groups
from spherical_optax.groups import Groups, joints_of


class Direction(optax.GradientTransformationExtraArgs):
    """A transformation of which it was said that it gives a direction."""


def direction(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Says that a transformation gives a direction, for `hyperball` and `rotational`.

    They try `inner` at `init`, and refuse a whole optimizer, whose updates point against the
    gradients already: groups would climb. This leaves the trial out, for a transformation that
    cannot be tried, as it needs arguments that only your program has.

    Args:
      tx: A `scale_by_*`, `optax.trace`, or a chain of such.

    Returns:
      The same transformation.

    Raises:
      TypeError: If this is no transformation.

    Examples:
      >>> import optax
      >>> import spherical_optax as so
      >>> tx = so.hyperball(so.direction(optax.scale_by_adam()), 0.1, groups=so.per_layer())
    """
    check_transformation("direction", tx, "tx")
    return Direction(*optax.with_extra_args_support(tx))


STEPS = 3  # the first of a warm-up has length 0


def check_direction(
    who: str, inner: optax.GradientTransformation, groups: Groups, params: Any
) -> None:
    """Raises a `ValueError` if the updates of a transformation point against the gradients.

    One whose hyperparameters are traced passes, as they do everywhere.
    """
    if isinstance(inner, Direction):
        return
    try:
        masked = optax.masked(inner, in_groups(groups, True))
        run = next(trials(masked, params, joints_of(groups, params), STEPS, same=True))
    except Exception as error:
        raise ValueError(
            f"{who}: expected inner to give a direction, which is tried on small arrays, found "
            f"that it cannot be tried: {type(error).__name__}: {error}. If it is a scale_by_* or "
            "the like, and no whole optimizer, say so: inner=so.direction(inner)."
        ) from error
    if any(isinstance(each, jax.core.Tracer) for each in jax.tree.leaves(run)):
        return
    opposed = _opposed(run)
    if opposed is not None:
        path = _trees.visible_leaves(params)[opposed].path
        raise ValueError(
            f"{who}: expected inner to give a direction, found that its update of "
            f"{path or 'the parameters'} points against the gradient, as that of a whole "
            "optimizer: groups would climb. Pass the scale_by_* that it is made of, "
            f"optax.scale_by_adam() for optax.adam(...); {who} has the learning rate."
        )


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
