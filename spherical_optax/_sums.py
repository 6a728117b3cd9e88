"""Several sums over a group in one pass over memory."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from spherical_optax import geometry
from spherical_optax.groups import RadialGroup
from spherical_optax.sharding import laid_out, on_one_device

Pair: TypeAlias = tuple[int, int]
"""The numbers of two arrays whose inner product is wanted."""

ROWS = 16  # more are not unrolled by XLA's CPU compiler, and not vectorized
LOADS = 48  # nor are more entries, of all arrays
TURNS = 16  # of the loop that goes over the large arrays on a CPU
WIDE = 1 << 14  # columns; above, XLA's CPU compiler makes even one sum slow, by 20 times
SMALL = 1 << 16  # entries; below, nothing is gained on a CPU
UNROLLED = 31  # rows; up to so many XLA's GPU compiler adds several sums up in one kernel
SLICE = 20  # of such sums; found by trying: with 15 or 31 it makes several kernels
FEW = 1 << 14  # entries; below, nothing is gained on a GPU


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Remade:
    """An array that can be made again of others, entry by entry.

    Attributes:
      value: The array.
      parts: The others, of its shape.
      numbers: What else it is made of.
      make: From such arrays, of any one shape, and the numbers to it.
      stored: Whether it is stored on a GPU; on a CPU it is not.
    """

    value: jax.Array
    parts: list[jax.Array]
    numbers: list[jax.Array]
    make: Callable[..., jax.Array] = dataclasses.field(metadata={"static": True})
    stored: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape


class Wanted(NamedTuple):
    """Inner products of a unit's groups.

    Attributes:
      vectors: Each a dictionary from leaf number to array, or how it is made again.
      pairs: Which vectors to multiply, by their position.
      unit: From leaf number to `RadialGroup`.
      reduced: Whether sums are made of the products, not only other values per group.
    """

    vectors: Sequence[Mapping[int, jax.Array | Remade]]
    pairs: Sequence[Pair]
    unit: Mapping[int, RadialGroup]
    reduced: bool = False


def inners(wanted: Sequence[Wanted]) -> list[list[Any]]:
    """The inner products of several units, as `geometry.inner` of each pair.

    XLA's CPU backend makes one pass over memory for each, its GPU backend several, or it stores
    the products. So rows are added up in parts, few at a time, for all products together; on a
    CPU in a loop over all units, so that the parts stay in the caches, and all cores work. On
    TPU it is left to the compiler.

    Returns:
      For each unit one value per group for each pair, all of the widest dtype.
    """
    leaves = []
    for each in wanted:
        arrays = [vector[i] for vector in each.vectors for i in each.unit]
        accumulators = [geometry.accumulator(array.dtype) for array in arrays]
        dtype = max(accumulators, key=lambda each: jnp.finfo(each).bits)
        for i, group in each.unit.items():
            arrays = [vector[i] for vector in each.vectors]
            view = _view(arrays[0].shape, group)
            leaves.append(_Leaf(arrays, tuple(each.pairs), group, dtype, view, each.reduced))
    sums = iter(_of_leaves(leaves))
    return [_total([next(sums) for _ in each.unit]) for each in wanted]


def _total(of_leaves: list[list[jax.Array]]) -> list[jax.Array]:
    """The sums over all leaves of a unit."""
    totals, *others = of_leaves
    for sums in others:
        like = jax.typeof(totals[0])
        sums = [laid_out(value, like.shape, like.sharding) for value in sums]
        totals = _added(totals, sums)
    return totals


class _Leaf(NamedTuple):
    """What is wanted of one leaf, and the view in which it is added up."""

    arrays: Sequence[jax.Array | Remade]
    pairs: tuple[Pair, ...]
    group: RadialGroup
    dtype: Any
    view: "View"
    reduced: bool


def _of_leaves(leaves: list[_Leaf]) -> list[list[jax.Array]]:
    # Parts of an array over several devices may lie on more than one.
    parted = [n for n, leaf in enumerate(leaves) if on_one_device() and _is_parted(leaf)]
    found = {n: _plainly(leaf) for n, leaf in enumerate(leaves) if n not in parted}

    def on(platform: Callable[[list[_Leaf]], Any]) -> Callable[..., Any]:
        def sums(*arrays: Sequence[jax.Array]) -> Any:
            pairs = zip(parted, arrays, strict=True)
            return platform([leaves[n]._replace(arrays=own) for n, own in pairs])

        return sums

    if parted:
        arrays = [leaves[n].arrays for n in parted]
        default = on(lambda leaves: [_plainly(leaf) for leaf in leaves])
        platforms = {"cpu": on(_on_cpu), "cuda": on(_on_gpu)}
        sums = lax.platform_dependent(*arrays, **platforms, default=default)
        found |= zip(parted, sums, strict=True)
    return [found[n] for n in range(len(leaves))]


def _is_parted(leaf: _Leaf) -> bool:
    return _is_large(leaf) or _rows(leaf) is not None


def _value(x: jax.Array | Remade) -> jax.Array:
    return x.value if isinstance(x, Remade) else x


def _plainly(leaf: _Leaf) -> list[jax.Array]:
    wide = [_value(each).astype(leaf.dtype) for each in leaf.arrays]
    return [geometry.inner(wide[i], wide[j], leaf.group) for i, j in leaf.pairs]


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


def _more(leaf: _Leaf) -> bool:
    """Whether anything is left to add up after the view's summed axes."""
    ndim, view = len(leaf.arrays[0].shape), leaf.view
    kept = ndim - (view.stop - view.start)
    return kept > len(leaf.group.axes(ndim)) or leaf.group.num_blocks is not None


