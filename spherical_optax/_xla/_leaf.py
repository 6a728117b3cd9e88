"""A leaf with the sums to compute over it, and several sums in one kernel."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import custom_jvp, lax

from spherical_optax.groups import RadialGroup


class Leaf(NamedTuple):
    """The sums to compute over one leaf.

    Attributes:
      arrays: The array of this leaf in each vector.
      pairs: The positions of the arrays to multiply.
      group: The leaf's group.
      dtype: The dtype of the sums.
    """

    arrays: Sequence[jax.Array]
    pairs: tuple[tuple[int, int], ...]
    group: RadialGroup
    dtype: Any


class View(NamedTuple):
    """An array with three axes: outer (before the summed axes), summed, and columns (the rest).

    Attributes:
      leaf: The leaf of the array.
      start: The first axis that is summed in this view.
      stop: The axis after the last one that is summed.
      shape: The shape of the view.
    """

    leaf: Leaf
    start: int
    stop: int
    shape: tuple[int, int, int]

    def left(self, rows: int) -> tuple[list[int], tuple[int, ...]]:
        """The shape and the axes of the sums that are left once the summed axes are `rows` rows.

        In the shape, blocks have an axis of their own.
        """
        (group, shape), size = (self.leaf.group, self.leaf.arrays[0].shape), self.stop - self.start
        kept = [*shape[: self.start], rows, *shape[self.stop :]]
        axes = [axis if axis < self.start else axis - size + 1 for axis in group.axes(len(shape))]
        if group.num_blocks is not None:
            last = axes[-1]
            kept[last : last + 1] = [group.num_blocks, kept[last] // group.num_blocks]
        return kept, tuple(axis for axis in range(len(kept)) if axis not in axes)


def viewed(leaf: Leaf) -> View:
    """The view in which a leaf is summed."""
    shape = leaf.arrays[0].shape
    ndim, axes = len(shape), leaf.group.axes(len(shape))
    start = next((axis for axis in range(ndim) if axis not in axes), ndim)
    stop = next((axis for axis in range(start, ndim) if axis in axes), ndim)
    if start == 0 and stop == ndim > 1:  # all axes are summed, the last one last
        stop = ndim - 1
    parts = (shape[:start], shape[start:stop], shape[stop:])
    outer, summed, columns = map(math.prod, parts)
    return View(leaf, start, stop, (outer, summed, columns))


def sums_together(arrays: Sequence[jax.Array], axes: tuple[int, ...]) -> Sequence[jax.Array]:
    """The sums of arrays of one shape over some axes, in one kernel."""

    @custom_jvp
    def sums(*arrays: jax.Array) -> Sequence[jax.Array]:
        zeros = (jnp.zeros((), arrays[0].dtype),) * len(arrays)
        return lax.reduce(arrays, zeros, _add, axes)

    @sums.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Any, Any]:
        # In 0.12, JAX's own rule fails if one of several arrays has no tangent.
        return sums(*primals), tuple(each.sum(axes) for each in tangents)

    return sums(*arrays)


def _add(a: Any, b: Any) -> Any:
    return tuple(p + q for p, q in zip(a, b, strict=True))
