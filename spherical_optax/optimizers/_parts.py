"""Parts that the chains share: weight decay, and learning rates in and out of groups."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp
import optax

from spherical_optax import _trees
from spherical_optax._checks import check_learning_rate, check_number
from spherical_optax._masks import Mask, checked, in_groups
from spherical_optax.groups import Groups, radial_units
from spherical_optax.transforms._lift import Lifted, chain, lift
from spherical_optax.transforms._pair import pair
from spherical_optax.transforms._radius import by_rule, check_rules, check_used
from spherical_optax.transforms._span import Step, shared

Rates: TypeAlias = optax.ScalarOrSchedule | Mapping[str, optax.ScalarOrSchedule]
"""A number or a schedule, or a dictionary from regular expressions on paths to these."""


def decays(weight_decay: Any) -> bool:
    """Whether there is weight decay: not if it is known to be 0."""
    return not (isinstance(weight_decay, int | float) and weight_decay == 0)


def decayed_weights(who: str, weight_decay: Any, mask: Mask) -> optax.GradientTransformation:
    """Adds weight_decay x: L2 before the moments, decoupled decay after them."""
    check_number(who, "weight_decay", weight_decay)
    if not decays(weight_decay):
        return optax.identity()
    return optax.add_decayed_weights(weight_decay, None if mask is None else checked(who, mask))


def learning_rates(
    who: str,
    learning_rate: Rates,
    other_learning_rate: optax.ScalarOrSchedule | None,
    groups: Groups,
) -> optax.GradientTransformation:
    """Scales by minus the learning rate, and by minus another on leaves without a group."""
    if isinstance(learning_rate, Mapping):
        return _rates_by_path(who, learning_rate, other_learning_rate, groups)
    check_learning_rate(who, learning_rate)
    if other_learning_rate is None:
        return everywhere(optax.scale_by_learning_rate(learning_rate), groups)
    check_learning_rate(who, other_learning_rate, "other_learning_rate")
    parts = (
        in_groups_only(optax.scale_by_learning_rate(learning_rate), groups),
        elsewhere_only(optax.scale_by_learning_rate(other_learning_rate), groups),
    )
    return lift(chain(*parts).step, alone=optax.chain(*parts))


def _rates_by_path(
    who: str,
    rules: Mapping[str, optax.ScalarOrSchedule],
    other_learning_rate: optax.ScalarOrSchedule | None,
    groups: Groups,
) -> optax.GradientTransformation:
    """Scales each group by the rate of the first rule that is found in its path."""
    check_rules(who, "learning_rate", rules)
    for rate in rules.values():
        check_learning_rate(who, rate)
    other: Any = 0.0 if other_learning_rate is None else other_learning_rate
    check_learning_rate(who, other, "other_learning_rate")
    rates = {rule: optax.scale_by_learning_rate(rate) for rule, rate in rules.items()}

    def labels(tree: Any) -> Any:
        units = radial_units(groups, tree)
        said: dict[int, Any] = {}
        for unit, rule in zip(
            units, by_rule(who, "learning_rate", rules, units, tree), strict=True
        ):
            said |= dict.fromkeys(unit, rule)
        boxes, treedef = _trees.flatten_boxes(tree)
        return treedef.unflatten([said.get(i, "") for i in range(len(boxes))])

    tx = optax.partition({**rates, "": optax.scale_by_learning_rate(other)}, labels)

    def init(params: optax.Params) -> optax.OptState:
        check_used(who, "learning_rate", rules, radial_units(groups, params), params)
        return tx.init(params)

    return optax.GradientTransformationExtraArgs(init, optax.with_extra_args_support(tx).update)


def everywhere(tx: optax.GradientTransformation, groups: Groups) -> Lifted:
    """A transformation that multiplies all entries by one number, as a step."""

    def begin(updates: Any, state: Any, params: Any) -> Any:
        units, _, (w,), unflatten = pair("scale", groups, params, updates)
        grouped = {i for unit in units for i in unit}
        rest = [i for i, leaf in enumerate(w) if i not in grouped and leaf is not None]
        (factor, *scaled), state = tx.update([jnp.ones(()), *(w[i] for i in rest)], state)
        for i, leaf in zip(rest, scaled, strict=True):
            w[i] = leaf
        return *unflatten(w), state, lambda v, x, state: (v * factor, state)

    return lift(Step("scale", groups, tx.init, shared, begin), alone=tx)


def in_groups_only(tx: optax.GradientTransformation, groups: Groups) -> Lifted:
    """The same for leaves with a group."""
    masked = optax.masked(tx, in_groups(groups, True))

    def begin(updates: Any, state: Any, params: Any) -> Any:
        del params
        factor, inner_state = tx.update(jnp.ones(()), state.inner_state)
        state = state._replace(inner_state=inner_state)
        return updates, state, lambda v, x, state: (v * factor, state)

    return lift(Step("scale", groups, masked.init, shared, begin), alone=masked)


def elsewhere_only(tx: optax.GradientTransformation, groups: Groups) -> Lifted:
    """Any transformation of leaves without a group, as a step that leaves groups alone."""
    masked = optax.masked(tx, in_groups(groups, False))

    def begin(updates: Any, state: Any, params: Any) -> Any:
        updates, state = masked.update(updates, state, params)
        return updates, state, lambda v, x, state: (v, state)

    return lift(Step("scale", groups, masked.init, shared, begin), alone=masked)