def _finish(leaf: _Leaf, totals: Sequence[jax.Array]) -> list[jax.Array]:
    """What is left to add up after the view's summed axes: other axes, and blocks."""
    shape, (_, start, stop, _) = leaf.arrays[0].shape, leaf.view
    kept = (*shape[:start], *shape[stop:])
    axes = leaf.group.axes(len(shape))
    rest = tuple(axis if axis < start else axis - (stop - start) for axis in axes)
    group = RadialGroup(rest, leaf.group.num_blocks)
    return [geometry.sum_groups(total.reshape(kept), group) for total in totals]


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


def _rows(leaf: _Leaf) -> int | None:
    """How many rows to add up at a time, if rows are worth splitting."""
    view = leaf.view
    _, summed, columns = view.shape
    if any(map(_not_stored, leaf.arrays)):
        return _block(view)
    if view.whole or columns == 1 or summed <= UNROLLED or math.prod(view.shape) < FEW:
        return None
    return -(-summed // -(-summed // UNROLLED)) if len(leaf.pairs) > 1 else None


def _block(view: View) -> int | None:
    """How many rows a block of threads adds up, in the kernel that makes one of the arrays.

    In blocks of fewer rows, or where there are few blocks, the compiler stores the array.
    """
    _, summed, columns = view.shape
    if columns == 1:
        return summed
    most = min(128, math.isqrt(math.prod(view.shape) // 128))
    return max((each for each in range(32, most + 1) if summed % each == 0), default=None)


def _not_stored(x: jax.Array | Remade) -> bool:
    return isinstance(x, Remade) and not x.stored


def _on_gpu(leaves: list[_Leaf]) -> list[list[jax.Array]]:
    rows = map(_rows, leaves)
    pairs = zip(leaves, rows, strict=True)
    return [_in_parts(leaf, each) if each else _plainly(leaf) for leaf, each in pairs]


def _in_parts(leaf: _Leaf, rows: int) -> list[jax.Array]:
    """All sums of a few rows in one kernel, which reads each array once; then those of these."""
    viewed = (_value(x).reshape(leaf.view.shape) for x in leaf.arrays)
    parts = [_split(x, rows).astype(leaf.dtype) for x in viewed]
    if any(map(_not_stored, leaf.arrays)):
        sums = _in_blocks(leaf, parts)
    else:
        sums = [(parts[i] * parts[j]).sum(2) for i, j in leaf.pairs]
    # The compiler would make one sum of the two, as they were written before.
    sums = lax.optimization_barrier(sums)
    if leaf.reduced or _more(leaf):
        return _finish(leaf, sums_together(sums, 1))
    while sums[0].shape[1] > UNROLLED**2:
        sums = list(sums_together([_split(each, UNROLLED) for each in sums], 2))
        sums = lax.optimization_barrier(sums)
    # Again few at a time: the kernel that adds up can compute what follows of the totals, too.
    few = [jnp.unstack(_split(each, min(each.shape[1], SLICE)), axis=1) for each in sums]
    totals = [functools.reduce(jnp.add, (part.sum(1) for part in each)) for each in few]
    return _finish(leaf, totals)


def _in_blocks(leaf: _Leaf, parts: list[jax.Array]) -> list[jax.Array]:
    """Sums with arrays that are not stored, in the kernel that makes these.

    The threads of a block share memory, which is enough for two sums over rows.
    """
    at_once = 2 if leaf.view.shape[-1] > 1 else len(leaf.pairs)
    pairs = sorted(leaf.pairs, key=lambda pair: all(not _not_stored(leaf.arrays[i]) for i in pair))
    found: dict[Pair, jax.Array] = {}
    for start in range(0, len(pairs), at_once):
        some = pairs[start : start + at_once]
        found |= zip(some, sums_together([parts[i] * parts[j] for i, j in some], 2), strict=True)
    return [found[pair] for pair in leaf.pairs]


def _split(x: jax.Array, rows: int) -> jax.Array:
    """From (outer, summed, columns) to (outer, parts, rows, columns), with zeros at the end."""
    outer, summed, columns = x.shape
    if summed % rows:
        x = jnp.pad(x, ((0, 0), (0, -summed % rows), (0, 0)))
    return x.reshape(outer, -1, rows, columns)


# --- what is computed once ------------------------------------------------------------------


def once(x: jax.Array) -> jax.Array:
    """The array as it is, which XLA's GPU compiler shall not compute again where it is used."""
    return lax.platform_dependent(x, cuda=lax.optimization_barrier, default=lambda x: x)


def each_once(values: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """Values per group, of one shape, which no compiler shall compute again for each entry.

    On a CPU barriers are gone when XLA fuses, but quotients are computed once.
    """

    def on_cpu(*values: jax.Array) -> Sequence[jax.Array]:
        if not on_one_device():
            return values
        stack = jnp.stack(values)
        one = (stack == stack).astype(stack.dtype)  # as far as XLA knows it may be 0, where NaN is
        return jnp.unstack(stack / one)

    def on_gpu(*values: jax.Array) -> Sequence[jax.Array]:
        return tuple(lax.optimization_barrier(each) for each in values)

    def on_others(*values: jax.Array) -> Sequence[jax.Array]:
        return values

    return lax.platform_dependent(*values, cpu=on_cpu, cuda=on_gpu, default=on_others)


def for_sums(x: Remade, group: RadialGroup) -> Remade:
    """The array as the sums over its groups want it: on a GPU stored, or not."""
    if _block(_view(x.shape, group)):
        return dataclasses.replace(x, stored=False)
    return dataclasses.replace(x, value=once(x.value))


def again(x: jax.Array | Remade) -> jax.Array:
    """The array, made again where it is not stored."""
    if not isinstance(x, Remade):
        return x

    def on_gpu(x: Remade) -> jax.Array:
        # Behind the barrier it is another array to the compiler, which else would store one.
        return x.value if x.stored else x.make(lax.optimization_barrier(x.parts), x.numbers)

    def on_cpu(x: Remade) -> jax.Array:
        return x.make(x.parts, x.numbers)

    return lax.platform_dependent(x, cpu=on_cpu, cuda=on_gpu, default=_value)


# --- on CPU -------------------------------------------------------------------------------


class _Job(NamedTuple):
    """A leaf's part in the loop over all large leaves.

    Attributes:
      start: What it carries at first.
      step: From the number of the turn, and what is carried, to what is carried then.
      end: From what is carried at last to the sums over the view's rows.
    """

    start: list[jax.Array]
    step: Callable[[Any, list[jax.Array]], list[jax.Array]]
    end: Callable[[list[jax.Array]], list[jax.Array]]


def _is_large(leaf: _Leaf) -> bool:
    """Whether one pass over memory for each sum would cost more."""
    several = len(leaf.pairs) > 1 or leaf.view.shape[-1] > WIDE
    return several and math.prod(leaf.view.shape) >= SMALL


def _on_cpu(leaves: list[_Leaf]) -> list[list[jax.Array]]:
    """All sums, those of large leaves in one loop, in whose turns all cores find work."""
    found: list[Any] = [None] * len(leaves)
    jobs: dict[int, _Job] = {}
    for n, leaf in enumerate(leaves):
        if not _is_large(leaf):
            found[n] = _plainly(leaf)
        elif job := _job(leaf):
            jobs[n] = job
        else:
            flat = _flat(leaf)
            sums = _in_turn(_products(leaf, flat), leaf.view.shape[-1], _most(flat))
            found[n] = _finish(leaf, sums)

    def turn(count: Any, carried: dict[int, list[jax.Array]]) -> dict[int, list[jax.Array]]:
        return {n: job.step(count, carried[n]) for n, job in jobs.items()}

    carried = {n: job.start for n, job in jobs.items()}
    carried = lax.fori_loop(0, TURNS, turn, carried) if jobs else {}
    for n, job in jobs.items():
        found[n] = _finish(leaves[n], job.end(carried[n]))
    return found


def _job(leaf: _Leaf) -> _Job | None:
    """How a leaf is cut in turns, if it can be."""
    outer, summed, _ = leaf.view.shape
    if outer >= TURNS:
        return _by_groups(leaf)
    return _by_rows(leaf) if summed >= TURNS * ROWS // 2 else None


def _by_rows(leaf: _Leaf) -> _Job:
    """Adds up a few rows of each group in a turn."""
    (outer, summed, columns), flat = leaf.view.shape, _flat(leaf)
    most = _most(flat)
    rows = max(range(most // 2, most + 1), key=lambda each: (summed // (TURNS * each) * each, each))
    entries = summed // (TURNS * rows) * columns
    used = TURNS * rows * entries

    def step(count: Any, totals: list[jax.Array]) -> list[jax.Array]:
        size = rows * entries
        parts = [lax.dynamic_slice_in_dim(x, count * size, size, 1) for x in flat]
        parts = [x.reshape(outer, rows, entries) for x in parts]
        return _added(totals, _over_rows(_products(leaf, parts)))

    def end(totals: list[jax.Array]) -> list[jax.Array]:
        sums, rest = _in_turn(totals, columns), [x[:, used:] for x in flat]
        more = _in_turn(_products(leaf, rest), columns, most) if rest[0].size else None
        return _added(sums, more) if more else sums

    zeros = jnp.zeros((outer, entries), leaf.dtype)
    return _Job([zeros] * len(leaf.pairs), step, end)


def _by_groups(leaf: _Leaf) -> _Job:
    """Adds up all rows of a few groups in a turn."""
    (outer, _, columns), flat = leaf.view.shape, _flat(leaf)
    size, most = outer // TURNS, _most(flat)

    def placed(totals: list[jax.Array], parts: list[jax.Array], start: Any) -> list[jax.Array]:
        sums = zip(totals, _in_turn(_products(leaf, parts), columns, most), strict=True)
        return [lax.dynamic_update_slice_in_dim(total, each, start, 0) for total, each in sums]

    def step(count: Any, totals: list[jax.Array]) -> list[jax.Array]:
        parts = [lax.dynamic_slice_in_dim(x, count * size, size, 0) for x in flat]
        return placed(totals, parts, count * size)

    def end(totals: list[jax.Array]) -> list[jax.Array]:
        rest = [x[TURNS * size :] for x in flat]
        return placed(totals, rest, TURNS * size) if rest[0].size else totals

    zeros = jnp.zeros((outer, columns), leaf.dtype)
    return _Job([zeros] * len(leaf.pairs), step, end)


def _most(flat: Sequence[jax.Array]) -> int:
    """How many rows of so many arrays to add up in one kernel."""
    return min(ROWS, max(2, LOADS // len(flat)))


def _in_turn(terms: Sequence[jax.Array], columns: int, most: int = ROWS) -> list[jax.Array]:
    """Sums over rows: of a few, far apart, in one kernel; then, in the same way, of what is left.

    Args:
      terms: Of shape (outer, rows times columns).
      columns: Entries of a row.
      most: How many rows to add up in the first kernel.
    """
    left_over = []
    while (summed := terms[0].shape[1] // columns) > 1:
        divisors = (each for each in range(most, most // 2 - 1, -1) if summed % each == 0)
        rows = next(divisors, min(most, summed))
        used = summed // rows * rows * columns
        if summed % rows:
            left_over.append(_in_turn([x[:, used:] for x in terms], columns, most))
        parts = [x[:, :used].reshape(x.shape[0], rows, -1) for x in terms]
        terms, most = _over_rows(parts), ROWS
    return functools.reduce(_added, left_over, list(terms))


def _over_rows(parts: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """Sums over the middle axis, of few rows, in one kernel that is fast for many columns, too."""
    if len(parts) == 1:
        return [functools.reduce(jnp.add, jnp.unstack(parts[0], axis=1))]
    return sums_together(parts, 1)


def _flat(leaf: _Leaf) -> list[jax.Array]:
    parts = [part for x in leaf.arrays for part in (x.parts if isinstance(x, Remade) else [x])]
    return [part.reshape(leaf.view.shape[0], -1) for part in parts]


def _products(leaf: _Leaf, flat: Sequence[jax.Array]) -> list[jax.Array]:
    """The products of a leaf's arrays, of corresponding pieces of what `_flat` returns."""
    pieces = iter(flat)
    made = [
        x.make([next(pieces) for _ in x.parts], x.numbers)
        if isinstance(x, Remade)
        else next(pieces)
        for x in leaf.arrays
    ]
    wide = [x.astype(leaf.dtype) for x in made]
    return [wide[i] * wide[j] for i, j in leaf.pairs]


def _added(totals: Sequence[jax.Array], more: Sequence[jax.Array]) -> list[jax.Array]:
    return [total + each for total, each in zip(totals, more, strict=True)]
