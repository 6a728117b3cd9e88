"""Moments on the unit sphere: transport and averaging together, with few passes over memory.

`transport_moments` carries the moments of any transformation. For momentum and group moments this
module does the same in fewer passes. The gradient with respect to the direction u of a group is
r g, which does not depend on the radius r. Moments of r g therefore need no rescaling and no record
of the radius, and one pass gives all their sums.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax._checks import check_adam, check_number
from spherical_optax._engine.layout import Layout, per_entry, per_group_or_entry
from spherical_optax._engine.lift import lift
from spherical_optax._engine.state import state_like, zeros_per_group
from spherical_optax._engine.step import NOT_PER_LEAF, Step, optax_on_the_rest
from spherical_optax._engine.vector import Vector
from spherical_optax._numerics import safe_divide
from spherical_optax.groups import Groups
from spherical_optax.transforms._adams import group_moment


class ScaleByAdamsrtState(NamedTuple):
    """State of `scale_by_adamsrt`.

    Attributes:
      count: Number of updates so far.
      mu: First moments of |x| g without their radial part. For a leaf without a group, first
        moments of g.
      nu: Second moments of |x| g, one per group. For a leaf without a group, second moments of g,
        one per entry.
    """

    count: jax.Array  # type: ignore[assignment]
    mu: optax.Updates
    nu: optax.Updates


class TransportedTraceState(NamedTuple):
    """State of `transported_trace`.

    Attributes:
      trace: The momentum of |x| g without its radial part, like the parameters. For a leaf without
        a group, the momentum of g.
    """

    trace: optax.Params


def carry(m: Vector, g: Vector, x: Vector, decay: Any) -> tuple[Vector, Any]:
    """Transports a moment to x and adds a gradient: decay T(m) + g.

    Returns the result without its radial part, and the coefficient of x in the radial part.
    """
    square = x.square()
    tangent = m - x * safe_divide(m.inner(x), square)
    # If m is radial at x, only rounding is left, and its norm counts as 0.
    length = safe_divide(m.norm(), tangent.norm())
    kept = decay * jnp.where(m.square() == 0, 1, length)  # only matters to the gradient
    radial = safe_divide(g.inner(x), square)
    return tangent * kept + (g - x * radial), radial


def scale_by_adamsrt(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    groups: Groups,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales by group moments, rescaled and transported as the groups move.

    ```
    m = b1 T(m) + (1 - b1) r g        v = b2 v + (1 - b2) |r g|^2        (r = |x|)
    sqrt(d) mhat / (sqrt(vhat) + r eps)
    ```

    Here d is the number of entries per group, and hats denote Adam's bias correction. T is the
    transport from the previous point to x, as in `transport_moments`. The updates are those of
    `transport_moments(scale_by_adams(...), groups)`, with fewer passes over memory. The state has
    moments of r g, the gradient on the unit sphere. The stored m has no radial part.

    Leaves without a group, and groups of one entry, get `optax.scale_by_adam`.

    Args:
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator.
      groups: See [`spherical_optax.groups`][].
      mu_dtype: dtype of the first moment; that of the parameter if `None`.

    Returns:
      A transformation with state `ScaleByAdamsrtState`; `update` needs params.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, if `groups` does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> tx = so.scale_by_adamsrt(groups=so.per_layer())
      >>> params = jnp.array([2., 0.])
      >>> updates, state = tx.update(jnp.array([0., 4.]), tx.init(params), params)
      >>> print(updates, state.mu)
      [0.      1.41421] [0.  0.8]

    References:
      Roburin et al., Neurocomputing 2022 (AdamSRT).
    """
    check_adam("scale_by_adamsrt", b1, b2, eps)
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)

    def init(params: optax.Params) -> ScaleByAdamsrtState:
        layout = Layout.at_init("scale_by_adamsrt", groups, params, skips_single_entries=True)
        return ScaleByAdamsrtState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params, dtype=mu_dtype),
            nu=state_like(params, zeros_per_group(layout), optax.tree.zeros_like),
        )

    def prepare(layout: Layout, state: ScaleByAdamsrtState) -> Any:
        rest = optax_on_the_rest(adam, layout, optax.ScaleByAdamState(*state))
        count = optax.safe_increment(state.count)
        return ScaleByAdamsrtState(count, rest.mu, rest.nu), on_group

    def on_group(g: Vector, x: Vector, state: Any) -> tuple[Vector, Any]:
        radius = x.norm()
        scale = jnp.where(radius == 0, 1, radius)
        m, radial = carry(state.mu, g * ((1 - b1) * scale), x, b1)
        m = m.stored()
        v, denominator = group_moment(g.square(), state, b1, b2, eps, radius, scale)
        factor = math.sqrt(g.space.size) / (denominator * scale)
        return (m + x * radial) * factor, state._replace(mu=m, nu=v)

    shapes = ScaleByAdamsrtState(NOT_PER_LEAF, per_entry, per_group_or_entry)
    step = Step("scale_by_adamsrt", groups, init, shapes, prepare, skips_single_entries=True)
    return lift(step)


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

    Here T is the transport from the previous point to x, as in `transport_moments`. The updates are
    those of `transport_moments(optax.trace(decay), groups)`, with fewer passes over memory. The
    state has the momentum of r g, the gradient on the unit sphere, without its radial part.

    Leaves without a group, and groups of one entry, get `optax.trace`.

    Args:
      decay: Decay rate of the momentum, in [0, 1).
      groups: See [`spherical_optax.groups`][].
      accumulator_dtype: dtype of the momentum; that of the parameter if `None`.

    Returns:
      A transformation with state `TransportedTraceState`; `update` needs params.

    Raises:
      TypeError, ValueError: If `decay` is out of range; at `init`, if `groups` does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> tx = so.transported_trace(0.9, groups=so.per_layer())
      >>> params = jnp.array([1., 0.])
      >>> _, state = tx.update(jnp.array([0., 1.]), tx.init(params), params)
      >>> params = jnp.array([0., 2.])  # rotated by 90 degrees, and twice as long
      >>> updates, state = tx.update(jnp.array([1., 0.]), state, params)
      >>> updates
      Array([1., 0.], dtype=float32)

    References:
      Roburin et al., Neurocomputing 2022 (SGD-MRT).
    """
    check_number("transported_trace", "decay", decay, below=1)
    plain = optax.trace(decay, accumulator_dtype=accumulator_dtype)

    def init(params: optax.Params) -> TransportedTraceState:
        Layout.at_init("transported_trace", groups, params)
        return TransportedTraceState(plain.init(params).trace)

    def prepare(layout: Layout, state: TransportedTraceState) -> Any:
        rest = optax_on_the_rest(plain, layout, optax.TraceState(state.trace))
        return TransportedTraceState(rest.trace), on_group

    def on_group(g: Vector, x: Vector, state: Any) -> tuple[Vector, Any]:
        radius = x.norm()
        scale = jnp.where(radius == 0, 1, radius)
        m, radial = carry(state.trace, g * scale, x, decay)
        m = m.stored()
        return (m + x * radial) * (1 / scale), TransportedTraceState(m)

    shapes = TransportedTraceState(per_entry)
    step = Step("transported_trace", groups, init, shapes, prepare, skips_single_entries=True)
    return lift(step)
