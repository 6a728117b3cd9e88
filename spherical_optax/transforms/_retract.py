"""Retraction: steps that end on a sphere."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax import geometry
from spherical_optax._checks import check_number
from spherical_optax.groups import Groups
from spherical_optax.transforms._lift import lift
from spherical_optax.transforms._pair import per_group, resolve
from spherical_optax.transforms._span import Step, Vector, only
from spherical_optax.transforms._units import (
    Unit,
    check_values,
    evaluated,
    per_leaf,
    pick,
    state_like,
    zero,
    zeros_per_group,
)

# How short a step may make a group, relative to its length, and keep its direction.
SHORTEST, SHORTEST_NARROW = 1 / 128, 1 / 2


class RetractState(NamedTuple):
    """State of `retract(groups, radius="initial")`.

    Attributes:
      target_radius: |x| of each group at `init`, or a `jax.ShapeDtypeStruct` where the parameter
        was one: a number would be a wrong radius.
    """

    target_radius: optax.Params


def retract(
    groups: Groups,
    radius: jax.typing.ArrayLike | Literal["initial"] = "initial",
    method: geometry.Retraction = "normalize",
) -> optax.GradientTransformationExtraArgs:
    """Makes each group's step end on a sphere; put it last in a chain.

    ```
    normalize:  x' = radius (x + v) / |x + v|
    geodesic:   x' = radius (cos(a) u + sin(a) t / |t|),  t tangent part of v, a = |t| / |x|
    ```

    Args:
      groups: See the module `spherical_optax.groups`.
      radius: The sphere's radius, or `"initial"` for that of each group at `init`, which
        is kept in the state so that repeated rounding does not drift. A group of norm
        zero at `init` has no sphere, and steps freely. To a given radius far below |x| it
        takes several steps, each to |x| / 128, or |x| / 2 where updates have fewer digits
        than float32: a step x' - x has lost the direction of an x' that is much shorter.
      method: `"normalize"`, or `"geodesic"` to follow the great circle.

    Returns:
      A transformation with state `RetractState`, or none for a numeric radius; `update`
      needs params.

    Raises:
      TypeError, ValueError: If the radius is not positive or the method unknown; at
        `init`, if `groups` does not fit the parameters, or an initial radius is known to be
        NaN or infinite.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import spherical_optax as so
      >>> tx = optax.chain(optax.sgd(0.1), so.retract(groups=so.per_layer()))
      >>> params = jnp.array([3., 4.])
      >>> updates, _ = tx.update(jnp.array([5., 1.]), tx.init(params), params)
      >>> so.geometry.norm(optax.apply_updates(params, updates), so.per_layer())
      Array(5., dtype=float32)
    """
    geometry.check_retraction(method)
    initial = isinstance(radius, str)
    if initial and radius != "initial":
        raise ValueError(f'retract: expected radius as a number or "initial", found {radius!r}.')
    if not initial:
        check_number("retract", "radius", radius, above=0)

    def init(params: optax.Params) -> RetractState | optax.EmptyState:
        units, x = resolve("retract", groups, params)
        if not initial:
            return optax.EmptyState()
        check_values(
            "retract",
            params,
            units,
            lambda x, unit: ~jnp.isfinite(geometry.norm(x, unit)),
            "groups of finite norm",
            "of norm NaN or infinite; look at how they were initialised",
        )
        zeros = zeros_per_group(units, x)
        targets: dict[int, jax.Array] = {}
        for unit in units:

            def radii(x: Any, unit: Unit = unit) -> dict[int, jax.Array]:
                return per_leaf(geometry.norm(x, unit), unit, zeros)

            targets |= evaluated(radii, pick(unit, x))
        return RetractState(target_radius=state_like(params, targets, zero))

    def to_initial(v: Vector, x: Vector, state: Any) -> tuple[Vector, Any]:
        target = state.target_radius
        return _ending(v, x, target, method).where(target > 0, v), state

    def to_number(v: Vector, x: Vector, state: Any) -> tuple[Vector, Any]:
        shortest = SHORTEST if jnp.finfo(v.space.dtype).bits >= 32 else SHORTEST_NARROW
        target = jnp.maximum(jnp.asarray(radius), shortest * x.norm())
        return _ending(v, x, target, method), state

    if initial:
        return lift(Step("retract", groups, init, RetractState(per_group), only(to_initial)))
    return lift(Step("retract", groups, init, optax.EmptyState(), only(to_number)))


def _ending(v: Vector, x: Vector, radius: Any, method: geometry.Retraction) -> Vector:
    """The step in place of v that ends on the sphere."""
    if method == "normalize":
        length = (x + v).norm()
        end = (x + v) * geometry.safe_divide(radius, length)
        return (x * 0).where(length == 0, end - x)
    square, length = x.square(), x.norm()
    tangent = v - x * geometry.safe_divide(v.inner(x), square)
    turn = geometry.safe_divide(tangent.norm(), length)
    factor = geometry.safe_divide(radius, length)
    end = x * (factor * jnp.cos(turn)) + tangent * (factor * jnp.sinc(turn / jnp.pi))
    return v.where(length == 0, end - x)
