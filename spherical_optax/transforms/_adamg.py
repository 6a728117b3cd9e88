"""AdamG's moments: group moments transported without a rescaling, as a step."""

from typing import Any

import jax
import optax

from spherical_optax import geometry
from spherical_optax.groups import Groups
from spherical_optax.transforms._adams import (
    ScaleByAdamsState,
    adam_elsewhere,
    bias_correction,
    scale_by_adams,
)
from spherical_optax.transforms._lift import Lifted, lift
from spherical_optax.transforms._pair import pair, per_entry, per_group_or_entry
from spherical_optax.transforms._span import Step, Vector, shared
from spherical_optax.transforms._transport import TransportMomentsState, transport_moments
from spherical_optax.transforms._unit_sphere import carry


def scale_by_adamg(
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    *,
    groups: Groups,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> Lifted:
    """`transport_moments(scale_by_adams(...), groups, rescale=False)`, with fewer passes.

    Without a rescaling the radius of the last update does not matter: it stays as it was.
    """
    adams = scale_by_adams(b1, b2, eps, groups=groups, mu_dtype=mu_dtype, sqrt_dim=False)
    separate = transport_moments(adams, groups, rescale=False)
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)

    def begin(updates: Any, state: TransportMomentsState, params: Any) -> Any:
        inner: Any = state.inner_state
        kept = (inner.mu, per_entry), (inner.nu, per_group_or_entry)
        units, _, (g, mu, nu), unflatten = pair("adamg", groups, params, updates, *kept)
        adam_elsewhere(adam, inner.count, g, mu, nu, units)
        updates, *moments = unflatten(g, mu, nu)
        inner = ScaleByAdamsState(optax.safe_increment(inner.count), *moments)
        return updates, state._replace(inner_state=inner), on_group

    def on_group(g: Vector, x: Vector, state: Any) -> tuple[Vector, Any]:
        inner = state.inner_state
        moment, radial = inner.mu * b1 + g * (1 - b1), 0
        if g.space.size > 1:
            moment, radial = carry(inner.mu, g * (1 - b1), x, b1)
        v = b2 * inner.nu + (1 - b2) * g.square().astype(inner.nu.dtype)
        first, second = (bias_correction(b, inner.count, v) for b in (b1, b2))
        factor = 1 / (first * (geometry.safe_sqrt(v / second) + eps))
        inner = inner._replace(mu=moment, nu=v)
        return (moment.stored() + x * radial) * factor, state._replace(inner_state=inner)

    kinds = TransportMomentsState(shared, ScaleByAdamsState(shared, per_entry, per_group_or_entry))
    return lift(Step("adamg", groups, separate.init, kinds, begin))
