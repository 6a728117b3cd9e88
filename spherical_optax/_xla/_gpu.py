"""Sums in a form for which XLA's GPU compiler makes few kernels that move few bytes.

For plain sums the compiler makes one kernel each, or stores the products. With them, AdamSRT's step
of the ResNet18 tree moved 44.6 bytes per parameter on an H100, in a trial that no command
reproduces. With these sums it moves 33.3 (JAX 0.10.2, `make bench-compiled`).
`tests/benchmarks/test_compiled.py` checks this.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from spherical_optax._xla._leaf import Leaf, sums_together, viewed

GPU_ROWS = 31  # up to this many rows, the compiler computes several sums in one kernel
GPU_LAST = 16  # last parts of a sum over a whole array that need no kernel of their own
GPU_FEW = 1 << 14  # entries; smaller leaves gain nothing


def parts_pay(leaf: Leaf) -> bool:
    """Whether `in_parts` saves anything."""
    _, summed, columns = shape = viewed(leaf).shape
    several = len(leaf.pairs) > 1 and columns > 1 and summed > GPU_ROWS
    return several and math.prod(shape) >= GPU_FEW


def in_parts(leaf: Leaf) -> list[jax.Array]:
    """All sums: first over a few distant rows, in one kernel that reads each array once.

    The barrier keeps the compiler from merging this stage with the sums over the other rows.
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
    # One group: the kernel that uses the sum also adds up its last few parts.
    flat = [each.reshape(-1) for each in sums]
    flat = [jnp.pad(each, (0, -each.size % GPU_LAST)).reshape(GPU_LAST, -1) for each in flat]
    return [functools.reduce(jnp.add, jnp.unstack(each)) for each in sums_together(flat, (1,))]
