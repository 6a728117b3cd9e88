"""What an update is given, leaf by leaf: paired with the parameters by path, and checked."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from spherical_optax import _trees
from spherical_optax.groups import (
    Groups,
    RadialGroup,
    group_size,
    radial_units,
    units_at_init,
)
from spherical_optax.sharding import check_whole
from spherical_optax.transforms._units import Unit

OTHER_STATE = (
    ": it was made with other groups, or for other parameters; call init again, or pad it with "
    "zeros where leaves grew"
)

Shape: TypeAlias = tuple[int, ...]
Kind: TypeAlias = Callable[[Shape, RadialGroup | None], Shape]
"""The shape of a leaf of the state, of the parameter's shape and group."""


def per_entry(shape: Shape, group: RadialGroup | None) -> Shape:
    """State like the parameters."""
    del group
    return shape


def per_group(shape: Shape, group: RadialGroup | None) -> Shape:
    """One value per group, and one on a leaf without a group."""
    return () if group is None else group.shape(shape)


def per_group_or_entry(shape: Shape, group: RadialGroup | None) -> Shape:
    """One value per group, and one per entry of a leaf without a group."""
    return shape if group is None else group.shape(shape)


class Paired(NamedTuple):
    """Trees as lists, leaf by leaf in the order of the parameters.

    Attributes:
      units: The leaves that form groups together, by number.
      x: The parameters.
      leaves: The updates, then the fields of the state.
      unflatten: From lists in the order of `leaves` to trees.
    """

    units: list[Unit]
    x: list[Any]
    leaves: list[list[Any]]
    unflatten: Callable[..., list[Any]]


def pair(
    who: str,
    groups: Groups,
    params: Any,
    updates: Any,
    *state: tuple[Any, Kind],
    movable: bool = False,
    typed: bool = True,
) -> Paired:
    """Flattens what an update is given, so that leaves of one path have one number.

    Args:
      who: The transform.
      groups: See the module `spherical_optax.groups`.
      params: The parameters, or a tree like them.
      updates: The updates; `None` stands for one that is missing.
      *state: Fields of the state that are trees like the parameters, with the kind of each.
      movable: Whether to leave out units of one entry per group, which have no tangent space.
      typed: Whether `unflatten` gives updates the dtypes of the parameters.

    Raises:
      ValueError: If there are no params, or if a tree has other paths than they, or leaves of
        other shapes; the message names the transform and the paths.
    """
    if params is None:
        raise no_params(who)
    units, x = _checked(who, radial_units(groups, params), params, movable)
    group_of = {i: group for unit in units for i, group in unit.items()}
    leaves, back = aligned(who, params, updates)
    fields = [(list(map(widened, leaves, x)), back)]
    for tree, kind in state:
        shapes = [
            None if leaf is None else kind(np.shape(leaf), group_of.get(i))
            for i, leaf in enumerate(x)
        ]
        fields.append(aligned(who, params, tree, shapes))

    def unflatten(*lists: list[Any]) -> list[Any]:
        if typed:
            lists = (list(map(as_dtype_of, lists[0], x)), *lists[1:])
        return [back(leaves) for (_, back), leaves in zip(fields, lists, strict=True)]

    return Paired(units, x, [leaves for leaves, _ in fields], unflatten)


def no_params(who: str) -> ValueError:
    """The error of an update that lacks params."""
    return ValueError(
        f"{who} requires the current value of the parameters, but `params` was not passed to "
        "`update`: call update(updates, state, params)."
    )


def resolve(
    who: str, groups: Groups, params: Any, *, movable: bool = False, keeps_radius: bool = False
) -> tuple[list[Unit], list[Any]]:
    """The units of the parameters, and all leaves, for `init`."""
    units = units_at_init(groups, params, who if keeps_radius else None)
    return _checked(who, units, params, movable)


def _checked(
    who: str, units: list[Unit], params: Any, movable: bool
) -> tuple[list[Unit], list[Any]]:
    leaves = _trees.flatten(params)[0]
    if movable:
        units = [unit for unit in units if group_size(unit, leaves) > 1]
    check_whole(who, params, [i for unit in units for i in unit])
    return units, leaves


def aligned(
    who: str, params: Any, tree: Any, state: list[Shape | None] | None = None
) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves of a tree in the order of the parameters, and the way back to such a tree.

    Args:
      who: The transform.
      params: The parameters.
      tree: A tree with the same paths.
      state: The shapes that its leaves should have, if it is part of the state; updates have
        those of the parameters.

    Raises:
      ValueError: If paths or shapes differ.
    """
    (x, like), (leaves, treedef) = _trees.flatten(params), _trees.flatten(tree)
    what, remedy = "updates", ""
    if state is not None:
        what = "state"
        remedy = OTHER_STATE
    order = list(range(len(leaves)))
    if treedef != like:
        keys, found = ([leaf.keys for leaf in _trees.visible_leaves(t)] for t in (params, tree))
        missing, extra = (
            ["/".join(each) for each in some if each not in others]
            for some, others in ((keys, set(found)), (found, set(keys)))
        )
        if missing or extra:
            raise ValueError(
                f"{who}: expected {what} with the paths of the parameters, found none for "
                f"{missing}, and some for {extra}{remedy}."
            )
        if keys != found:
            number = {each: i for i, each in enumerate(found)}
            order = [number[each] for each in keys]
            leaves = [leaves[i] for i in order]
    shapes = [None if leaf is None else np.shape(leaf) for leaf in x]
    for i, (leaf, expected) in enumerate(zip(leaves, state or shapes, strict=True)):
        if leaf is not None and np.shape(leaf) != expected:
            raise ValueError(
                f"{who}: {_trees.visible_leaves(params)[i].path} of shape {shapes[i]}: expected "
                f"{what} of shape {expected}, found {np.shape(leaf)}{remedy}."
            )

    def back(leaves: list[Any]) -> Any:
        placed = dict(zip(order, leaves, strict=True))
        return treedef.unflatten([placed[i] for i in range(len(leaves))])

    return leaves, back


def as_dtype_of(value: Any, like: Any) -> Any:
    """A floating array in the dtype of another one; all else as it is."""
    if not _floating(value, like) or value.dtype == like.dtype:
        return value
    return value.astype(like.dtype)


def widened(value: Any, like: Any) -> Any:
    """The same where it is narrower than the other one."""
    if (
        not _floating(value, like)
        or (dtype := jnp.result_type(value.dtype, like.dtype)) == value.dtype
    ):
        return value
    return value.astype(dtype)


def _floating(*leaves: Any) -> bool:
    return all(jnp.issubdtype(getattr(leaf, "dtype", object), jnp.floating) for leaf in leaves)


def check_type(who: str, state: Any, expected: type) -> None:
    """Raises a `TypeError` where the state is another transformation's."""
    if not isinstance(state, expected):
        raise TypeError(
            f"{who}: expected a state of type {expected.__name__}, found one of type "
            f"{type(state).__name__}: it was made by another transformation; call init of this one."
        )
