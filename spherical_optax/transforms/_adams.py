"""Group moments: Adam's scaling with one second moment per group."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax._checks import check_adam
from spherical_optax._engine.layout import Layout, per_entry, per_group_or_entry
from spherical_optax._engine.lift import lift
from spherical_optax._engine.state import state_like, zeros_per_group
from spherical_optax._engine.step import NOT_PER_LEAF, Step, optax_on_the_rest
from spherical_optax._engine.vector import Vector
from spherical_optax._numerics import bias_correction, safe_sqrt
from spherical_optax.groups import Groups


class ScaleByAdamsState(NamedTuple):
    """State of `scale_by_adams`.

    Attributes:
      count: Number of updates so far.
      mu: First moments, like the parameters.
      nu: Second moments, one per group; one per entry for a leaf without a group.
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

    Here d is the number of entries per group, and hats denote Adam's bias correction. One scale per
    group keeps the direction of the gradient; Adam's scale per entry changes it. Leaves without a
    group get `optax.scale_by_adam`.

    Args:
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator.
      groups: See [`spherical_optax.groups`][].
      mu_dtype: dtype of the first moment; that of the parameter if `None`.
      sqrt_dim: Whether to multiply by sqrt(d). With it, the step of one entry is as long as in
        Adam. Without it, the step of the whole group is as long as Adam's step of one entry.

    Returns:
      A transformation with state `ScaleByAdamsState`.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, if `groups` does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> tx = so.scale_by_adams(groups=so.per_layer())
      >>> params = jnp.ones(2)
      >>> updates, state = tx.update(jnp.array([3., 4.]), tx.init(params))
      >>> print(updates, state.nu.shape)
      [0.84852815 1.1313709 ] ()

    References:
      Roburin et al., Neurocomputing 2022 (AdamS).
    """
    check_adam("scale_by_adams", b1, b2, eps)
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)

    def init(params: optax.Params) -> ScaleByAdamsState:
        nu = zeros_per_group(Layout.at_init("scale_by_adams", groups, params))
        return ScaleByAdamsState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params, dtype=mu_dtype),
            nu=state_like(params, nu, optax.tree.zeros_like),
        )

    def prepare(layout: Layout, state: ScaleByAdamsState) -> Any:
        rest = optax_on_the_rest(adam, layout, optax.ScaleByAdamState(*state))
        count = optax.safe_increment(state.count)
        return ScaleByAdamsState(count, rest.mu, rest.nu), on_group

    def on_group(g: Vector, x: Vector, state: Any) -> tuple[Vector, Any]:
        del x
        m = (g * (1 - b1) + state.mu * b1).stored()
        v, denominator = group_moment(g.square(), state, b1, b2, eps)
        size = g.space.size if sqrt_dim else 1
        return m * (math.sqrt(size) / denominator), state._replace(mu=m, nu=v)

    shapes = ScaleByAdamsState(NOT_PER_LEAF, per_entry, per_group_or_entry)
    return lift(Step("scale_by_adams", groups, init, shapes, prepare, needs_params=False))


def group_moment(
    square: jax.Array, state: Any, b1: Any, b2: Any, eps: Any, radius: Any = 1, scale: Any = 1
) -> tuple[jax.Array, jax.Array]:
    """The second moment of the gradient on the sphere of a radius, and Adam's denominator.

    ```
    v = b2 v + (1 - b2) radius^2 |g|^2        (1 - b1^t) (sqrt(vhat) / radius + eps)
    ```

    `square` is |g|^2. The state has v and the number t of this step. `scale` is the radius, with 1
    in place of 0.
    """
    nu = state.nu
    first, second = (bias_correction(b, state.count, nu) for b in (b1, b2))
    square = (1 - b2) * square.astype(nu.dtype)
    variance = (b2 * nu / scale**2 + square) / second
    v = (b2 * nu + square * radius**2).astype(nu.dtype)
    return v, first * (safe_sqrt(variance) + eps)
