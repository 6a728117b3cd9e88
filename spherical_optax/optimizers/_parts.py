"""Parts that the chains share: weight decay, and learning rates in and out of groups."""

from typing import Any

import optax

from spherical_optax._checks import check_learning_rate, check_number
from spherical_optax._masks import Mask, checked, in_groups
from spherical_optax.groups import Groups


def decayed_weights(who: str, weight_decay: Any, mask: Mask) -> optax.GradientTransformation:
    """Adds weight_decay x: L2 before the moments, decoupled decay after them."""
    check_number(who, "weight_decay", weight_decay)
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return optax.identity()
    return optax.add_decayed_weights(weight_decay, None if mask is None else checked(who, mask))


def learning_rates(
    who: str,
    learning_rate: optax.ScalarOrSchedule,
    other_learning_rate: optax.ScalarOrSchedule | None,
    groups: Groups,
) -> optax.GradientTransformation:
    """Scales by minus the learning rate, and by minus another on leaves without a group."""
    check_learning_rate(who, learning_rate)
    if other_learning_rate is None:
        return optax.scale_by_learning_rate(learning_rate)
    check_learning_rate(who, other_learning_rate, "other_learning_rate")
    return optax.chain(
        optax.masked(optax.scale_by_learning_rate(learning_rate), in_groups(groups, True)),
        optax.masked(optax.scale_by_learning_rate(other_learning_rate), in_groups(groups, False)),
    )
