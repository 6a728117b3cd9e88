"""Retraction: steps that end on a sphere."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spherical_optax import _trees, geometry
from spherical_optax._checks import check_number
from spherical_optax._checks.values import check_values, warn_of_zeros
from spherical_optax._engine.layout import Layout, per_group
from spherical_optax._engine.lift import Lifted, lift
from spherical_optax._engine.state import state_like, zero, zeros_per_group
from spherical_optax._engine.step import Step, groups_only
from spherical_optax._engine.vector import Vector
from spherical_optax._numerics import safe_divide, wide
from spherical_optax.groups import Groups
from spherical_optax.transforms._radius import Radius, check_radius, radii_of, remembered

SHORTEST, SHORTEST_NARROW = 1 / 128, 1 / 2

OwnRetraction: TypeAlias = Callable[[Any, Any, Any], Any]
"""A function of the point, the step and the `RadialGroup` that returns where the step ends. Arrays
are float32 or wider. For a joint group, arguments and result are dictionaries by leaf path."""


class RetractState(NamedTuple):
    """State of `retract` with the initial radius or with rules.

    Attributes:
      target_radius: The radius of each group's sphere: the remembered length, which is 0 before the
        first update, or the radius that the rules give.
    """

    target_radius: optax.Params


def retract(
    groups: Groups,
    radius: Radius | Literal["initial"] = "initial",
    method: geometry.Retraction | OwnRetraction = "normalize",
    *,
    keep: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes each group's step end on a sphere; put it last in a chain.

    ```
    normalize:  x' = radius (x + v) / |x + v|
    geodesic:   x' = radius (cos(a) u + sin(a) t / |t|),  t tangent part of v, a = |t| / |x|
    keep:       radius' = radius + keep (|x + v| - radius)
    ```

    One step shortens a group at most to |x| / 128, or to |x| / 2 if updates have fewer digits than
    float32, so a much smaller radius takes several steps. In one step, rounding of x' - x would
    lose the direction of x'. `place_on_sphere` puts weights on their sphere at once.

    Args:
      groups: See [`spherical_optax.groups`][].
      radius: The radius of the sphere, in the forms of `place_on_sphere`, or `"initial"`: the
        length of each group when training begins. The first update remembers this length. A later
        update replaces it only if the group has become more than twice or less than half as long.
        So rounding errors do not add up, and weights that were loaded, cut or added keep their
        length. A group of length 0 stays 0. `forget_radii` makes the next update remember anew.
      method: `"normalize"`; `"geodesic"` to follow the great circle; or a function
        `f(x, v, group)` that returns where the step v from x ends, an array like x. The function
        defines the surface, so `radius` must keep its default. Its arrays are float32 or wider.
        For a joint group it gets dictionaries from paths to arrays, and to `RadialGroup`.
      keep: The fraction of each step's change of radius that is kept, in [0, 1], for the initial
        radius only. 0 or `None` fixes the radius. 1 leaves steps unchanged.

    Returns:
      A transformation; `update` needs params. Its state is `RetractState`. It has no state if the
      radius is a number or `"sqrt(d)"`, or if the method is a function.

    Raises:
      TypeError, ValueError: If the radius is not positive, the method is unknown, or `keep` is out
        of range or given with another radius. At `init`, if `groups` or the rules do not fit the
        parameters, or an initial length is known to be NaN or infinite. In `update`, if the result
        of a function has another shape than x.

    Warns:
      UserWarning: At `init`, if a group whose length is to be kept has length 0. If the values are
        traced, the warning appears when the program runs.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> tx = optax.chain(optax.sgd(0.1), so.retract(groups=so.per_layer()))
      >>> params = jnp.array([3., 4.])
      >>> updates, _ = tx.update(jnp.array([5., 1.]), tx.init(params), params)
      >>> so.geometry.norm(optax.apply_updates(params, updates), so.per_layer())
      Array(5., dtype=float32)
      >>> brake = so.retract(so.per_layer(), keep=0.5)
      >>> updates, _ = brake.update(params, brake.init(params), params)
      >>> so.geometry.norm(optax.apply_updates(params, updates), so.per_layer())
      Array(7.5, dtype=float32)
    """
    if callable(method):
        return _by_function(groups, radius, method, keep)
    geometry._check_retraction(method)
    check_radius("retract", radius, ("initial", "sqrt(d)"))
    initial = isinstance(radius, str) and radius == "initial"
    if keep is not None:
        check_number("retract", "keep", keep, most=1)
    if not initial and keep is not None:
        raise ValueError(f'retract: expected radius="initial" with keep, found {radius!r}.')
    in_state = initial or isinstance(radius, Mapping)

    def init(params: optax.Params) -> RetractState | optax.EmptyState:
        layout = Layout.at_init("retract", groups, params, keeps_radius=True)
        if not in_state:
            return optax.EmptyState()
        if initial:
            check_values(
                "retract",
                params,
                layout.joints,
                lambda x, joint: ~jnp.isfinite(geometry.norm(x, joint)),
                "groups of finite norm",
                "of norm NaN or infinite. Check how they were initialized",
            )
            warn_of_zeros("retract", params, layout.joints)
        else:
            radii_of("retract", radius, layout.joints, params)
        return RetractState(state_like(params, zeros_per_group(layout), zero))

    def prepare(layout: Layout, state: RetractState) -> Any:
        if initial:
            return state, by_memory
        targets: Any = list(state.target_radius)
        numbers = radii_of("retract", radius, layout.joints, layout.tree)
        for joint, number in zip(layout.joints, numbers, strict=True):
            for i in joint:
                targets[i] = jnp.full_like(targets[i], number)
        return RetractState(targets), by_rule

    def by_memory(v: Vector, x: Vector, state: Any) -> tuple[Vector, Any]:
        target = remembered(state.target_radius, x.norm())
        radius = target if keep is None else target + keep * ((x + v).norm() - target)
        step, radius = _to_radius(v, x, radius, method)
        step = step.where(target > 0, v * 0)  # a group of length 0 has no direction
        new = target if keep is None else jnp.where(target > 0, radius, target)
        return step, RetractState(new)

    def by_rule(v: Vector, x: Vector, state: Any) -> tuple[Vector, Any]:
        return _to_radius(v, x, state.target_radius, method)[0], state

    def by_number(v: Vector, x: Vector, state: Any) -> tuple[Vector, Any]:
        number = np.sqrt(v.space.size) if isinstance(radius, str) else radius
        return _to_radius(v, x, jnp.asarray(number), method)[0], state

    if in_state:
        return lift(Step("retract", groups, init, RetractState(per_group), prepare))
    return lift(Step("retract", groups, init, optax.EmptyState(), groups_only(by_number)))


