"""Small units that are alike: stacked, and compiled once."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from spherical_optax.transforms._units import Unit, pick

SMALL = 4096  # entries; beyond, compiling and starting kernels is not what a step costs
STACK = 32  # units; XLA's time to take a stack apart grows with the square of this


def map_units(
    fn: Callable[..., dict[int, Any]], units: list[Unit], *fields: list[Any]
) -> Iterator[tuple[Unit, dict[int, Any]]]:
    """Yields each unit with `fn(unit, *values)`.

    Where a model has many small layers of one shape, most of the time goes into compiling
    and starting their kernels: they are stacked, and go through a loop of two iterations,
    whose body is compiled once. Not over several devices, where leaves of one shape may be
    sharded in different ways.

    Args:
      fn: From a unit and, for each field, a dictionary from leaf number to array, to a
        dictionary from leaf number to a pytree of arrays.
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
    for many in alike.values():
        odd = len(many) % 2
        for start in range(odd, len(many), STACK):
            stack = many[start : start + STACK]
            yield from zip(stack, _stacked(fn, stack, fields), strict=True)
        for unit in many[:odd]:
            yield unit, fn(unit, *(pick(unit, field) for field in fields))


def _stacked(
    fn: Callable[..., dict[int, Any]], units: list[Unit], fields: tuple[list[Any], ...]
) -> Iterator[dict[int, Any]]:
    first = dict(enumerate(units[0].values()))
    numbers = [list(unit) for unit in units]
    stacks = [
        {place: jnp.stack([field[each[place]] for each in numbers]) for place in first}
        for field in fields
    ]
    results = jax.lax.map(lambda values: fn(first, *values), stacks, batch_size=len(units) // 2)
    for n, each in enumerate(numbers):
        one = jax.tree.map(lambda result, n=n: result[n], results)
        yield {i: one[place] for place, i in enumerate(each)}
