"""Moments on the unit sphere: transport and averages in one, with few passes over memory.

`transport_moments` carries the moments of any transformation. For momentum and for group
moments the same is done here in fewer passes: the gradient of a group's direction u is
r g, which does not depend on the radius r. Moments of r g need no rescaling, and no record
of the radius; and all their sums come from one pass.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax import geometry
from spherical_optax._checks import check_number
from spherical_optax._sums import inners
from spherical_optax.groups import Groups, group_size
from spherical_optax.transforms._adams import adam_elsewhere, bias_correction
from spherical_optax.transforms._alike import map_units
from spherical_optax.transforms._pair import (
    check_type,
    pair,
    per_entry,
    per_group_or_entry,
    resolve,
)
from spherical_optax.transforms._units import (
    Unit,
    elsewhere,
    per_leaf,
    present,
    state_like,
    zeros_per_group,
)


class ScaleByAdamSRTState(NamedTuple):
    """State of `scale_by_adamsrt`.

    Attributes:
      count: Number of updates so far.
      mu: First moments of |x| g without their radial part, like the parameters; of g for a
        leaf with no group.
      nu: Second moments of |x| g, one per group; of g, like the parameter, for a leaf with
        no group.
    """

    count: jax.Array  # type: ignore[assignment]
    mu: optax.Updates
    nu: optax.Updates


class TransportedTraceState(NamedTuple):
    """State of `transported_trace`.

    Attributes:
      trace: The momentum of |x| g without its radial part, like the parameters; of g for a
        leaf with no group.
    """

    trace: optax.Params


class Carried(NamedTuple):
    """A first moment after a step.

    The moment of g itself is (moment + radial x) / scale.

    Attributes:
      moment: Of |x| g, without its radial part, by leaf number.
      radial: The coefficient of x that was dropped, one per group.
      radius: r = |x|.
      scale: r, or 1 where it is 0.
      square: |g|^2, or 0 where it was not asked for.
    """

    moment: dict[int, jax.Array]
    radial: jax.Array
    radius: jax.Array
    scale: jax.Array
    square: jax.Array


def carry(
    m: Any, g: Any, x: Any, unit: Unit, *, decay: Any, gain: Any, square: bool = False
) -> Carried:
    """Transports a moment of |x| g to x, and adds a gradient: decay m + gain |x| g."""
    smallest = max(float(jnp.finfo(a.dtype).eps) for a in m.values()) ** 2
    pairs = [(2, 2), (2, 1), (2, 0), (0, 0)] + [(1, 1)] * square
    xx, gx, mx, mm, *gg = inners((m, g, x), pairs, unit)
    m, g, x = ({i: v[i].astype(xx.dtype) for i in unit} for v in (m, g, x))
    radius = geometry.safe_sqrt(xx)
    scale = jnp.where(xx == 0, 1, radius)
    # |m - <m, u> u|^2. Of a vector turned by 90 degrees rounding is left, not a direction.
    tangent = mm - geometry.safe_divide(mx, xx) * mx
    lost = tangent <= max(smallest, 16 * float(jnp.finfo(xx.dtype).eps)) * mm
    length = geometry.safe_sqrt(jnp.where(lost, 0, mm)) / jnp.sqrt(jnp.where(lost, 1, tangent))
    kept = decay * jnp.where(mm == 0, 1, length)  # at 0 for the gradient only
    radial = gain * gx / scale
    along = kept * geometry.safe_divide(mx, xx) + radial
    moment = {
        i: geometry.spread(kept, x[i], group) * m[i]
        + geometry.spread(gain * scale, x[i], group) * g[i]
        - geometry.spread(along, x[i], group) * x[i]
        for i, group in unit.items()
    }
    return Carried(moment, radial, radius, scale, *(gg or [jnp.zeros_like(xx)]))


def _direction(carried: Carried, factor: Any, x: Any, unit: Unit) -> dict[int, jax.Array]:
    """The moment of g itself, times one factor per group."""
    factor = factor / carried.scale
    return {
        # The moment that is stored is read again: XLA then updates both buffers in place.
        i: geometry.spread(factor, x[i], group) * carried.moment[i]
        + geometry.spread(factor * carried.radial, x[i], group) * geometry.wide(x[i])
        for i, group in unit.items()
    }


def scale_by_adamsrt(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    groups: Groups,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Group moments, rescaled and transported as the groups move.

    ```
    m = b1 T(m) + (1 - b1) r g        v = b2 v + (1 - b2) |r g|^2        (r = |x|)
    sqrt(d) mhat / (sqrt(vhat) + r eps)
    ```

    with d the entries per group, hats for Adam's bias corrections, and T the transport from
    the last point to x, as in `transport_moments`. The updates are those of
    `transport_moments(scale_by_adams(...), groups)`, with fewer passes over memory. The state
    holds the moments of the gradient on the unit sphere, r g, and m without its radial part.

    Leaves without a group, and groups of one entry, get `optax.scale_by_adam`.

    Args:
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator.
      groups: See the module `spherical_optax.groups`.
      mu_dtype: dtype of the first moment; the parameter's if `None`.

    Returns:
      A transformation with state `ScaleByAdamSRTState`; `update` needs params.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, if `groups` does
        not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> tx = so.scale_by_adamsrt(groups=so.per_layer())
      >>> params = jnp.array([2., 0.])
      >>> updates, state = tx.update(jnp.array([0., 4.]), tx.init(params), params)
      >>> print(updates, state.mu)
      [0.        1.4142134] [0.  0.8]

    References:
      Roburin et al., Spherical perspective on learning with normalization layers,
      Neurocomputing 2022 (AdamSRT).
    """
    check_number("scale_by_adamsrt", "b1", b1, below=1)
    check_number("scale_by_adamsrt", "b2", b2, below=1)
    check_number("scale_by_adamsrt", "eps", eps)
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)

    def init(params: optax.Params) -> ScaleByAdamSRTState:
        nu = zeros_per_group(*resolve("scale_by_adamsrt", groups, params, movable=True))
        return ScaleByAdamSRTState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params, dtype=mu_dtype),
            nu=state_like(params, nu, optax.tree.zeros_like),
        )

    def update(
        updates: optax.Updates,
        state: ScaleByAdamSRTState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByAdamSRTState]:
        del extra_args
        check_type("scale_by_adamsrt", state, ScaleByAdamSRTState)
        kept = (state.mu, per_entry), (state.nu, per_group_or_entry)
        units, x, (g, mu, nu), unflatten = pair(
            "scale_by_adamsrt", groups, params, updates, *kept, movable=True
        )
        count = optax.safe_increment(state.count)
        units = present(units, g, params)

        def step(unit: Unit, g: Any, mu: Any, nu: Any, x: Any) -> dict[int, Any]:
            carried = carry(mu, g, x, unit, decay=b1, gain=1 - b1, square=True)
            v, square = nu[next(iter(unit))], (1 - b2) * carried.square
            first, second = bias_correction(b1, count, v), bias_correction(b2, count, v)
            variance = (b2 * v / carried.scale**2 + square) / second
            denominator = first * (geometry.safe_sqrt(variance) + eps)
            steps = _direction(carried, math.sqrt(group_size(unit, x)) / denominator, x, unit)
            v = (b2 * v + square * carried.radius**2).astype(v.dtype)
            return {
                i: (steps[i].astype(g[i].dtype), carried.moment[i].astype(mu[i].dtype), value)
                for i, value in per_leaf(v, unit, nu).items()
            }

        for unit, found in map_units(step, units, g, mu, nu, x):
            for i in unit:
                g[i], mu[i], nu[i] = found[i]

        adam_elsewhere(adam, state.count, g, mu, nu, units)
        updates, *moments = unflatten(g, mu, nu)
        return updates, ScaleByAdamSRTState(count, *moments)

    return optax.GradientTransformationExtraArgs(init, update)


