"""A check of signs: a direction points along the gradient, a whole optimizer against it."""

from typing import Any

import jax
import numpy as np
import optax

from spherical_optax import _trees
from spherical_optax._checks import check_transformation
from spherical_optax._checks.trial import trials
from spherical_optax._masks import in_groups
from spherical_optax.groups import Groups, joints_of


class Direction(optax.GradientTransformationExtraArgs):
    """A transformation that `direction` marks as one that gives a direction."""


def direction(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Marks a transformation as one that gives a direction, for `hyperball` and `rotational`.

    Both try `inner` at `init` and refuse a whole optimizer. Its updates already point against the
    gradients, so the groups would move up the loss. A marked transformation is not tried. Mark one
    that cannot be tried because it needs arguments that only your program has.

    Args:
      tx: A `scale_by_*`, `optax.trace`, or a chain of these.

    Returns:
      The same transformation, marked.

    Raises:
      TypeError: If `tx` is not a gradient transformation.

    Examples:
      >>> import optax
      >>> import spherical_optax as so
      >>> tx = so.hyperball(so.direction(optax.scale_by_adam()), 0.1, groups=so.per_layer())
    """
    check_transformation("direction", tx, "tx")
    return Direction(*optax.with_extra_args_support(tx))


STEPS = 3  # the first step of a warm-up has length 0


def check_direction(
    who: str, inner: optax.GradientTransformation, groups: Groups, params: Any
) -> None:
    """Raises a `ValueError` if the updates of a transformation point against the gradients.

    A transformation with traced hyperparameters passes, as traced values do in all checks.
    """
    if isinstance(inner, Direction):
        return
    try:
        cosines = _cosines(inner, True, groups, params)
    except Exception as error:
        raise ValueError(
            f"{who}: expected inner to give a direction, found that it fails on small arrays: "
            f"{type(error).__name__}: {error}. If it is a scale_by_* or similar, not a whole "
            "optimizer, mark it: inner=so.direction(inner)."
        ) from error
    path = _one_sided(-cosines, params)
    if path is not None:
        raise ValueError(
            f"{who}: expected inner to give a direction, found that its update of "
            f"{path or 'the parameters'} points against the gradient, as updates of a whole "
            "optimizer do. The groups would move up the loss. Pass the scale_by_* that it is made "
            f"of, such as optax.scale_by_adam() for optax.adam(...). {who} applies the learning "
            "rate."
        )


def check_other(who: str, other: Any, groups: Groups, params: Any) -> None:
    """Raises a `ValueError` if the updates of `other` point along the gradients.

    An `other` that fails on small arrays passes: it may need arguments that only the program has.
    """
    try:
        cosines = _cosines(other, False, groups, params)
    except Exception:
        return
    path = _one_sided(cosines, params)
    if path is not None:
        raise ValueError(
            f"{who}: expected other to be a whole optimizer, found that its update of {path} "
            "points along the gradient. This parameter would move up the loss. Pass a whole "
            "optimizer, such as optax.adam(1e-3) for optax.scale_by_adam(). To freeze the "
            "parameter, use optax.set_to_zero(): optax.masked passes gradients through."
        )


def _cosines(tx: Any, of_groups: bool, groups: Groups, params: Any) -> np.ndarray:
    """The cosine of update and gradient, by step and leaf; 0 for leaves that `tx` does not see."""
    mask = in_groups(groups, of_groups)
    run = next(trials(optax.masked(tx, mask), params, joints_of(groups, params), STEPS, same=True))
    seen = _trees.flatten(mask(params))[0]
    if any(isinstance(each, jax.core.Tracer) for each in jax.tree.leaves(run)):
        return np.zeros((1, len(seen)))
    return np.array(
        [
            [
                _cosine(a, b) if b is not None and is_seen else 0.0
                for a, b, is_seen in zip(
                    _trees.flatten(trial.updates)[0],
                    _trees.flatten(trial.gradients)[0],
                    seen,
                    strict=True,
                )
            ]
            for trial in run
        ]
    )


def _one_sided(cosines: np.ndarray, params: Any) -> str | None:
    """The path of a leaf whose cosines are never negative and once above 0.1, or `None`."""
    found = (cosines.max(0) > 0.1) & (cosines.min(0) >= 0)
    return _trees.visible_leaves(params)[found.argmax()].path if found.any() else None


def _cosine(a: Any, b: Any) -> float:
    a, b = (np.asarray(each, np.complex128).ravel() for each in (a, b))
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.vdot(a, b).real) / length if 0 < length < np.inf else 0.0
