"""Sums as XLA's CPU compiler makes them in few passes over memory.

Left to itself it makes a pass for each sum. Inside a training step AdamSRT then added 1.6 to 1.9
times what Adam adds, AdamG 2.2 to 2.3, in a trial that no command prints; with these they add 1.0
to 1.2 and 1.1 to 1.2 (JAX 0.10.2 and 0.12.0, `make bench-train`). The test of fewer passes in
`tests/xla/test_products.py` notices.
"""

import math

import jax

from spherical_optax._xla._leaf import Leaf, sums_together, viewed

CPU_ROWS = 16  # more are not unrolled by the compiler, and not vectorized
CPU_LOADS = 48  # nor are more entries, of all arrays
CPU_FEW = 1 << 19  # entries; smaller leaves stay in the caches, and compile faster
CPU_SUMS = 4  # fewer gain less than a tenth of what an optimizer adds


def parts_pay(leaf: Leaf) -> bool:
    """Whether `in_parts` saves anything."""
    large = math.prod(leaf.arrays[0].shape) >= CPU_FEW
    return large and len(leaf.pairs) >= CPU_SUMS and _rows(leaf) > 1


def _rows(leaf: Leaf) -> int:
    """How many rows to add up at a time: a divisor of their number, 1 if there is none."""
    summed, most = viewed(leaf).shape[1], min(CPU_ROWS, CPU_LOADS // len(leaf.arrays))
    return next((n for n in range(most, most // 2, -1) if summed % n == 0 and summed > n), 1)


def in_parts(leaf: Leaf) -> list[jax.Array]:
    """All sums over a few rows, far apart, in one kernel that reads each array once."""
    view, rows = viewed(leaf), _rows(leaf)
    outer, summed, _ = view.shape
    parts = [x.reshape(outer, rows, -1).astype(leaf.dtype) for x in leaf.arrays]
    sums = sums_together([parts[i] * parts[j] for i, j in leaf.pairs], (1,))
    shape, over = view.left(summed // rows)
    return [each.reshape(shape).sum(over) for each in sums]
