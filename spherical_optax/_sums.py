"""Several sums over a group in one pass over memory."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from spherical_optax import geometry
from spherical_optax.groups import RadialGroup
from spherical_optax.sharding import laid_out, manual_axes

Pair: TypeAlias = tuple[int, int]
"""The numbers of two arrays whose inner product is wanted."""

ROWS = 8  # more than 16 are not unrolled by XLA's CPU compiler, and not vectorized
LANES = 8  # columns that a contiguous axis is cut into
TILE, TILES = 1 << 15, 8  # entries, which the caches hold; at least so many, of a small array
WIDE = 1 << 14  # columns; above, XLA's CPU compiler makes even one sum slow, by 20 times
SMALL = 1 << 16  # entries; below, the loop costs more than the passes
UNROLLED = 31  # rows; up to so many XLA's GPU compiler adds several sums up in one kernel
FEW = 1 << 14  # entries; below, nothing is gained on a GPU


def inners(
    vectors: Sequence[dict[int, jax.Array]],
    pairs: Sequence[Pair],
    unit: Any,
    *,
    reduced: bool = False,
) -> list[Any]:
    """The inner products of a unit's groups for several pairs of vectors.

    As `geometry.inner` of each pair. XLA's CPU backend makes one pass for each, so there a loop
    does it here; its GPU backend makes several, or stores the products, so there rows are added
    up in parts. On TPU it is left to the compiler.

    Args:
      vectors: Each a dictionary from leaf number to array.
      pairs: Which vectors to multiply, by their position.
      unit: From leaf number to `RadialGroup`.
      reduced: Whether sums are made of what is returned, not only other values per group.

    Returns:
      One value per group for each pair, as from `geometry.inner`, all of the widest dtype.
    """
    accumulators = [geometry.accumulator(vector[i].dtype) for vector in vectors for i in unit]
    dtype = max(accumulators, key=lambda each: jnp.finfo(each).bits)
    totals: list[Any] = []
    for i, group in unit.items():
        sums = _of_leaf([vector[i] for vector in vectors], tuple(pairs), group, dtype, reduced)
        if totals:
            like = jax.typeof(totals[0])
            sums = [laid_out(value, like.shape, like.sharding) for value in sums]
            totals = [total + value for total, value in zip(totals, sums, strict=True)]
        else:
            totals = sums
    return totals


def _of_leaf(
    arrays: list[jax.Array],
    pairs: tuple[Pair, ...],
    group: RadialGroup,
    dtype: Any,
    reduced: bool,
) -> list[jax.Array]:
    def plainly(*arrays: jax.Array) -> list[jax.Array]:
        wide = [each.astype(dtype) for each in arrays]
        return [geometry.inner(wide[i], wide[j], group) for i, j in pairs]

    # An array over several devices would be gathered by the loop; inside shard_map what a loop
    # carries must vary over the same axes as what is added.
    if jax.device_count() > 1 or manual_axes():
        return plainly(*arrays)
    view = _view(arrays[0].shape, group)
    tiles, rows = _tiles(view), _rows(view)
    if len(pairs) == 1 and not (tiles and tiles.shape[-1] > WIDE):  # one pass already
        return plainly(*arrays)
    platforms: dict[str, Any] = {}
    if tiles:
        platforms["cpu"] = lambda *arrays: _in_tiles(arrays, pairs, group, dtype, view, tiles)
    if rows and len(pairs) > 1:
        platforms["cuda"] = lambda *arrays: _in_parts(
            arrays, pairs, group, dtype, view, rows, reduced
        )
    if not platforms:
        return plainly(*arrays)
    return lax.platform_dependent(*arrays, **platforms, default=plainly)


class View(NamedTuple):
    """An array as (outer, summed, columns): axes that index groups, that are summed, all others.

    Attributes:
      shape: Of the view.
      start: The array's first axis that is summed here.
      stop: The axis after the last one.
      whole: Whether the array is one group.
    """

    shape: tuple[int, int, int]
    start: int
    stop: int
    whole: bool


def _view(shape: tuple[int, ...], group: RadialGroup) -> View:
    ndim, axes = len(shape), group.axes(len(shape))
    start = next((axis for axis in range(ndim) if axis not in axes), ndim)
    stop = next((axis for axis in range(start, ndim) if axis in axes), ndim)
    if start == 0 and stop == ndim > 1:  # all is summed, the last axis at last
        stop = ndim - 1
    outer, summed, columns = (
        math.prod(part) for part in (shape[:start], shape[start:stop], shape[stop:])
    )
    return View((outer, summed, columns), start, stop, not axes)


def _more(view: View, ndim: int, group: RadialGroup) -> bool:
    """Whether anything is left to add up after the view's summed axes."""
    kept = ndim - (view.stop - view.start)
    return kept > len(group.axes(ndim)) or group.num_blocks is not None


