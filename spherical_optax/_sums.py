"""Several sums over a group in one pass over memory."""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from spherical_optax import geometry
from spherical_optax.groups import RadialGroup
from spherical_optax.sharding import laid_out

Pair: TypeAlias = tuple[int, int]
"""The numbers of two arrays whose inner product is wanted."""

ROWS = 8  # more than 16 are not unrolled by XLA's CPU compiler, and not vectorized
BLOCKS, BLOCK = 8, 1 << 17  # at least so many, which bounds temporary memory; entries of one
SMALL = 1 << 16  # entries; below, the loop costs more than the passes


def inners(vectors: Sequence[dict[int, jax.Array]], pairs: Sequence[Pair], unit: Any) -> list[Any]:
    """The inner products of a unit's groups for several pairs of vectors.

    As `geometry.inner` of each pair. On GPU and TPU the compiler reads each array once for
    all of them; its CPU backend makes one pass for each, so there a loop does it here.

    Args:
      vectors: Each a dictionary from leaf number to array.
      pairs: Which vectors to multiply, by their position.
      unit: From leaf number to `RadialGroup`.

    Returns:
      One value per group for each pair, as from `geometry.inner`, all of the widest dtype.
    """
    accumulators = [geometry.accumulator(vector[i].dtype) for vector in vectors for i in unit]
    dtype = max(accumulators, key=lambda each: jnp.finfo(each).bits)
    totals: list[Any] = []
    for i, group in unit.items():
        sums = _of_leaf([vector[i] for vector in vectors], tuple(pairs), group, dtype)
        if totals:
            like = jax.typeof(totals[0])
            sums = [laid_out(value, like.shape, like.sharding) for value in sums]
            totals = [total + value for total, value in zip(totals, sums, strict=True)]
        else:
            totals = sums
    return totals


def _of_leaf(
    arrays: list[jax.Array], pairs: tuple[Pair, ...], group: RadialGroup, dtype: Any
) -> list[jax.Array]:
    def plainly(*arrays: jax.Array) -> list[jax.Array]:
        wide = [each.astype(dtype) for each in arrays]
        return [geometry.inner(wide[i], wide[j], group) for i, j in pairs]

    view = _blocks(arrays[0].shape, group)
    # An array over several devices would be gathered by the loop.
    if jax.device_count() > 1 or view is None:
        return plainly(*arrays)

    def in_blocks(*arrays: jax.Array) -> list[jax.Array]:
        return _in_blocks(arrays, pairs, group, dtype, view)

    return lax.platform_dependent(*arrays, cpu=in_blocks, default=plainly)


def _blocks(shape: tuple[int, ...], group: RadialGroup) -> tuple[int, int, int, int] | None:
    """The shape (blocks, ROWS, rows, columns) to view an array as, if it is worth it.

    The leading axes that are summed are split; the others are columns.
    """
    leading = _leading(group, len(shape))
    rows = math.prod(shape[:leading])
    if math.prod(shape) < SMALL or rows % ROWS != 0:
        return None
    least = max(BLOCKS, math.prod(shape) // BLOCK)
    blocks = next((n for n in range(least, 4 * least) if rows // ROWS % n == 0), None)
    if blocks is None:
        return None
    return blocks, ROWS, rows // ROWS // blocks, math.prod(shape[leading:])


def _leading(group: RadialGroup, ndim: int) -> int:
    """How many leading axes are summed, all but the last axis at most."""
    return min((*group.axes(ndim), ndim - 1))


def _in_blocks(
    arrays: Sequence[jax.Array],
    pairs: tuple[Pair, ...],
    group: RadialGroup,
    dtype: Any,
    view: tuple[int, int, int, int],
) -> list[jax.Array]:
    shape = arrays[0].shape
    leading = _leading(group, len(shape))
    zero = jnp.zeros((), dtype)

    def add(a: Any, b: Any) -> Any:
        return tuple(p + q for p, q in zip(a, b, strict=True))

    def body(totals: Any, block: Any) -> Any:
        block = [each.astype(dtype) for each in block]
        products = tuple(block[i] * block[j] for i, j in pairs)
        sums = lax.reduce(products, (zero,) * len(pairs), add, (0,))
        return totals + jnp.stack([each.sum(0) for each in sums]), None

    start = jnp.zeros((len(pairs), view[-1]), dtype)
    totals, _ = lax.scan(body, start, tuple(each.reshape(view) for each in arrays))
    rest = RadialGroup(tuple(axis - leading for axis in group.axes(len(shape))), group.num_blocks)
    return [geometry.sum_groups(total.reshape(shape[leading:]), rest) for total in totals]
