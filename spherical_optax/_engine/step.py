"""Steps: transformations written for one group, with the shapes of their state."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import optax

from spherical_optax._engine.layout import Layout
from spherical_optax._engine.vector import Vector
from spherical_optax.groups import Groups

NOT_PER_LEAF: Any = object()
"""In place of a shape: this part of the state is not a tree like the parameters."""

OnGroup: TypeAlias = Callable[[Vector, Vector, Any], tuple[Vector, Any]]
"""Maps the update, point and state of a group to its new update and state.

A field of the state is a `Vector` if it has one value per entry, and an array if it has one value
per group. The other parts of the state are as `prepare` returned them, and must not change.

The function runs twice and must ask for the same inner products both times. So it must branch with
`jnp.where` and `Vector.where`. Vectors can be added, subtracted, and multiplied by a number or by
one number per group. The factor is on the right."""

Prepare: TypeAlias = Callable[[Layout, Any], tuple[Any, OnGroup]]
"""Does everything that is not per group, such as counting steps and changing `layout.updates[i]` in
place for i in `layout.rest`.

It gets the state with lists, leaf by leaf, in place of trees. It returns the new state, and the
function of one group, which may use the new count."""


class Step(NamedTuple):
    """A transformation that acts on groups.

    Attributes:
      who: Its name in error messages.
      groups: See [`spherical_optax.groups`][].
      init: The `init` of the transformation.
      state_shapes: A state with a shape function of `layout`, such as `per_group`, in place of each
        tree like the parameters, and `NOT_PER_LEAF` in place of any other part.
      prepare: See `Prepare`.
      skips_single_entries: Whether it treats leaves of one entry per group as having no group.
      needs_params: Whether it reads the point. If not, the point may be any array of its shape.
    """

    who: str
    groups: Groups
    init: Callable[[Any], Any]
    state_shapes: Any
    prepare: Prepare
    skips_single_entries: bool = False
    needs_params: bool = True


def stateless(who: str, groups: Groups, on_group: OnGroup) -> Step:
    """A step without state that leaves the updates of leaves without a group unchanged."""

    def init(params: optax.Params) -> optax.EmptyState:
        Layout.at_init(who, groups, params)
        return optax.EmptyState()

    return Step(who, groups, init, optax.EmptyState(), groups_only(on_group))


def groups_only(on_group: OnGroup) -> Prepare:
    """The `prepare` of a step that changes nothing outside groups."""
    return lambda layout, state: (state, on_group)


def optax_on_the_rest(tx: optax.GradientTransformation, layout: Layout, state: Any) -> Any:
    """Applies Optax's version of a transformation to the leaves without a group.

    `tx` must not need params. The updates in `layout` are replaced. The state has lists in place of
    trees, before and after, and keeps its entries for leaves with a group.
    """
    places = layout.rest
    if not places:
        return state
    is_list = lambda node: isinstance(node, list)  # noqa: E731
    taken = jax.tree.map(
        lambda node: [node[i] for i in places] if is_list(node) else node, state, is_leaf=is_list
    )
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam raises a float to an int power
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