def _by_function(
    groups: Groups, radius: Any, method: OwnRetraction, keep: Any
) -> optax.GradientTransformationExtraArgs:
    """`retract` with a function as its method."""
    for name, value, default in (("radius", radius, "initial"), ("keep", keep, None)):
        if not isinstance(value, type(default)) or value != default:
            raise ValueError(
                f"retract: expected no {name} with a function as method, found {value!r}. The "
                "function decides where steps end."
            )

    def init(params: optax.Params) -> optax.EmptyState:
        Layout.at_init("retract", groups, params, keeps_radius=True)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del extra_args
        layout = Layout.read("retract", groups, params, updates)
        x, v = layout.params, layout.updates
        paths = [leaf.path for leaf in _trees.visible_leaves(params)]
        for joint in layout.present():
            start = {paths[i]: wide(x[i]) for i in joint}
            step = {paths[i]: v[i].astype(start[paths[i]].dtype) for i in joint}
            given = (start, step, {paths[i]: group for i, group in joint.items()})
            alone = len(joint) == 1
            end = method(*(each[paths[next(iter(joint))]] if alone else each for each in given))
            end = {paths[i]: end for i in joint} if alone else end
            for i in joint:
                if np.shape(end[paths[i]]) != x[i].shape:
                    raise ValueError(
                        f"retract: {paths[i]} of shape {x[i].shape}: expected the function to "
                        f"return an array of this shape, found {np.shape(end[paths[i]])}."
                    )
                v[i] = (end[paths[i]] - start[paths[i]]).astype(v[i].dtype)
        return layout.trees(v)[0], state

    return optax.GradientTransformationExtraArgs(init, update)


def retract_to(groups: Groups) -> Lifted:
    """Retraction to the radii in a `RetractState`. Groups with radius 0 step freely."""

    def init(params: optax.Params) -> RetractState:
        layout = Layout.at_init("retract", groups, params, keeps_radius=True)
        return RetractState(state_like(params, zeros_per_group(layout), zero))

    def to_state(v: Vector, x: Vector, state: RetractState) -> tuple[Vector, Any]:
        step, _ = _to_radius(v, x, state.target_radius, "normalize")
        return step.where(state.target_radius > 0, v), state

    return lift(Step("retract", groups, init, RetractState(per_group), groups_only(to_state)))


def shortest(dtype: Any) -> float:
    """How short one step may make a group, relative to its length, without losing its direction."""
    return SHORTEST if jnp.finfo(dtype).bits >= 32 else SHORTEST_NARROW


def _to_radius(
    v: Vector, x: Vector, radius: Any, method: geometry.Retraction
) -> tuple[Vector, Any]:
    """The step, and the radius at which it ends."""
    radius = jnp.maximum(radius, shortest(v.space.dtype) * x.norm())
    return _ending(v, x, radius, method), radius


def _ending(v: Vector, x: Vector, radius: Any, method: geometry.Retraction) -> Vector:
    """The step that replaces v and ends on the sphere."""
    if method == "normalize":
        length = (x + v).norm()
        end = (x + v) * safe_divide(radius, length)
        return (x * 0).where(length == 0, end - x)
    square, length = x.square(), x.norm()
    tangent = v - x * safe_divide(v.inner(x), square)
    turn = safe_divide(tangent.norm(), length)
    factor = safe_divide(radius, length)
    end = x * (factor * jnp.cos(turn)) + tangent * (factor * jnp.sinc(turn / jnp.pi))
    return v.where(length == 0, end - x)
