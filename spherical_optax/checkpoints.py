"""What differs between a checkpoint and the optimizer that is to go on from it."""

from typing import Any

import jax

__all__ = ["state_differences"]


def state_differences(expected: Any, stored: Any) -> list[str]:
    """Says which arrays of a state are stored otherwise than an optimizer expects them.

    State belongs to the `groups` that it was made with. With others, arrays have other shapes,
    or are not there: restore only where nothing differs. Groups that give the same shapes are
    not told apart.

    Args:
      expected: The state that the optimizer expects: a pytree of arrays, or of what
        `jax.eval_shape(tx.init, params)` returns.
      stored: What is stored: a pytree of arrays, or of Orbax's metadata, whose leaves have a
        shape and a dtype. Tuples may have become lists and dictionaries, as in files.

    Returns:
      A line for each array that differs in shape or dtype or is on one side only, with its path,
      what was expected and what was found; none if all agree.

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
    """Shape and dtype by path, which is the same for tuples, lists and dictionaries."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (
            f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        )
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
