"""Values that the compiler must not recompute wherever they are used."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from spherical_optax.sharding import on_one_device


def materialize(x: jax.Array) -> jax.Array:
    """The array unchanged, but stored by XLA's GPU compiler if it is used twice.

    Otherwise, Adam's direction would be recomputed from its moments for each sum. AdamP's step of
    the ResNet18 tree then moved 53.0 bytes per parameter on an H100, in a trial that no command
    reproduces. With this it moves 49.0 (JAX 0.10.2, `make bench-compiled`).
    `tests/benchmarks/test_compiled.py` checks this.
    """
    return lax.platform_dependent(x, cuda=lax.optimization_barrier, default=lambda x: x)


def compute_once(values: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """Values per group, of one shape, that the compiler must not recompute for each entry.

    Only XLA's CPU compiler does this. It removes barriers before it fuses, but computes quotients
    once. So the values are divided by 1. In a trial that no command reproduces, the bare step of
    AdamG then took 1.2 times as long as Adam's, instead of 1.7 times (JAX 0.10.2). A test of values
    per group in `tests/transforms/test_adamsrt.py` checks this.
    """
    if not on_one_device():
        return values

    def on_cpu(*values: jax.Array) -> Sequence[jax.Array]:
        stack = jnp.stack(values)
        one = (stack == stack).astype(stack.dtype)  # always 1, or 0 for NaN, so XLA must divide
        return jnp.unstack(stack / one)

    return lax.platform_dependent(*values, cpu=on_cpu, default=lambda *values: values)