def transported_trace(
    decay: jax.typing.ArrayLike,
    *,
    groups: Groups,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum, rescaled and transported as the groups move.

    ```
    m = decay T(m) + r g        m / r        (r = |x|)
    ```

    with T the transport from the last point to x, as in `transport_moments`. The updates are
    those of `transport_moments(optax.trace(decay), groups)`, with fewer passes over memory.
    The state holds the momentum of the gradient on the unit sphere, r g, without its radial
    part.

    Leaves without a group, and groups of one entry, get `optax.trace`.

    Args:
      decay: Decay rate of the momentum, in [0, 1).
      groups: See the module `spherical_optax.groups`.
      accumulator_dtype: dtype of the momentum; the parameter's if `None`.

    Returns:
      A transformation with state `TransportedTraceState`; `update` needs params.

    Raises:
      TypeError, ValueError: If decay is out of range; at `init`, if `groups` does not fit
        the parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> tx = so.transported_trace(0.9, groups=so.per_layer())
      >>> params = jnp.array([1., 0.])
      >>> _, state = tx.update(jnp.array([0., 1.]), tx.init(params), params)
      >>> params = jnp.array([0., 2.])  # turned by 90 degrees, and twice as long
      >>> updates, state = tx.update(jnp.array([1., 0.]), state, params)
      >>> updates
      Array([1., 0.], dtype=float32)

    References:
      Roburin et al., Neurocomputing 2022 (SGD-MRT).
    """
    check_number("transported_trace", "decay", decay, below=1)
    plain = optax.trace(decay, accumulator_dtype=accumulator_dtype)

    def init(params: optax.Params) -> TransportedTraceState:
        resolve("transported_trace", groups, params)
        return TransportedTraceState(plain.init(params).trace)

    def update(
        updates: optax.Updates,
        state: TransportedTraceState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, TransportedTraceState]:
        del extra_args
        check_type("transported_trace", state, TransportedTraceState)
        units, x, (g, trace), unflatten = pair(
            "transported_trace", groups, params, updates, (state.trace, per_entry), movable=True
        )
        units = present(units, g, params)

        def step(unit: Unit, g: Any, trace: Any, x: Any) -> dict[int, Any]:
            carried = carry(trace, g, x, unit, decay=decay, gain=1)
            return {
                i: (direction.astype(g[i].dtype), carried.moment[i].astype(trace[i].dtype))
                for i, direction in _direction(carried, 1, x, unit).items()
            }

        for unit, found in map_units(step, units, g, trace, x):
            for i in unit:
                g[i], trace[i] = found[i]
        rest = elsewhere(units, g)
        taken = optax.TraceState([trace[i] for i in rest])
        steps, kept = plain.update([g[i] for i in rest], taken)
        for i, a, m in zip(rest, steps, kept.trace, strict=True):
            g[i], trace[i] = a.astype(g[i].dtype), m.astype(trace[i].dtype)
        updates, moments = unflatten(g, trace)
        return updates, TransportedTraceState(moments)

    return optax.GradientTransformationExtraArgs(init, update)
