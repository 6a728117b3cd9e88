"""Differences between a stored optimizer state and the state that an optimizer expects."""

from typing import Any

import jax

__all__ = ["state_differences"]


def state_differences(expected: Any, stored: Any) -> list[str]:
    """Lists the arrays in which a stored state differs from the state that an optimizer expects.

    A state belongs to the `groups` that it was made with. With other groups, arrays have other
    shapes or are missing. Restore a checkpoint only if the list is empty. Two choices of groups
    that give the same shapes are not distinguished.

    Args:
      expected: The state that the optimizer expects: a pytree of arrays, or the result of
        `jax.eval_shape(tx.init, params)`.
      stored: The stored state: a pytree of arrays, or Orbax's metadata, whose leaves have a shape
        and a dtype. Tuples may have become lists or dictionaries, as in files.

    Returns:
      One line for each array that differs in shape or dtype, or that only one side has. The line
      has its path and both shapes and dtypes. The list is empty if all arrays agree.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import spherical_optax as so
      >>> params = {"kernel": jnp.ones((3, 4))}
      >>> stored = so.adamsrt(1e-2, groups=so.per_filter()).init(params)
      >>> other = so.adamsrt(1e-2, groups=so.per_layer())
      >>> print(*so.state_differences(jax.eval_shape(other.init, params), stored))
      1.nu.kernel: expected float32[], found float32[4]
    """
    there, wanted = _shapes(stored), _shapes(expected)
    names = [*wanted, *(name for name in there if name not in wanted)]
    return [
        f"{name}: expected {wanted.get(name, 'nothing')}, found {there.get(name, 'nothing')}"
        for name in names
        if wanted.get(name) != there.get(name)
    ]


def _shapes(tree: Any) -> dict[str, str]:
    """Shape and dtype by path. Tuples, lists and dictionaries give the same paths."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (
            f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        )
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
