"""Values that a compiler shall not compute again wherever they are used."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from spherical_optax.sharding import on_one_device


def materialize(x: jax.Array) -> jax.Array:
    """The array as it is, which XLA's GPU compiler shall store where it is used twice.

    Adam's direction would be made of its moments again for each sum: AdamP's step of the ResNet18
    tree moved 53.0 bytes a parameter on an H100 without this, in a trial that no command prints,
    and moves 49.0 (JAX 0.10.2, `make bench-compiled`). `tests/benchmarks/test_compiled.py` notices.
    """
    return lax.platform_dependent(x, cuda=lax.optimization_barrier, default=lambda x: x)


def compute_once(values: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """Values per group, of one shape, which no compiler shall compute again for each entry.

    Only XLA's CPU compiler does. Barriers are gone when it fuses, but quotients it computes once.
    In a trial that no command prints the bare step of AdamG took 1.2 times Adam's in place of 1.7
    (JAX 0.10.2). A test of what groups share, in `tests/transforms/test_adamsrt.py`, notices.
    """
    if not on_one_device():
        return values

    def on_cpu(*values: jax.Array) -> Sequence[jax.Array]:
        stack = jnp.stack(values)
        one = (stack == stack).astype(stack.dtype)  # as far as XLA knows it may be 0, where NaN is
        return jnp.unstack(stack / one)

    return lax.platform_dependent(*values, cpu=on_cpu, default=lambda *values: values)
