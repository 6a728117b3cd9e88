"""Accurate arithmetic: wide sums, roots and quotients at 0, Adam's bias correction."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from spherical_optax.groups import RadialGroup
from spherical_optax.sharding import index_sharding, laid_out


def accumulator(dtype: Any) -> Any:
    """The dtype in which to accumulate sums over a group of this dtype."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.float32


def wide(x: jax.Array) -> jax.Array:
    """The array in the dtype in which its sums accumulate, at least float32."""
    return x.astype(accumulator(x.dtype))


def sum_groups(products: jax.Array, group: RadialGroup) -> jax.Array:
    """The sum of each group's entries, shape `group.shape(products.shape)`."""
    axes = group.axes(products.ndim)
    total = jnp.sum(products, axis=tuple(i for i in range(products.ndim) if i not in axes))
    if group.num_blocks is not None:
        size = total.shape[-1] // group.num_blocks
        sharding = index_sharding(products, axes, split_last=True)
        total = laid_out(total, (*total.shape[:-1], group.num_blocks, size), sharding).sum(-1)
    return total


def safe_divide(a: jax.typing.ArrayLike, b: jax.Array) -> jax.Array:
    """The quotient a / b. Where b is 0, the value is 0 and the gradients are finite."""
    zero = b == 0
    return jnp.where(zero, 0, a / jnp.where(zero, 1, b))


def safe_sqrt(x: jax.Array) -> jax.Array:
    """The square root, with gradient 0 at 0."""
    zero = x == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


def bias_correction(decay: Any, count: jax.Array, like: jax.Array) -> jax.Array:
    """1 - decay^count, without cancellation."""
    log: Any = -math.inf
    if isinstance(decay, jax.Array):
        log = jnp.log(jnp.maximum(decay, 0.0))  # a schedule may end just below 0
    elif decay > 0:
        log = math.log(decay)
    return -jnp.expm1(count.astype(like.dtype) * log).astype(like.dtype)
