"""Masks of leaves: trees of booleans, as `optax.adamw` and `optax.masked` take them."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np

from spherical_optax import _trees
from spherical_optax.groups import Groups, radial_units

Mask: TypeAlias = Any
"""A tree of booleans, or a prefix of one; a function of the parameters that returns one, reading
paths and shapes only; or `None` for all leaves."""


def in_mask(who: str, mask: Mask, tree: Any) -> list[bool]:
    """Whether each leaf is in the mask, leaves as `_trees.flatten` counts them.

    Raises:
      TypeError: If an entry of the mask is no boolean.
      ValueError: If the mask is no prefix of the tree.
    """
    leaves = _trees.leaves_with_paths(tree)
    if mask is None or not leaves:  # optax.tree_map_params calls init with a leafless placeholder
        return [True for leaf in leaves if not leaf.hidden]
    nodes = jax.tree.leaves(mask)
    if nodes and all(callable(node) for node in nodes):  # a module may be callable: its leaves not
        mask = mask(tree)
    given = {leaf.keys: leaf.value for leaf in _trees.leaves_with_paths(mask)}
    if isinstance(given.get(()), bool | np.bool_) and leaves[0].keys:
        raise ValueError(
            f"{who}: expected mask to be a tree of booleans or a function, found {given[()]} for "
            "all parameters. For all of them leave mask out, for none set weight_decay=0; under "
            "optax.inject_hyperparams name mask in static_args, or it is called with a step."
        )
    found, used = [], set()
    for leaf in leaves:
        above = [leaf.keys[:n] for n in range(len(leaf.keys) + 1) if leaf.keys[:n] in given]
        used |= {*above[:1]}
        if leaf.value is None or leaf.hidden:  # the mask may reach below what is absent here
            used |= {keys for keys in given if keys[: len(leaf.keys)] == leaf.keys}
            found += [False] * (not leaf.hidden)
            continue
        if not above:
            raise ValueError(
                f"{who}: expected mask to be a pytree prefix of the parameters, found nothing for "
                f"{leaf.path} of shape {np.shape(leaf.value)}; put True or False there."
            )
        decision = given[above[0]]
        if not isinstance(decision, bool | np.bool_):
            raise TypeError(
                f"{who}: expected True or False in mask for {leaf.path}, found {decision!r} of "
                f"type {type(decision).__name__}."
            )
        found.append(bool(decision))
    unknown = ["/".join(keys) for keys in given if keys not in used]
    if unknown:
        raise ValueError(
            f"{who}: expected mask to be a pytree prefix of the parameters, found {unknown}, which "
            f"no parameter has. The paths are {[leaf.path for leaf in leaves]}."
        )
    return found


def checked(who: str, mask: Mask) -> Callable[[Any], Any]:
    """The mask for `optax.masked`, after checking that it fits."""
    return lambda tree: _tree_of(in_mask(who, mask, tree), tree)


def in_groups(groups: Groups, wanted: bool) -> Callable[[Any], Any]:
    """A mask for `optax.masked`: the leaves with a group, or those without."""

    def mask(tree: Any) -> Any:
        grouped = {i for unit in radial_units(groups, tree) for i in unit}
        return _tree_of(
            [(i in grouped) is wanted for i in range(len(_trees.flatten(tree)[0]))], tree
        )

    return mask


def _tree_of(flags: list[bool], tree: Any) -> Any:
    return _trees.flatten_boxes(tree)[1].unflatten(flags)
