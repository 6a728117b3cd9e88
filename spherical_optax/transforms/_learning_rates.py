"""Learning rates: one for groups, and another rate or any transformation for other leaves."""

import functools
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp
import optax

from spherical_optax import _trees
from spherical_optax._checks import check_learning_rate, check_transformation
from spherical_optax._engine.foreign import foreign
from spherical_optax._engine.layout import Layout, aligned
from spherical_optax._engine.lift import lift
from spherical_optax._engine.step import NOT_PER_LEAF, Step
from spherical_optax._masks import in_groups
from spherical_optax.groups import Groups, by_rule, check_rules, check_used, joints_of

Rates: TypeAlias = optax.ScalarOrSchedule | Mapping[str, optax.ScalarOrSchedule]
"""A number, a schedule, or a dictionary from regular expressions on paths to these."""


def scale_by_learning_rates(
    learning_rate: Rates, *, groups: Groups, other: optax.GradientTransformation | None = None
) -> optax.GradientTransformationExtraArgs:
    """Scales by minus the learning rate, with another transformation for leaves without a group.

    ```
    -learning_rate v        on leaves with a group
    other(v)                on leaves without one
    ```

    In a `chain`, the transforms before and after it still go over the arrays together, if they have
    the same groups. `optax.scale_by_learning_rate` between them would separate them.

    Args:
      learning_rate: A number, a schedule, or a dictionary from regular expressions on paths to
        numbers or schedules. In a dictionary the first pattern found in a path (`re.search`)
        decides. A dictionary separates the transforms of a chain.
      groups: See [`spherical_optax.groups`][].
      other: The transformation of leaves without a group, including the sign, such as a complete
        optimizer or `optax.scale_by_learning_rate(1e-3)`. With `None` these leaves get
        `learning_rate`; if it is a dictionary, `other` is required.

    Returns:
      A transformation with the state of `optax.scale_by_learning_rate`; with `other`, the states of
      both, masked; with a dictionary, the state of `optax.partition`.

    Raises:
      TypeError, ValueError: If a rate is out of range, or `other` is not a transformation; at
        `init`, if `groups` or a dictionary does not fit the parameters, or `other` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> groups = {"kernel": so.per_layer(), "bias": None}
      >>> other = optax.scale_by_learning_rate(0.5)
      >>> tx = so.scale_by_learning_rates(0.1, groups=groups, other=other)
      >>> params = {"kernel": jnp.ones(2), "bias": jnp.ones(2)}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> print(updates["kernel"], updates["bias"])
      [-0.1 -0.1] [-0.5 -0.5]
    """
    return learning_rates_as("scale_by_learning_rates", learning_rate, groups, other)


def learning_rates_as(
    who: str, learning_rate: Rates, groups: Groups, other: optax.GradientTransformation | None
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_learning_rates`, with the name of the function that was called for messages."""
    if other is not None:
        check_transformation(who, other, "other")
    if isinstance(learning_rate, Mapping):
        return _rates_by_path(who, learning_rate, other, groups)
    check_learning_rate(who, learning_rate)
    rate = optax.scale_by_learning_rate(learning_rate)
    if other is None:
        init: Any = rate.init
        prepare: Any = functools.partial(_one_rate, rate)
    else:
        inside = optax.masked(rate, in_groups(groups, True))
        outside = optax.masked(other, in_groups(groups, False))
        init = lambda params: (inside.init(params), outside.init(params))  # noqa: E731
        prepare = functools.partial(_two_rates, who, rate, foreign(who, outside))
    return lift(Step(who, groups, init, NOT_PER_LEAF, prepare, needs_params=False))


def _one_rate(rate: optax.GradientTransformation, layout: Layout, state: Any) -> Any:
    """One rate for all leaves."""
    leaves = [jnp.ones(()), *(layout.updates[i] for i in layout.rest)]
    (factor, *scaled), state = rate.update(leaves, state)
    for i, leaf in zip(layout.rest, scaled, strict=True):
        layout.updates[i] = leaf
    return state, lambda v, x, state: (v * factor, state)


def _two_rates(who: str, rate: Any, outside: Any, layout: Layout, state: Any) -> Any:
    """A rate for groups, and a masked transformation for all other leaves."""
    (inside_state, outside_state), updates = state, layout.trees(layout.updates)[0]
    factor, inner_state = rate.update(jnp.ones(()), inside_state.inner_state)
    updates, outside_state = outside.update(
        updates, outside_state, layout.tree, **layout.extra_args
    )
    leaves = aligned(who, layout.like, updates)[0]
    for i in layout.rest:
        layout.updates[i] = leaves[i]
    state = (inside_state._replace(inner_state=inner_state), outside_state)
    return state, lambda v, x, state: (v * factor, state)


def _rates_by_path(
    who: str,
    rules: Mapping[str, optax.ScalarOrSchedule],
    other: optax.GradientTransformation | None,
    groups: Groups,
) -> optax.GradientTransformation:
    """Scales each group by the rate of the first rule found in its path."""
    check_rules(who, "learning_rate", rules)
    for rate in rules.values():
        check_learning_rate(who, rate)
    rates = {rule: optax.scale_by_learning_rate(rate) for rule, rate in rules.items()}

    def labels(tree: Any) -> Any:
        joints = joints_of(groups, tree)
        said: dict[int, Any] = {}
        rules_of = by_rule(who, "learning_rate", rules, joints, tree)
        for joint, rule in zip(joints, rules_of, strict=True):
            said |= dict.fromkeys(joint, rule)
        boxes, treedef = _trees.flatten_boxes(tree)
        return treedef.unflatten([said.get(i, "") for i in range(len(boxes))])

    rest = optax.set_to_zero() if other is None else other
    tx = optax.partition({**rates, "": rest}, labels)

    def init(params: optax.Params) -> optax.OptState:
        layout = Layout.at_init(who, groups, params)
        check_used(who, "learning_rate", rules, layout.joints, params)
        if layout.rest and other is None:
            leaves = _trees.visible_leaves(params)
            raise ValueError(
                f"{who}: expected other, an optimizer for the parameters without a group, "
                f"{[leaves[i].path for i in layout.rest]}, found None. The rules of learning_rate "
                "are for groups only. Pass other=optax.scale_by_learning_rate(1e-3), or a complete "
                "optimizer."
            )
        return tx.init(params)

    return optax.GradientTransformationExtraArgs(init, optax.with_extra_args_support(tx).update)
