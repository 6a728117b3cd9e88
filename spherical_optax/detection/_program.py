"""The forward pass as a traced program, with its epsilons made smaller.

A normalization layer adds a small epsilon to a variance. Epsilon alone keeps the layer before it
from being exactly invariant, and the disturbance depends on the size of the variance. In the
program, epsilon is a literal. Once it is made smaller there, it shows at any scale of the
parameters whether a leaf is invariant.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend import core

EPSILON = 1e-2  # the largest constant that is taken for an epsilon; Keras's BatchNorm has 1e-3
SMALLER = 1e-6  # a factor; not zero, because the variance of a constant channel is rounding error


def trace(
    who: str, forward: Callable[[Any], list[jax.Array]], point: Any, further: int
) -> core.ClosedJaxpr:
    """Traces the forward pass twice. It must run, return outputs, and be the same both times.

    `forward` maps a point, of arrays or their shapes, to the floating outputs. `further` is the
    number of arguments that `fn` was given after params.
    """
    try:
        # A new function each time, because JAX caches the trace of a function.
        traces = [jax.make_jaxpr(lambda point: forward(point))(point) for _ in range(2)]
    except TypeError as error:
        if not re.search(r"positional argument|keyword argument|arguments? but", str(error)):
            raise  # an error in the body of fn
        raise TypeError(
            f"{who}: fn(params, *args) was called with params and {further} further arguments "
            f"and raised: {error}. Pass what fn needs after params, or bind it: "
            "lambda params, x: model.apply({'params': params}, x, train=True)."
        ) from error
    except Exception as error:
        if type(error).__name__ != "TraceContextError":  # flax.errors; flax is not required
            raise
        raise ValueError(
            f"{who}: fn mutates variables made outside of it: {error}. Make them inside fn with "
            "nnx.merge(graphdef, params, rest, copy=True)."
        ) from error
    if not traces[0].out_avals:
        raise ValueError(
            f"{who}: expected fn to return the network's outputs, found no floating array among "
            "its results."
        )
    texts = [re.sub(r" at 0x[0-9a-f]+", "", str(trace.jaxpr)) for trace in traces]
    same = texts[0] == texts[1] and len(traces[0].consts) == len(traces[1].consts)
    for a, b in zip(traces[0].consts, traces[1].consts, strict=False):
        same = same and a.shape == b.shape and a.dtype == b.dtype and _same_values(a, b)
    if not same:
        raise ValueError(
            f"{who}: expected the same outputs from the same arguments, found that two calls of fn "
            "differ. Turn dropout off, or give it a fixed key."
        )
    return traces[0]


def _same_values(a: Any, b: Any) -> bool:
    if jax.numpy.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return a is b or bool(np.array_equal(np.asarray(a), np.asarray(b)))


def without_epsilon(program: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """The program with the small constants in its additions made even smaller."""
    return _rewritten(program)


def _rewritten(value: Any) -> Any:
    """Rewrites a program, or a parameter of an operation that may hold programs."""
    if isinstance(value, tuple | list) and any(
        isinstance(inner, core.ClosedJaxpr | core.Jaxpr) for inner in value
    ):
        return type(value)(map(_rewritten, value))
    if not isinstance(value, core.Jaxpr):  # a ClosedJaxpr is a Jaxpr too from JAX 0.12 on
        if isinstance(value, core.ClosedJaxpr):
            return value.replace(jaxpr=_rewritten(value.jaxpr))
        return value
    eqns = []
    for eqn in value.eqns:
        params = {name: _rewritten(param) for name, param in eqn.params.items()}
        invars = eqn.invars
        if eqn.primitive.name == "add":
            invars = list(map(_smaller, invars))
        eqns.append(eqn.replace(params=params, invars=invars))
    return value.replace(eqns=eqns)


def _smaller(operand: Any) -> Any:
    if not isinstance(operand, core.Literal) or np.ndim(operand.val) > 0:
        return operand
    value = np.asarray(operand.val)
    if not jax.numpy.issubdtype(value.dtype, jax.numpy.floating) or not 0 < value <= EPSILON:
        return operand
    return core.Literal((value * SMALLER).astype(value.dtype), operand.aval)
