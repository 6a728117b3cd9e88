"""Resets the lengths that a state remembers."""

import re
from typing import Any

import jax
import jax.numpy as jnp

from spherical_optax import _trees
from spherical_optax.transforms._retract import RetractState
from spherical_optax.transforms._split import SplitRadialState

FIELDS: dict[type, str] = {RetractState: "target_radius", SplitRadialState: "lengths"}


def forget_radii(state: Any, path: str = "") -> Any:
    """Sets the remembered lengths in a state to 0, so that the next update remembers new ones.

    Use it after you prune or exchange weights in the middle of training. A new length between half
    and twice the remembered one counts as drift, and the next update would undo it.

    Args:
      state: The state of an optimizer, or any tree with states of `retract` or `split_radial`.
      path: A regular expression on the paths of parameters (`re.search`). Lengths at other paths
        are kept.

    Returns:
      The same tree, with these lengths set to 0.

    Raises:
      ValueError: If the state has no remembered lengths, or `path` matches none of them.

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
    if not found:
        raise ValueError(
            "forget_radii: expected the state of an optimizer that keeps the initial radius, found "
            f"no lengths in {type(state).__name__}."
        )
    if not forgotten:
        raise ValueError(
            f"forget_radii: expected a remembered length at a path that {path!r} matches, found "
            f"lengths at {sorted(set(found))}."
        )
    return state
