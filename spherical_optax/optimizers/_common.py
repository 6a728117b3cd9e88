"""Parts that the optimizers share: weight decay, learning rates, and steps at a fixed radius."""

from typing import Any

import optax

from spherical_optax._checks import (
    check_learning_rate,
    check_number,
    check_transformation,
    warn_of_angle,
)
from spherical_optax._checks.at_init import require_direction, require_other, require_spheres
from spherical_optax._engine.layout import no_params
from spherical_optax._masks import Mask, checked, in_groups
from spherical_optax.groups import Groups
from spherical_optax.transforms import chain, retract
from spherical_optax.transforms._learning_rates import Rates, learning_rates_as


def decays(weight_decay: Any) -> bool:
    """Whether there is weight decay: `False` only for the Python number 0."""
    return not (isinstance(weight_decay, int | float) and weight_decay == 0)


def decayed_weights(who: str, weight_decay: Any, mask: Mask) -> optax.GradientTransformation:
    """Adds weight_decay x, which is L2 before the moments and decoupled decay after them."""
    check_number(who, "weight_decay", weight_decay)
    if not decays(weight_decay):
        return optax.identity()
    tx = optax.add_decayed_weights(weight_decay, None if mask is None else checked(who, mask))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise no_params(who)
        return tx.update(updates, state, params)

    return optax.GradientTransformation(tx.init, update)


def learning_rates(
    who: str,
    learning_rate: Rates,
    other_learning_rate: optax.ScalarOrSchedule | None,
    groups: Groups,
) -> optax.GradientTransformation:
    """Scales by minus the learning rate, which may be another one for leaves without a group."""
    other = None
    if other_learning_rate is not None:
        check_learning_rate(who, other_learning_rate, "other_learning_rate")
        other = optax.scale_by_learning_rate(other_learning_rate)
    return learning_rates_as(who, learning_rate, groups, other)


def no_weight_decay(who: str, weight_decay: Any) -> None:
    """Raises a `TypeError` if weight decay is given to an optimizer that fixes the radius."""
    if weight_decay is not None:
        raise TypeError(
            f"{who}: expected no weight_decay, found {weight_decay!r}. The radius of groups is "
            "fixed, so decay would have no effect there. Give the decay of other leaves to their "
            f"optimizer: {who}(..., other=optax.adamw(learning_rate, weight_decay=...))."
        )


def at_fixed_radius(
    who: str,
    inner: Any,
    step: tuple[optax.GradientTransformation, ...],
    angle: Rates,
    groups: Groups,
    other: Any,
    radius: Any,
    *,
    center: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose groups step by an angle along inner's direction, at a fixed radius."""
    check_transformation(who, inner)
    warn_of_angle(who, angle)
    initial = isinstance(radius, str) and radius == "initial"
    return chain(
        require_spheres(who, groups, center=center, warn=not initial),  # retract warns itself
        require_other(who, groups, other),
        require_direction(who, inner, groups),
        optax.masked(inner, in_groups(groups, True)),
        *step,
        learning_rates_as(who, angle, groups, other),
        retract(groups, radius),
        who=who,
    )
