"""The forward pass without half precision: narrower operations are computed in float32.

Rounding to 8 bits hides invariance. The traced program lists its operations, so the same operations
can be computed with more digits.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from spherical_optax.detection._flow import programs

# Operations that only call an inner program. A narrow one loses its custom derivative rule.
CALLS = ("jit", "pjit", "closed_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call")


class NotWidenedError(Exception):
    """Raised if a program reads the bits of narrow numbers."""


def narrowest(program: core.ClosedJaxpr) -> Any:
    """The coarsest floating dtype in a program."""
    floating = {dtype for dtype in _dtypes(program.jaxpr) if jnp.issubdtype(dtype, jnp.floating)}
    return max(floating, key=lambda dtype: float(jnp.finfo(dtype).eps))


def widened(program: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """The program with all floats in at least float32; raises if it reads bits of narrow ones."""
    if not _is_narrow(program.jaxpr, program.jaxpr.invars):
        return program
    return _wide(program)


def _wide(program: Any) -> core.ClosedJaxpr:
    closed = isinstance(program, core.ClosedJaxpr)
    jaxpr = program.jaxpr if closed else program
    consts = list(map(wide, program.consts)) if closed else []
    shapes = [
        jax.ShapeDtypeStruct(var.aval.shape, _wide_dtype(var.aval.dtype)) for var in jaxpr.invars
    ]
    return jax.make_jaxpr(lambda *args: _run(jaxpr, consts, args))(*shapes)


def _run(jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """The outputs of a program, computed operation by operation in at least float32."""
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    known |= dict(zip(jaxpr.invars, args, strict=True))

    def value(operand: Any) -> Any:
        return _literal(operand).val if isinstance(operand, core.Literal) else known[operand]

    for eqn in jaxpr.eqns:
        narrow = _is_narrow_eqn(eqn)
        inner = list(programs(eqn.params.values()))
        if narrow and eqn.primitive.name in CALLS and inner:
            closed = [p for p in eqn.params.values() if isinstance(p, core.ClosedJaxpr)]
            kept = list(map(wide, closed[0].consts)) if closed else []
            results = _run(inner[0], kept, list(map(value, eqn.invars)))
        else:
            if narrow and "bitcast" in eqn.primitive.name:
                raise NotWidenedError("it reads the bits of narrow numbers")
            results = _alone(jaxpr, _widened_eqn(eqn) if narrow else eqn, known)
        known.update(zip(eqn.outvars, map(wide, results), strict=True))
    return list(map(value, jaxpr.outvars))


def _alone(jaxpr: core.Jaxpr, eqn: core.JaxprEqn, known: dict[Any, Any]) -> list[Any]:
    """The results of one operation of a program."""
    read = list(dict.fromkeys(var for var in eqn.invars if not isinstance(var, core.Literal)))
    single = jaxpr.replace(constvars=[], invars=read, outvars=list(eqn.outvars), eqns=[eqn])
    return core.jaxpr_as_fun(core.ClosedJaxpr(single, ()))(*(known[var] for var in read))


def _widened_eqn(eqn: core.JaxprEqn) -> core.JaxprEqn:
    params = {name: _param(value) for name, value in eqn.params.items()}
    if eqn.primitive.name == "reduce_precision" and params["mantissa_bits"] < 23:
        params |= {"exponent_bits": 8, "mantissa_bits": 23}
    invars = [_literal(var) if isinstance(var, core.Literal) else var for var in eqn.invars]
    return eqn.replace(params=params, invars=invars)


def _literal(operand: core.Literal) -> core.Literal:
    """A literal in at least float32."""
    aval: Any = operand.aval
    if not _is_narrow_var(operand):
        return operand
    return core.Literal(np.float32(operand.val), aval.update(dtype=np.dtype(np.float32)))


def _param(value: Any) -> Any:
    """A parameter of an operation, with its dtypes and programs widened."""
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return type(value)(map(_param, value))
    if isinstance(value, core.ClosedJaxpr):
        return _wide(value)
    if isinstance(value, core.Jaxpr):
        return _wide(value).jaxpr
    if isinstance(value, jax.lax.DotAlgorithmPreset | jax.lax.DotAlgorithm):
        return None
    return _wide_dtype(value) if isinstance(value, np.dtype | type) else value


def _wide_dtype(dtype: Any) -> Any:
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return np.dtype(np.float32) if narrow else dtype


def wide(value: Any) -> Any:
    """An array, possibly an abstract one, in at least float32."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or _wide_dtype(dtype) == dtype:
        return value
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(value.shape, np.float32)
    return value.astype(np.float32)


def _is_narrow(jaxpr: core.Jaxpr, more: Iterable[Any] = ()) -> bool:
    variables = (*more, *jaxpr.constvars, *jaxpr.outvars)
    return any(map(_is_narrow_var, variables)) or any(map(_is_narrow_eqn, jaxpr.eqns))


def _is_narrow_eqn(eqn: core.JaxprEqn) -> bool:
    if any(map(_is_narrow_var, (*eqn.invars, *eqn.outvars))):
        return True
    return any(_is_narrow(inner, inner.invars) for inner in programs(eqn.params.values()))


def _is_narrow_var(var: Any) -> bool:
    dtype = getattr(var.aval, "dtype", None)
    return dtype is not None and _wide_dtype(dtype) != dtype


def _dtypes(jaxpr: core.Jaxpr) -> Iterable[Any]:
    for var in (*jaxpr.invars, *jaxpr.constvars, *(v for eqn in jaxpr.eqns for v in eqn.outvars)):
        if hasattr(var.aval, "dtype"):
            yield var.aval.dtype
    for eqn in jaxpr.eqns:
        for inner in programs(eqn.params.values()):
            yield from _dtypes(inner)
