"""Directions that can be made again of the state that an update leaves, and need no memory.

Adam's direction follows from its new moments, entry by entry. Where a step reads the direction
twice, for its inner products and for its end, it may read the moments twice instead.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend import core

from spherical_optax._sums import Remade, for_sums, once
from spherical_optax.groups import RadialGroup
from spherical_optax.sharding import on_one_device

# Operations on arrays of one shape, and on numbers, whose results do not depend on the shape.
ENTRY_BY_ENTRY = {
    *("abs", "add", "convert_element_type", "div", "exp", "integer_pow", "log", "max", "min"),
    *("mul", "neg", "pow", "rsqrt", "sign", "sqrt", "square", "sub", "tanh"),
}


def with_remade(
    update: Callable[..., tuple[Any, Any]], updates: Any, state: Any, params: Any
) -> tuple[Any, Any, dict[int, Remade]]:
    """The results of an update, and those of them that can be made again of the new state.

    Args:
      update: A transformation's, of updates, state and params.
      updates: The updates.
      state: The state.
      params: The parameters.

    Returns:
      New updates and state, and from the `id` of an update, which it keeps alive, to how it is
      made again: nothing outside of `jax.jit`, where nothing would be gained, and where there
      are several devices.
    """
    given = (updates, state, params)
    after = update(*given)
    directions, kept = map(jax.tree.leaves, after)
    new = {id(each) for each in directions} - {id(each) for each in jax.tree.leaves(updates)}
    traced = any(isinstance(each, jax.core.Tracer) for each in directions)
    if not new or not traced or not on_one_device():
        return *after, {}
    program = jax.make_jaxpr(update)(*given)
    results = program.jaxpr.outvars
    made_by = {var: eqn for eqn in program.eqns for var in eqn.outvars}
    arrays = {
        var: value
        for var, value in zip(results[len(directions) :], kept, strict=True)
        if not isinstance(var, core.Literal) and value.ndim
    }

    slices: dict[int, tuple[Any, list[Any]]] = {}
    for n, var in enumerate(results[: len(directions)]):
        eqns = _leading_to([var], made_by, lambda var: var in arrays or not var.aval.shape)
        if eqns and all(_entry_by_entry(eqn, var.aval.shape) for eqn in eqns):
            slices[n] = var, eqns
    read = dict.fromkeys(v for _, eqns in slices.values() for eqn in eqns for v in _vars(eqn))
    numbers = [var for var in read if not var.aval.shape]
    eqns = _leading_to(numbers, made_by, lambda var: var not in made_by) or []
    smaller = program.replace(jaxpr=program.jaxpr.replace(eqns=eqns, outvars=numbers))
    values = core.jaxpr_as_fun(smaller)(*jax.tree.leaves(given))
    remade = {}
    for n, (var, eqns) in slices.items():
        parts = list(dict.fromkeys(v for eqn in eqns for v in _vars(eqn) if v in arrays))
        direction, taken = directions[n], [arrays[each] for each in parts]
        make = _maker(var, eqns, [*parts, *numbers])
        remade[id(direction)] = Remade(direction, taken, values, make)
    return *after, remade


def stored(update: jax.Array, remade: dict[int, Remade], group: RadialGroup) -> jax.Array | Remade:
    """An update that is read twice: how it is made again, or as XLA's GPU compiler stores it."""
    known = remade.get(id(update))
    return for_sums(known, group) if known else once(update)


def _maker(var: Any, eqns: list[Any], names: list[Any]) -> Callable[..., jax.Array]:
    """The function of arrays and numbers that operations are; it holds no values itself."""

    def make(parts: Sequence[jax.Array], numbers: Sequence[jax.Array]) -> jax.Array:
        known = dict(zip(names, (*parts, *numbers), strict=True))
        for eqn in eqns:
            operands = [x.val if isinstance(x, core.Literal) else known[x] for x in eqn.invars]
            known[eqn.outvars[0]] = eqn.primitive.bind(*operands, **eqn.params)
        return known[var]

    return make


def _leading_to(
    wanted: Iterable[Any], made_by: dict[Any, Any], known: Callable[[Any], bool]
) -> list[Any] | None:
    """The operations from what is known to what is wanted; `None` if they need something else."""
    found: dict[int, Any] = {}

    def lead_to(var: Any) -> bool:
        if isinstance(var, core.Literal) or known(var):
            return True
        eqn = made_by.get(var)
        if eqn is None or not all(map(lead_to, eqn.invars)):
            return False
        found[id(eqn)] = eqn
        return True

    return list(found.values()) if all(map(lead_to, wanted)) else None


def _entry_by_entry(eqn: Any, shape: tuple[int, ...]) -> bool:
    shapes = [var.aval.shape for var in (*eqn.invars, *eqn.outvars)]
    return eqn.primitive.name in ENTRY_BY_ENTRY and all(each in ((), shape) for each in shapes)


def _vars(eqn: Any) -> list[Any]:
    return [var for var in eqn.invars if not isinstance(var, core.Literal)]
