"""Vectors: combinations of a group's arrays, known by their inner products.

What a step makes of a group is a combination of few arrays, its update, its point and moments,
and the coefficients follow from the inner products of these. So a step never sees an array.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Union

import jax
import jax.numpy as jnp

from spherical_optax._numerics import safe_sqrt
from spherical_optax._xla import sums_together


class Space(NamedTuple):
    """What is known of the arrays of some groups.

    Attributes:
      product: From two names to the inner product of these arrays, one per group.
      size: Entries per group.
      ndim: Axes of a leaf that index its groups.
      lost: How small a square may be, relative to those of its parts, before it is rounding.
      dtype: Of the point, and so of the new update: the narrowest of its leaves.
    """

    product: Callable[[str, str], jax.Array]
    size: int
    ndim: int
    lost: float
    dtype: Any

    def over_layer(self, *values: jax.Array) -> Sequence[jax.Array]:
        """The sums of values per group over the groups of each layer, which the last axis indexes.

        A leaf that is one group is a layer.
        """
        if not self.ndim:
            return values
        return [each[..., None] for each in sums_together(values, (self.ndim - 1,))]


@dataclasses.dataclass(frozen=True, eq=False)
class Vector:
    """A linear combination of a joint's arrays, one in each group, known by its inner products.

    Attributes:
      parts: From the name of an array, or a vector that is stored as one, to its coefficient:
        a number, or one per group.
      space: Of the arrays.
    """

    parts: Mapping[Union[str, "Vector"], Any]
    space: Space

    def __add__(self, other: "Vector") -> "Vector":
        parts = dict(self.parts)
        for name, each in other.parts.items():
            parts[name] = parts[name] + each if name in parts else each
        return Vector(parts, self.space)

    def __sub__(self, other: "Vector") -> "Vector":
        parts = dict(self.parts)
        for name, each in other.parts.items():
            parts[name] = parts[name] - each if name in parts else -each
        return Vector(parts, self.space)

    def __mul__(self, factor: Any) -> "Vector":
        return Vector({name: _times(factor, each) for name, each in self.parts.items()}, self.space)

    def where(self, condition: jax.Array, other: "Vector") -> "Vector":
        """This vector in groups where the condition holds, the other one elsewhere."""
        names = {**self.parts, **other.parts}
        parts = {
            name: jnp.where(condition, self.parts.get(name, 0), other.parts.get(name, 0))
            for name in names
        }
        return Vector(parts, self.space)

    def stored(self) -> "Vector":
        """The same, combined once: for a moment that is kept and used."""
        return Vector({self: 1}, self.space)

    @functools.cached_property
    def _of_arrays(self) -> dict[str, Any]:
        """The coefficients of the arrays."""
        total: dict[str, Any] = {}
        for part, each in self.parts.items():
            arrays = {part: 1} if isinstance(part, str) else part._of_arrays
            for name, inside in arrays.items():
                value = _times(inside, each)
                total[name] = total[name] + value if name in total else value
        return total

    def inner(self, other: "Vector") -> Any:
        """The inner product with another vector, one per group."""
        return _sum(
            self._product(i, a, j, b)
            for i, a in self._of_arrays.items()
            for j, b in other._of_arrays.items()
        )

    def _product(self, i: str, a: Any, j: str, b: Any) -> Any:
        # a b alone might leave the range of floats
        return _times(a, _times(b, self.space.product(*sorted((i, j)))))

    @functools.cached_property
    def _square(self) -> Any:
        parts = list(self._of_arrays.items())
        squares = _sum(self._product(i, a, i, a) for i, a in parts)
        if len(parts) < 2:
            return squares
        pairs = itertools.combinations(parts, 2)
        total = squares + 2 * _sum(self._product(i, a, j, b) for (i, a), (j, b) in pairs)
        return jnp.where(total <= self.space.lost * squares, 0, total)

    def square(self) -> Any:
        """The squared length, one per group; 0 where only rounding is left of it.

        The length of a difference loses digits here that `geometry` keeps, as it takes differences
        before norms: what is smaller than the rounding of the parts' squares counts as nothing.
        """
        return self._square

    def norm(self) -> Any:
        """The length, one per group."""
        return self._norm

    @functools.cached_property
    def _norm(self) -> Any:
        return safe_sqrt(self._square)


def _times(a: Any, b: Any) -> Any:
    if isinstance(a, int) and a == 1:
        return b
    return a if isinstance(b, int) and b == 1 else a * b


def _sum(values: Iterable[Any]) -> Any:
    return functools.reduce(operator.add, values)
