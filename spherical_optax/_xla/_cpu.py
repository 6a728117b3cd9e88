"""Sums in a form for which XLA's CPU compiler needs few passes over memory.

For plain sums the compiler makes one pass each. With them, AdamSRT added 1.6 to 1.9 times the time
that Adam adds to a training step, and AdamG 2.2 to 2.3 times, in a trial that no command
reproduces. With these sums they add 1.0 to 1.2 and 1.1 to 1.2 times as much (JAX 0.10.2 and 0.12.0,
`make bench-train`). A test in `tests/xla/test_products.py` checks that there are fewer passes.
"""

import math

import jax

from spherical_optax._xla._leaf import Leaf, sums_together, viewed

CPU_ROWS = 16  # the compiler does not unroll and vectorize more rows
CPU_LOADS = 48  # the same limit for loaded entries, over all arrays
CPU_FEW = 1 << 19  # entries; smaller leaves stay in the caches, and plain sums compile faster
CPU_SUMS = 4  # fewer sums gain less than a tenth of the time that an optimizer adds


def parts_pay(leaf: Leaf) -> bool:
    """Whether `in_parts` saves anything."""
    large = math.prod(leaf.arrays[0].shape) >= CPU_FEW
    return large and len(leaf.pairs) >= CPU_SUMS and _rows(leaf) > 1


def _rows(leaf: Leaf) -> int:
    """How many rows to add up at a time: a divisor of their number, or 1 if none is in range."""
    summed, most = viewed(leaf).shape[1], min(CPU_ROWS, CPU_LOADS // len(leaf.arrays))
    return next((n for n in range(most, most // 2, -1) if summed % n == 0 and summed > n), 1)


def in_parts(leaf: Leaf) -> list[jax.Array]:
    """All sums: first over a few distant rows, in one kernel that reads each array once."""
    view, rows = viewed(leaf), _rows(leaf)
    outer, summed, _ = view.shape
    parts = [x.reshape(outer, rows, -1).astype(leaf.dtype) for x in leaf.arrays]
    sums = sums_together([parts[i] * parts[j] for i, j in leaf.pairs], (1,))
    shape, over = view.left(summed // rows)
    return [each.reshape(shape).sum(over) for each in sums]
