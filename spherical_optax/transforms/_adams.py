"""Group moments: Adam's scaling with one second moment per group."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax import geometry
from spherical_optax._checks import check_number
from spherical_optax._sums import Wanted
from spherical_optax.groups import Groups, group_size
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


class ScaleByAdamsState(NamedTuple):
    """State of `scale_by_adams`.

    Attributes:
      count: Number of updates so far.
      mu: First moments, like the parameters.
      nu: Second moments, one per group; like the parameter for a leaf with no group.
    """

    count: jax.Array  # type: ignore[assignment]
    mu: optax.Updates
    nu: optax.Updates


def scale_by_adams(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    groups: Groups,
    mu_dtype: jax.typing.DTypeLike | None = None,
    sqrt_dim: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Scales updates as Adam does, with one second moment per group.

    ```
    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) |g|^2        (v: one per group)
    sqrt(d) mhat / (sqrt(vhat) + eps)
    ```

    with d the entries per group and hats for Adam's bias corrections. A common scale
    per group keeps the gradient's direction, which Adam deforms. Leaves without a
    group get `optax.scale_by_adam`.

    Args:
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator.
      groups: See the module `spherical_optax.groups`.
      mu_dtype: dtype of the first moment; the parameter's if `None`.
      sqrt_dim: Whether to multiply by sqrt(d), which makes an entry's step as long as
        Adam's; without it the group's step has Adam's length of one entry.

    Returns:
      A transformation with state `ScaleByAdamsState`.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, if `groups` does
        not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> tx = so.scale_by_adams(groups=so.per_layer())
      >>> params = jnp.ones(2)
      >>> updates, state = tx.update(jnp.array([3., 4.]), tx.init(params))
      >>> print(updates, state.nu.shape)
      [0.84852815 1.1313709 ] ()

    References:
      Roburin et al., Spherical perspective on learning with normalization layers,
      Neurocomputing 2022 (AdamS).
    """
    check_number("scale_by_adams", "b1", b1, below=1)
    check_number("scale_by_adams", "b2", b2, below=1)
    check_number("scale_by_adams", "eps", eps)
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)

    def init(params: optax.Params) -> ScaleByAdamsState:
        nu = zeros_per_group(*resolve("scale_by_adams", groups, params))
        return ScaleByAdamsState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params, dtype=mu_dtype),
            nu=state_like(params, nu, optax.tree.zeros_like),
        )

    def update(
        updates: optax.Updates,
        state: ScaleByAdamsState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByAdamsState]:
        del extra_args
        check_type("scale_by_adams", state, ScaleByAdamsState)
        like = state.mu if params is None else params
        kept = (state.mu, per_entry), (state.nu, per_group_or_entry)
        units, _, (g, mu, nu), unflatten = pair(
            "scale_by_adams", groups, like, updates, *kept, typed=params is not None
        )
        count = optax.safe_increment(state.count)
        units = present(units, g, like)

        def plan(unit: Unit, g: Any, mu: Any, nu: Any) -> Any:
            grads = {i: geometry.wide(g[i]) for i in unit}

            def finish(sums: list[Any]) -> dict[int, Any]:
                m = {i: (1 - b1) * grads[i] + b1 * geometry.wide(mu[i]) for i in unit}
                v = nu[next(iter(unit))]
                [square] = sums
                v = (1 - b2) * square.astype(v.dtype) + b2 * v
                first, second = bias_correction(b1, count, v), bias_correction(b2, count, v)
                size = group_size(unit, g) if sqrt_dim else 1
                denominator = geometry.safe_sqrt(v / second) + eps
                scaled = geometry.scale(math.sqrt(size) / (first * denominator), m, unit)
                return {
                    i: (scaled[i].astype(g[i].dtype), m[i].astype(mu[i].dtype), kept)
                    for i, kept in per_leaf(v, unit, nu).items()
                }

            return Wanted([grads], [(0, 0)], unit), finish

        for unit, found in map_units(plan, units, g, mu, nu):
            for i in unit:
                g[i], mu[i], nu[i] = found[i]

        adam_elsewhere(adam, state.count, g, mu, nu, units)
        updates, *moments = unflatten(g, mu, nu)
        return updates, ScaleByAdamsState(count, *moments)

    return optax.GradientTransformationExtraArgs(init, update)


def adam_elsewhere(
    adam: optax.GradientTransformation,
    count: jax.Array,
    g: list[Any],
    mu: list[Any],
    nu: list[Any],
    units: list[Unit],
) -> None:
    """Replaces gradient and moments by Adam's, on the leaves that no unit has."""
    rest = elsewhere(units, g)
    if not rest:
        return
    taken = optax.ScaleByAdamState(count, [mu[i] for i in rest], [nu[i] for i in rest])
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam has a float to the power of an int
        scaled, state = adam.update([g[i] for i in rest], taken)
    for i, s, m, v in zip(rest, scaled, state.mu, state.nu, strict=True):
        g[i] = s.astype(jnp.result_type(g[i]))
        mu[i], nu[i] = m.astype(mu[i].dtype), v.astype(nu[i].dtype)


def bias_correction(decay: Any, count: jax.Array, like: jax.Array) -> jax.Array:
    """1 - decay^count, without cancellation."""
    log: Any = -math.inf
    if isinstance(decay, jax.Array):
        log = jnp.log(jnp.maximum(decay, 0.0))  # a schedule may end just below 0
    elif decay > 0:
        log = math.log(decay)
    return -jnp.expm1(count.astype(like.dtype) * log).astype(like.dtype)
