"""The data flow in a program: which inputs reach an output, a sum, or an operand of a kernel.

Each question assigns a value to every variable. A rule computes the value of an operation's results
from the values of its operands. Programs inside operations are followed.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from jax.extend import core

Value = TypeVar("Value")
Sum = tuple[int, int]
"""Two operands that are added or concatenated: the inputs that each depends on, as a bit set."""

CONTRACTIONS = ("dot_general", "conv_general_dilated")


def sums(program: core.ClosedJaxpr) -> list[Sum]:
    """The pairs of added operands that each depend on an input on which the other does not."""
    pairs: set[Sum] = set()

    def rule(name: str, operands: Sequence[int]) -> int:
        if name in ("add", "add_any", "sub", "concatenate"):
            for n, a in enumerate(operands):
                pairs.update((a, b) for b in operands[n + 1 :] if a & ~b and b & ~a)
        return _union(operands)

    _flow(program.jaxpr, _bits(program), 0, rule)
    return sorted(pairs)


def is_used(program: core.ClosedJaxpr) -> bool:
    """Whether an output depends on one of the program's inputs."""
    return any(_flow(program.jaxpr, _bits(program), 0, lambda name, operands: _union(operands)))


def kernels(program: core.ClosedJaxpr) -> set[int]:
    """The inputs that are contracted with data or used as lookup tables: matrices, filters, tables.

    Data are the constants that the program closes over. A scale or a bias is not counted, because
    it is first combined with data entry by entry.
    """
    numbers: set[int] = set()

    def rule(name: str, operands: Sequence[tuple[int, bool]]) -> tuple[int, bool]:
        if name in (*CONTRACTIONS, "gather"):
            for bits, data in operands:
                numbers.update(_numbers(bits) if not data else ())
        return _union(bits for bits, _ in operands), any(data for _, data in operands)

    values = [(bits, False) for bits in _bits(program)]
    _flow(program.jaxpr, values, (0, False), rule, data=(0, True))
    return numbers


def inputs(program: core.ClosedJaxpr, parameters: int) -> set[int]:
    """The arguments, which are the program's inputs after the parameters, that a kernel multiplies.

    The network processes these. Other arguments are settings: masks, noise levels, temperatures.
    """
    numbers: set[int] = set()

    def rule(name: str, operands: Sequence[tuple[int, bool]]) -> tuple[int, bool]:
        arguments = _union(bits for bits, _ in operands) >> parameters
        on_parameters = any(bits & ((1 << parameters) - 1) for bits, _ in operands)
        contracted = any(flag for _, flag in operands)
        if name in CONTRACTIONS and on_parameters:
            numbers.update(_numbers(arguments) if not contracted else ())
            contracted = True
        return _union(bits for bits, _ in operands), contracted

    _flow(program.jaxpr, [(bits, False) for bits in _bits(program)], (0, False), rule)
    return numbers


def _bits(program: core.ClosedJaxpr) -> list[int]:
    return [1 << n for n in range(len(program.jaxpr.invars))]


def _numbers(bits: int) -> list[int]:
    return [n for n in range(bits.bit_length()) if bits >> n & 1]


def _union(bits: Iterable[Any]) -> int:
    return functools.reduce(operator.or_, bits, 0)


def _flow(
    jaxpr: core.Jaxpr,
    values: Sequence[Value],
    nothing: Value,
    rule: Callable[[str, Sequence[Value]], Value],
    data: Value | None = None,
) -> list[Value]:
    """The values of a program's outputs, computed from the values of its inputs.

    The rule maps an operation's name and its operands' values to the value of its results. Literals
    and variables that are not followed have the value `nothing`. The constants that the program
    closes over have the value `data` if it is given, or else `nothing`.
    """
    known: dict[Any, Value] = dict(zip(jaxpr.invars, values, strict=True))
    known |= dict.fromkeys(jaxpr.constvars, nothing if data is None else data)

    def value_of(operand: Any) -> Value:
        return nothing if isinstance(operand, core.Literal) else known.get(operand, nothing)

    for eqn in jaxpr.eqns:
        operands = list(map(value_of, eqn.invars))
        everything = rule(eqn.primitive.name, operands)
        outputs = [everything] * len(eqn.outvars)
        for inner in programs(eqn.params.values()):
            if len(inner.invars) != len(operands):
                continue
            if eqn.primitive.name == "scan":  # the next iteration reads the results of this one
                for n in _carry(eqn, inner):
                    operands[n] = everything
            results = _flow(inner, operands, nothing, rule, data)
            if len(results) == len(outputs):
                outputs = results
        known.update(zip(eqn.outvars, outputs, strict=True))
    return list(map(value_of, jaxpr.outvars))


def _carry(eqn: core.JaxprEqn, inner: core.Jaxpr) -> range:
    """The positions of a scan's carry among its operands, just before the sliced operands."""

    def unsliced(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        pairs = zip(outside, inside, strict=True)
        return sum(np.ndim(a.aval) == np.ndim(b.aval) for a, b in pairs)

    last = unsliced(eqn.invars, inner.invars)
    return range(last - unsliced(eqn.outvars, inner.outvars), last)


def programs(values: Iterable[Any]) -> Iterator[core.Jaxpr]:
    """The programs among an operation's parameters, including those in tuples and lists."""
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from programs(value)
