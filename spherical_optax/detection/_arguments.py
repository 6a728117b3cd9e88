"""The arguments of `fn`: constant inputs hide effects of the weights, so they are varied."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spherical_optax.detection import _flow


def is_floating(value: Any) -> bool:
    """Whether a leaf is an array of real floating numbers, possibly an abstract one."""
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating)


def varied(
    args: tuple[Any, ...], of: Callable[..., Any], shapes: list[Any]
) -> tuple[tuple[Any, ...], list[str]]:
    """The arguments with constant inputs varied, and descriptions of these inputs.

    The statistics of a constant batch hide effects of the weights. Signs are kept, because an input
    may be the argument of a root or a logarithm. A constant that is not an input, such as a mask or
    a noise level, is not varied.
    """
    treedef: Any
    leaves, treedef = jax.tree.flatten(args)
    constant = [n for n, arg in enumerate(leaves) if _is_constant(arg)]
    if not constant:
        return args, []

    def fn(point: list[Any], arrays: list[Any]) -> Any:
        return of(treedef.unflatten(_put(leaves, constant, arrays)), point)

    try:
        program = jax.make_jaxpr(fn)(shapes, [leaves[n] for n in constant])
    except Exception:  # an error of fn is reported later, when fn is traced unchanged
        return args, []
    inputs = [constant[n] for n in sorted(_flow.inputs(program, len(shapes)))]
    rng = np.random.default_rng(0)
    new = []
    for arg in (leaves[n] for n in inputs):
        zero = not bool(arg.ravel()[0])
        noise = rng.standard_normal(arg.shape) if zero else rng.uniform(0.5, 1.5, arg.shape)
        new.append(jnp.asarray(noise if zero else np.asarray(arg, np.float64) * noise, arg.dtype))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(args)]
    names = [f"args{paths[n]} of shape {leaves[n].shape}" for n in inputs]
    return treedef.unflatten(_put(leaves, inputs, new)), names


def _put(leaves: list[Any], numbers: list[int], values: list[Any]) -> list[Any]:
    others = dict(zip(numbers, values, strict=True))
    return [others.get(n, leaf) for n, leaf in enumerate(leaves)]


def _is_constant(arg: Any) -> bool:
    """Whether this is a floating array of two or more axes whose entries are all equal."""
    if not (isinstance(arg, jax.Array | np.ndarray) and is_floating(arg) and arg.ndim > 1):
        return False
    if isinstance(arg, jax.core.Tracer) or arg.size < 2:
        return False
    return bool((arg == arg.ravel()[0]).all())
