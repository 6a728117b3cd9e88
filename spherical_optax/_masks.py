"""Masks of leaves: trees of booleans, as `optax.adamw` and `optax.masked` take them."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np

from spherical_optax import _trees
from spherical_optax.groups import Groups, joints_of

Mask: TypeAlias = Any
"""A tree of booleans, or a prefix of one; a function of the parameters that returns one and reads
only paths and shapes; or `None` for all leaves."""


def in_mask(who: str, mask: Mask, tree: Any) -> list[bool]:
    """Whether each leaf of `_trees.flatten` is in the mask; raises if the mask does not fit."""
    leaves = _trees.leaves_with_paths(tree)
    if mask is None or not leaves:  # optax.tree_map_params calls init with an empty placeholder
        return [True for leaf in leaves if not leaf.hidden]
    nodes = jax.tree.leaves(mask)
    if nodes and all(callable(node) for node in nodes):  # a module may be callable, its leaves not
        mask = mask(tree)
    entries = {leaf.keys: leaf.value for leaf in _trees.leaves_with_paths(mask)}
    if isinstance(entries.get(()), bool | np.bool_) and leaves[0].keys:
        raise ValueError(
            f"{who}: expected mask to be a tree of booleans or a function, found {entries[()]} for "
            "all parameters. To decay all of them, omit mask. To decay none, set weight_decay=0. "
            "Under optax.inject_hyperparams, name mask in static_args. Otherwise it is called with "
            "a step count."
        )
    flags = []
    expected = f"{who}: expected mask to be a pytree prefix of the parameters"
    for leaf, flag in _trees.by_prefix(entries, leaves, expected, "put True or False there"):
        if not (leaf.absent or isinstance(flag, bool | np.bool_)):
            raise TypeError(
                f"{who}: expected True or False in mask for {leaf.path}, found {flag!r} of type "
                f"{type(flag).__name__}."
            )
        if not leaf.hidden:
            flags.append(not leaf.absent and bool(flag))
    return flags


def checked(who: str, mask: Mask) -> Callable[[Any], Any]:
    """The mask for `optax.masked`, which is checked to fit the parameters."""
    return lambda tree: _tree_of(in_mask(who, mask, tree), tree)


def in_groups(groups: Groups, wanted: bool) -> Callable[[Any], Any]:
    """A mask for `optax.masked`: the leaves with a group, or those without."""

    def mask(tree: Any) -> Any:
        grouped = {i for joint in joints_of(groups, tree) for i in joint}
        numbers = range(len(_trees.flatten(tree)[0]))
        return _tree_of([(i in grouped) is wanted for i in numbers], tree)

    return mask


def _tree_of(flags: list[bool], tree: Any) -> Any:
    return _trees.flatten_boxes(tree)[1].unflatten(flags)
