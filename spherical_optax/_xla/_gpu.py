"""Sums as XLA's GPU compiler makes them with few kernels and few bytes.

Left to itself it makes one kernel for each sum, or stores the products: AdamSRT's step of the
ResNet18 tree moved 44.6 bytes a parameter on an H100 with plain sums, in a trial that no command
prints, and moves 33.3 with these (JAX 0.10.2, `make bench-compiled`).
`tests/benchmarks/test_compiled.py` notices.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from spherical_optax._xla._leaf import Leaf, sums_together, viewed

GPU_ROWS = 31  # up to so many, the compiler adds several sums up in one kernel
GPU_LAST = 16  # parts of a sum over a whole array, which need no kernel of their own
GPU_FEW = 1 << 14  # entries; below, nothing is gained


def parts_pay(leaf: Leaf) -> bool:
    """Whether `in_parts` saves anything."""
    _, summed, columns = shape = viewed(leaf).shape
    several = len(leaf.pairs) > 1 and columns > 1 and summed > GPU_ROWS
    return several and math.prod(shape) >= GPU_FEW


def in_parts(leaf: Leaf) -> list[jax.Array]:
    """All sums over a few rows, far apart, in one kernel that reads each array once; then the rest.

    The barrier keeps the compiler from making one sum of the two, as they were written before.
    """
    view = viewed(leaf)
    outer, summed, columns = view.shape
    rest = -(-summed // GPU_ROWS)
    rows = -(-summed // rest)

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(outer, summed, columns)
        if summed % rows:
            x = jnp.pad(x, ((0, 0), (0, rows * rest - summed), (0, 0)))
        return x.reshape(outer, rows, rest, columns).astype(leaf.dtype)

    parts = [split(x) for x in leaf.arrays]
    sums = lax.optimization_barrier([(parts[i] * parts[j]).sum(1) for i, j in leaf.pairs])
    shape, over = view.left(rest)
    if len(over) < len(shape):
        return list(sums_together([each.reshape(shape) for each in sums], over))
    # One group: its few last parts are added up by the kernel that computes with the sum.
    flat = [each.reshape(-1) for each in sums]
    flat = [jnp.pad(each, (0, -each.size % GPU_LAST)).reshape(GPU_LAST, -1) for each in flat]
    return [functools.reduce(jnp.add, jnp.unstack(each)) for each in sums_together(flat, (1,))]
