"""All units, with their sums: small ones that are alike are stacked, and compiled once."""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from spherical_optax._sums import Wanted, inners
from spherical_optax.transforms._units import Unit, pick

SMALL = 4096  # entries; beyond, compiling and starting kernels is not what a step costs
STACK = 32  # units; XLA's time to take a stack apart grows with the square of this


Found: TypeAlias = dict[int, Any]
Plan: TypeAlias = Callable[..., tuple[Wanted, Callable[[list[Any]], Found]]]
"""From a unit and, for each field, a dictionary from leaf number to array, to the inner products
it needs and a function of them that returns a dictionary from leaf number to a pytree."""


def map_units(plan: Plan, units: list[Unit], *fields: list[Any]) -> Iterator[tuple[Unit, Found]]:
    """Yields each unit with what is planned for it; the sums of all are asked for together.

    Where a model has many small layers of one shape, most of the time goes into compiling
    and starting their kernels: they are stacked, and go through a loop of two iterations,
    whose body is compiled once. Not over several devices, where leaves of one shape may be
    sharded in different ways.

    Args:
      plan: What is to be done with a unit.
      units: The units.
      fields: Leaves, by number.
    """
    alike: dict[Any, list[Unit]] = {}
    for unit in units:
        kind: Any = next(iter(unit))
        if jax.device_count() == 1 and sum(fields[0][i].size for i in unit) <= SMALL:
            kind = tuple(
                (group.index_axes, group.num_blocks, *(jax.typeof(field[i]) for field in fields))
                for i, group in unit.items()
            )
        alike.setdefault(kind, []).append(unit)
    single: list[Unit] = []
    for many in alike.values():
        odd = len(many) % 2
        single += many[:odd]
        for start in range(odd, len(many), STACK):
            stack = many[start : start + STACK]
            yield from zip(stack, _stacked(plan, stack, fields), strict=True)
    plans = [plan(unit, *(pick(unit, field) for field in fields)) for unit in single]
    sums = inners([wanted for wanted, _ in plans])
    for unit, (_, finish), found in zip(single, plans, sums, strict=True):
        yield unit, finish(found)


def _stacked(plan: Plan, units: list[Unit], fields: tuple[list[Any], ...]) -> Iterator[Found]:
    first = dict(enumerate(units[0].values()))
    numbers = [list(unit) for unit in units]
    stacks = [
        {place: jnp.stack([field[each[place]] for each in numbers]) for place in first}
        for field in fields
    ]

    def one(values: Any) -> Found:
        wanted, finish = plan(first, *values)
        return finish(*inners([wanted]))

    results = jax.lax.map(one, stacks, batch_size=len(units) // 2)
    for n, each in enumerate(numbers):
        of_unit = jax.tree.map(lambda result, n=n: result[n], results)
        yield {i: of_unit[place] for place, i in enumerate(each)}
