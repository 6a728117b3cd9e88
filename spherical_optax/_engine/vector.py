"""Vectors: linear combinations of a group's arrays, known by their inner products.

A step computes linear combinations of a few arrays of a group: its update, its point and its
moments. The coefficients follow from the inner products of these arrays, so a step never sees an
array.
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
    """What is known about the arrays of a joint's groups.

    Attributes:
      product: Maps two names to the inner product of their arrays, one value per group.
      size: The number of entries per group.
      ndim: The number of axes of a leaf that index its groups.
      lost: A square that is smaller than this, relative to the squares of its parts, is rounding
        error.
      dtype: The dtype of the point, and so of the new update: the narrowest among its leaves.
    """

    product: Callable[[str, str], jax.Array]
    size: int
    ndim: int
    lost: float
    dtype: Any

    def over_layer(self, *values: jax.Array) -> Sequence[jax.Array]:
        """Sums values per group over the groups of each layer, which the last axis indexes.

        A leaf that is a single group is a layer by itself.
        """
        if not self.ndim:
            return values
        return [each[..., None] for each in sums_together(values, (self.ndim - 1,))]


@dataclasses.dataclass(frozen=True, eq=False)
class Vector:
    """A linear combination of a joint's arrays, one in each group, known by its inner products.

    Attributes:
      parts: Maps the name of an array, or a vector that is stored as one, to its coefficient: one
        number, or one number per group.
      space: The space of the arrays.
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
        """The same vector, computed once and stored, for a moment that is both kept and used."""
        return Vector({self: 1}, self.space)

    @functools.cached_property
    def _of_arrays(self) -> dict[str, Any]:
        """The coefficients of the arrays, with stored vectors expanded."""
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
        # The product a * b alone might overflow or underflow.
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
        """The squared length, one value per group; 0 where it is no more than rounding error.

        The length of a difference is less accurate here than in `geometry`, which subtracts before
        it takes the norm. A square below the rounding error of its parts' squares counts as 0.
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
