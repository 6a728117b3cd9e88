"""Steps: transformations written for one group, and the shapes of what they keep."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import optax

from spherical_optax._engine.layout import Layout
from spherical_optax._engine.vector import Vector
from spherical_optax.groups import Groups

NOT_PER_LEAF: Any = object()
"""In place of a shape: this part of the state is no tree like the parameters."""

OnGroup: TypeAlias = Callable[[Vector, Vector, Any], tuple[Vector, Any]]
"""From update, point and state of a group to its new update and state. A field of the state is a
`Vector` if it has one value per entry, an array if one per group. All else is as `prepare` left it,
and stays so.

It is run twice, and has to ask for the same inner products both times: it branches with `jnp.where`
and `Vector.where`. Vectors are added, subtracted, and multiplied by a number or by one per group,
which stands on the right."""

Prepare: TypeAlias = Callable[[Layout, Any], tuple[Any, OnGroup]]
"""Does all that is not per group: it counts, and changes `layout.updates[i]` for i in `layout.rest`
in place. It is given the state with lists, leaf by leaf, in place of trees, and returns the new
one, and the function of one group, which sees what was counted."""


class Step(NamedTuple):
    """A transformation that acts on groups.

    Attributes:
      who: Its name, for messages.
      groups: See [`spherical_optax.groups`][].
      init: As of a transformation.
      state_shapes: The state, with a function of `layout` as `per_group` for each tree like the
        parameters, and `NOT_PER_LEAF` for all else.
      prepare: See `Prepare`.
      skips_single_entries: Whether groups of one entry are leaves without a group to it.
      needs_params: Whether it looks at the point. If not, another array of its shape may be there.
    """

    who: str
    groups: Groups
    init: Callable[[Any], Any]
    state_shapes: Any
    prepare: Prepare
    skips_single_entries: bool = False
    needs_params: bool = True


def stateless(who: str, groups: Groups, on_group: OnGroup) -> Step:
    """A step without a state that leaves all other leaves alone."""

    def init(params: optax.Params) -> optax.EmptyState:
        Layout.at_init(who, groups, params)
        return optax.EmptyState()

    return Step(who, groups, init, optax.EmptyState(), groups_only(on_group))


def groups_only(on_group: OnGroup) -> Prepare:
    """The `prepare` of a step that does nothing outside of groups."""
    return lambda layout, state: (state, on_group)


def optax_on_the_rest(tx: optax.GradientTransformation, layout: Layout, state: Any) -> Any:
    """Applies Optax's own transformation, one without params, to the leaves without a group.

    The updates in `layout` are replaced. The state has lists in place of trees, before and after;
    what it has of other leaves is kept.
    """
    places = layout.rest
    if not places:
        return state
    is_list = lambda node: isinstance(node, list)  # noqa: E731
    taken = jax.tree.map(
        lambda node: [node[i] for i in places] if is_list(node) else node, state, is_leaf=is_list
    )
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam has a float to the power of an int
        steps, new = tx.update([layout.updates[i] for i in places], taken)
    for i, step in zip(places, steps, strict=True):
        layout.updates[i] = step.astype(layout.updates[i].dtype)

    def put(node: Any, values: Any) -> Any:
        if not is_list(node):
            return values
        node = list(node)
        for i, value in zip(places, values, strict=True):
            node[i] = value.astype(node[i].dtype)
        return node

    return jax.tree.map(put, state, new, is_leaf=is_list)
