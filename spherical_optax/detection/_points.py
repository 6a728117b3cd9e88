"""The points at which gradients are taken: near the leaves' values, or random."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PERIOD = 1_000_003  # longer leaves repeat their random numbers; a prime, so that rows differ


def is_known(value: Any) -> bool:
    """Whether a leaf is an array of finite values, not an abstract array."""
    return not isinstance(value, jax.ShapeDtypeStruct) and bool(
        np.isfinite(np.asarray(value, np.float32)).all()
    )


def drawn(values: list[Any], number: int, near: bool, shrink: float) -> list[np.ndarray]:
    """The leaves at a point: near their values, or random. No entry is zero.

    A random kernel multiplies the size of its input by about one. A vector keeps its signs, because
    it may be the argument of a root or a logarithm. Entries of vectors that are zero, as in biases,
    become smaller than one, so that fewer neurons are dead.
    """
    rng = np.random.default_rng(number)

    def draw(value: Any) -> np.ndarray:
        shape = tuple(value.shape)
        known = not isinstance(value, jax.ShapeDtypeStruct)
        x: Any = np.asarray(value, np.float32) if known else np.zeros((), np.float32)
        if is_vector(shape):
            sign = rng.choice([-1.0, 1.0], size=shape)
            base = np.where(x == 0, 0.4 * sign, x if near else np.sign(x))
            return (base * rng.uniform(0.75, 1.5, shape)).astype(value.dtype)
        noise = _noise(shape, rng)
        scale = math.sqrt(np.mean(x**2)) if near and x.size else 0.0
        if scale > 0:
            x = x + np.float32(scale) * noise
        else:
            outputs = max(shape) if sum(size > 1 for size in shape) > 1 else 1
            scale = math.sqrt(12 * outputs / max(math.prod(shape), 1))
            x = np.float32(scale * shrink) * noise
        return x.astype(value.dtype, copy=False)

    return [draw(value) for value in values]


def _noise(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Uniform numbers from -1/2 to 1/2."""
    size = math.prod(shape)
    return np.resize(rng.random(min(size, PERIOD), np.float32) - np.float32(0.5), shape)


def jittered(point: list[np.ndarray]) -> list[np.ndarray]:
    """The point with every entry changed in its last digit."""
    rng = np.random.default_rng(0)

    def jitter(x: np.ndarray) -> np.ndarray:
        wide = np.promote_types(x.dtype, np.float32) if x.dtype.kind == "f" else np.float32
        noise = 2 * float(jnp.finfo(x.dtype).eps) * _noise(x.shape, rng).astype(wide, copy=False)
        return (x.astype(wide, copy=False) * (1 + noise)).astype(x.dtype, copy=False)

    return [jitter(x) for x in point]


def is_vector(shape: tuple[int, ...], others: Iterable[tuple[int, ...]] = ()) -> bool:
    """Whether a leaf is a bias or a scale, not a kernel.

    A leaf of shape `(n, 1)` is a kernel with one output, unless its module has a kernel with more
    axes. Then it is the bias of that kernel, as in Equinox's convolutions.
    """
    if len(shape) < 2:
        return True
    if sum(size > 1 for size in shape) > 1:
        return False
    return len(shape) > 2 or any(len(other) > 2 and not is_vector(other) for other in others)
