"""Forgetting the lengths that a state remembers."""

import re
from typing import Any

import jax
import jax.numpy as jnp

from spherical_optax import _trees
from spherical_optax.transforms._retract import RetractState
from spherical_optax.transforms._split import SplitRadialState

FIELDS: dict[type, str] = {RetractState: "target_radius", SplitRadialState: "lengths"}


def forget_radii(state: Any, path: str = "") -> Any:
    """The state with remembered lengths set to 0, so that the next update remembers anew.

    For weights that were cut or exchanged in the middle of training at about their scale: a
    length that is between half and twice the one remembered counts as drift, and is undone.

    Args:
      state: The state of an optimizer, or any tree that holds states of `retract`.
      path: A regular expression on the paths of parameters, found by `re.search`; the lengths of
        all others are kept.

    Returns:
      The same tree with other arrays.

    Raises:
      ValueError: If no remembered length is found, or path matches none.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> tx = so.retract(so.per_layer())
      >>> params = jnp.array([3., 4.])
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> state.target_radius, so.forget_radii(state).target_radius
      (Array(5., dtype=float32), Array(0., dtype=float32))
    """
    found: list[str] = []
    forgotten: list[str] = []

    def lengths(node: Any) -> bool:
        return isinstance(node, tuple(FIELDS))

    def forget(keys: Any, leaf: Any) -> Any:
        name = "/".join(_trees.key_name(key) for key in keys)
        found.append(name)
        if leaf is None or not re.search(path, name):
            return leaf
        forgotten.append(name)
        return jax.tree.map(jnp.zeros_like, leaf)

    def each(node: Any) -> Any:
        if not lengths(node):
            return node
        field = FIELDS[type(node)]
        tree = jax.tree_util.tree_map_with_path(
            forget, getattr(node, field), is_leaf=lambda leaf: leaf is None or _trees.is_box(leaf)
        )
        return node._replace(**{field: tree})

    state = jax.tree.map(each, state, is_leaf=lengths)
    if not forgotten:
        raise ValueError(
            f"forget_radii: expected a remembered length at a path that {path!r} matches, found "
            f"lengths at {sorted(set(found))}."
        )
    return state
