"""Geometric steps, written for one group as functions of a few vectors.

What such a step makes of a group is a combination of few arrays, its update, its point and
moments, and the coefficients follow from their inner products. So a step is a function of
`Vector`s, whose arrays it never sees; `_lift` makes a transformation of it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, Union

import jax
import jax.numpy as jnp

from spherical_optax import geometry
from spherical_optax.groups import Groups


class Space(NamedTuple):
    """What is known of the arrays of some groups.

    Attributes:
      product: From two names to the inner product of these arrays, one per group.
      size: Entries per group.
      lost: How small a square may be, relative to those of its parts, before it is rounding.
      dtype: Of the point, and so of the new update: the narrowest of its leaves.
    """

    product: Callable[[str, str], jax.Array]
    size: int
    lost: float
    dtype: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Vector:
    """A linear combination of a unit's arrays, one in each group, known by its inner products.

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
        return self + other * -1

    def __mul__(self, factor: Any) -> "Vector":
        return Vector({name: factor * each for name, each in self.parts.items()}, self.space)

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

    def of_arrays(self) -> dict[str, Any]:
        """The coefficients of the arrays."""
        total: dict[str, Any] = {}
        for part, each in self.parts.items():
            for name, inside in ({part: 1} if isinstance(part, str) else part.of_arrays()).items():
                total[name] = total.get(name, 0) + inside * each
        return total

    def inner(self, other: "Vector") -> Any:
        """The inner product with another vector, one per group."""
        return sum(
            a * (b * self.space.product(*sorted((i, j))))  # a b alone might leave the range
            for i, a in self.of_arrays().items()
            for j, b in other.of_arrays().items()
        )

    def square(self) -> Any:
        """The squared length, one per group; 0 where only rounding is left of it."""
        parts = self.of_arrays()
        squares = sum(a * (a * self.space.product(i, i)) for i, a in parts.items())
        if len(parts) < 2:
            return squares
        mixed = sum(
            2 * a * (b * self.space.product(*sorted((i, j))))
            for i, a in parts.items()
            for j, b in parts.items()
            if i < j
        )
        total = squares + mixed
        return jnp.where(total <= self.space.lost * squares, 0, total)

    def norm(self) -> Any:
        """The length, one per group."""
        return geometry.safe_sqrt(self.square())


OnGroup: TypeAlias = Callable[[Vector, Vector, Any], tuple[Vector, Any]]
"""From the update, the point and the state of a unit to the new update and state. A field of the
state is there one value per group, a `Vector` if it is a tree like the parameters, or shared."""


shared: Any = object()
"""The kind of a part of the state that is no tree like the parameters."""


class Step(NamedTuple):
    """A transformation that acts on groups through their coefficients.

    Attributes:
      who: Its name.
      groups: See the module `spherical_optax.groups`.
      init: As of a transformation.
      kinds: The state, with the `Kind` of each tree like the parameters and `shared` else.
      begin: From updates, state and params to updates and state, where leaves without a group
        and what is shared are already new, and to the function of the groups. What it makes of
        updates in groups does not matter.
      movable: Whether groups of one entry are leaves without a group to it.
    """

    who: str
    groups: Groups
    init: Callable[[Any], Any]
    kinds: Any
    begin: Callable[[Any, Any, Any], tuple[Any, Any, OnGroup]]
    movable: bool = False


def only(on_group: OnGroup) -> Callable[[Any, Any, Any], tuple[Any, Any, OnGroup]]:
    """The `begin` of a step that does nothing outside of groups."""
    return lambda updates, state, params: (updates, state, on_group)
