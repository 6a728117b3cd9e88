"""Complex leaves as pairs of real ones, as in `optax.contrib.split_real_and_imaginary`."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spherical_optax import _trees


class Pair(NamedTuple):
    """The real and the imaginary part of a complex leaf, named as Optax names them."""

    real: Any
    imaginary: Any


def is_complex(tree: Any) -> bool:
    """Whether a tree has a complex leaf."""
    return any(map(_is_complex, jax.tree.leaves(tree)))


def split(tree: Any) -> Any:
    """The tree with each complex leaf as a pair of real ones."""
    return jax.tree.map(lambda leaf: Pair(*_parts(leaf)) if _is_complex(leaf) else leaf, tree)


def merged(tree: Any) -> Any:
    """The tree with each pair of real leaves as a complex one."""
    return jax.tree.map(
        lambda node: node.real + 1j * node.imaginary if _is_pair(node) else node,
        tree,
        is_leaf=_is_pair,
    )


def of_pairs(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function of complex parameters, as a function of parameters with pairs."""
    return lambda params, *args: fn(merged(params), *args)


def groups_of_pairs(groups: Any) -> Any:
    """Turns groups of a split tree into groups of the complex leaves: those of the real parts.

    A complex leaf has a group only if both its parts have one.
    """

    def of(node: Any) -> Any:
        if not _is_pair(node) or node.real is None or node.imaginary is None:
            return None if _is_pair(node) else node
        return dataclasses.replace(node.real, joint=None)

    return jax.tree.map(of, groups, is_leaf=lambda node: node is None or _is_pair(node))


def pairs(tree: Any) -> set[tuple[str, ...]]:
    """The keys of the pairs in a tree."""
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_pair)
    return {tuple(_trees.key_name(key) for key in path) for path, node in nodes if _is_pair(node)}


def _is_pair(node: Any) -> bool:
    return isinstance(node, Pair) or type(node).__name__ == "SplitRealAndImaginaryArrays"


def _is_complex(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating)


def _parts(leaf: Any) -> tuple[Any, Any]:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        part = jax.ShapeDtypeStruct(leaf.shape, jnp.finfo(leaf.dtype).dtype)
        return part, part
    return leaf.real, leaf.imag