def _finish(
    totals: Sequence[jax.Array], shape: tuple[int, ...], view: View, group: RadialGroup
) -> list[jax.Array]:
    """What is left to add up after the view's summed axes: other axes, and blocks."""
    kept = (*shape[: view.start], *shape[view.stop :])
    rest = _without(view.stop - view.start, len(shape), view, group)
    return [geometry.sum_groups(total.reshape(kept), rest) for total in totals]


def _without(removed: int, ndim: int, view: View, group: RadialGroup) -> RadialGroup:
    axes = (axis if axis < view.start else axis - removed for axis in group.axes(ndim))
    return RadialGroup(tuple(axes), group.num_blocks)


def _add(a: Any, b: Any) -> Any:
    return tuple(p + q for p, q in zip(a, b, strict=True))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def sums_together(arrays: Sequence[jax.Array], axis: int) -> Sequence[jax.Array]:
    """The sums of arrays of one shape over an axis, in one kernel."""
    zero = jnp.zeros((), arrays[0].dtype)
    return lax.reduce(tuple(arrays), (zero,) * len(arrays), _add, (axis,))


@sums_together.defjvp
def _sums_together_jvp(axis: int, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """As JAX's own rule, which in JAX 0.12 fails where one of several has no tangent."""
    return sums_together(*primals, axis), tuple(each.sum(axis) for each in tangents[0])


# --- on a GPU -----------------------------------------------------------------------------


def _rows(view: View) -> int | None:
    """How many rows to add up in one thread, if rows are worth splitting."""
    _, summed, columns = view.shape
    if view.whole or columns == 1 or summed <= UNROLLED or math.prod(view.shape) < FEW:
        return None
    rows = max(each for each in range(1, UNROLLED + 1) if summed % each == 0)
    return rows if rows >= 8 else None


def _in_parts(
    arrays: Sequence[jax.Array],
    pairs: tuple[Pair, ...],
    group: RadialGroup,
    dtype: Any,
    view: View,
    rows: int,
    reduced: bool = False,
) -> list[jax.Array]:
    """All sums of a few rows in one kernel, which reads each array once; then those of these."""
    outer, summed, columns = view.shape
    parts = [each.reshape(outer, summed // rows, rows, columns).astype(dtype) for each in arrays]
    sums = [(parts[i] * parts[j]).sum(2) for i, j in pairs]
    # The compiler would make one sum of the two, as they were written before.
    sums = lax.optimization_barrier(sums)
    if reduced or _more(view, len(arrays[0].shape), group):
        totals = sums_together(sums, 1)
        return _finish(totals, arrays[0].shape, view, group)
    # Again few at a time: the kernel that adds up can compute what follows of the totals, too.
    few = max(each for each in range(1, UNROLLED + 1) if summed // rows % each == 0)
    slices = [jnp.unstack(each.reshape(outer, -1, few, columns), axis=1) for each in sums]
    totals = [functools.reduce(jnp.add, (part.sum(1) for part in each)) for each in slices]
    return _finish(totals, arrays[0].shape, view, group)


def once(x: jax.Array) -> jax.Array:
    """The array as it is, which XLA's GPU compiler shall not compute again where it is used."""
    if x.ndim == 0:  # it would not, and might copy what is donated
        return x
    return lax.platform_dependent(x, cuda=lax.optimization_barrier, default=lambda x: x)


# --- on CPU -------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """How a view is cut.

    Attributes:
      shape: Of the view, with contiguous columns where it had one.
      tile: Of a tile. What is left over of the summed entries is in none.
      rows: In how many parts a tile's entries are added up first.
      folded: Whether the columns are parts of each sum: an axis that is contiguous is cut, as
        adding up along it is not vectorized.
    """

    shape: tuple[int, int, int]
    tile: tuple[int, int, int]
    rows: int
    folded: bool


def _tiles(view: View) -> Tiles | None:
    """How to cut an array, if it is worth it."""
    outer, summed, columns = view.shape
    size = math.prod(view.shape)
    folded = columns == 1
    if folded:
        columns = math.gcd(summed, LANES)
        summed //= columns
    rows = min(ROWS, summed)
    if size < SMALL or rows < (4 if folded else 2):
        return None
    entries = min(TILE, size // TILES)
    width = min(columns, entries // rows)
    least = math.ceil(summed * width / entries)
    height = max(summed // (least * rows), 1) * rows
    depth = 1
    if summed // height == 1 and width == columns:
        depth = min(outer, max(1, entries // (summed * columns)))
    return Tiles((outer, summed, columns), (depth, height, width), rows, folded)


def _in_tiles(
    arrays: Sequence[jax.Array],
    pairs: tuple[Pair, ...],
    group: RadialGroup,
    dtype: Any,
    view: View,
    tiles: Tiles,
) -> list[jax.Array]:
    (outer, summed, columns), (depth, height, width) = tiles.shape, tiles.tile
    down, across = summed // height, math.ceil(columns / width)

    def sums_of(corner: tuple[Any, ...]) -> jax.Array:
        tile = [
            lax.dynamic_slice(each, corner, tiles.tile)
            .reshape(depth, tiles.rows, -1, width)
            .astype(dtype)
            for each in views
        ]
        products = tuple(tile[i] * tile[j] for i, j in pairs)
        found = jnp.stack([each.sum(1) for each in sums_together(products, 1)])
        return found.sum(-1, keepdims=True) if tiles.folded else found

    def one_place(count: Any, totals: jax.Array) -> jax.Array:
        return totals + sums_of((0, count * height, 0))

    def all_places(count: Any, totals: jax.Array) -> jax.Array:
        row, place = count % down, count // down
        # Slices are clamped: the last one of an axis lies over the one before it.
        above, left = place // across * depth, place % across * width
        found = sums_of((above, row * height, left))
        if down > 1:
            so_far = lax.dynamic_slice(totals, (0, above, left), found.shape)
            found = found + jnp.where(row == 0, 0, so_far)
        return lax.dynamic_update_slice(totals, found, (0, above, left))

    views = [each.reshape(tiles.shape) for each in arrays]
    places = math.ceil(outer / depth) * across
    zeros = jnp.zeros((len(pairs), outer, 1 if tiles.folded else columns), dtype)
    totals = lax.fori_loop(0, places * down, all_places if places > 1 else one_place, zeros)

    shape, (start, stop) = arrays[0].shape, (view.start, view.stop)
    found = _finish(list(totals), shape, view, group)
    if down * height == summed:
        return found
    left_over = [
        each[:, down * height :].reshape(*shape[:start], -1, *shape[stop:]).astype(dtype)
        for each in views
    ]
    rest = _without(stop - start - 1, len(shape), view, group)
    return [
        total + geometry.inner(left_over[i], left_over[j], rest)
        for total, (i, j) in zip(found, pairs, strict=True)
    ]
