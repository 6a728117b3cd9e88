"""AdamG's moments: group moments that are transported but not rescaled."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax._checks import check_adam
from spherical_optax._engine.layout import Layout, per_entry_in_groups, per_group
from spherical_optax._engine.lift import lift
from spherical_optax._engine.state import state_like, zero, zeros_per_group
from spherical_optax._engine.step import NOT_PER_LEAF, Step
from spherical_optax._engine.vector import Vector
from spherical_optax.groups import Groups
from spherical_optax.transforms._adams import group_moment
from spherical_optax.transforms._adamsrt import carry


class ScaleByAdamgState(NamedTuple):
    """State of `scale_by_adamg`.

    Attributes:
      count: Number of updates so far.
      mu: First moments without their radial part, like the parameters; one 0 for a leaf without a
        group.
      nu: Second moments, one per group.
    """

    count: jax.Array  # type: ignore[assignment]
    mu: optax.Updates
    nu: optax.Updates


def scale_by_adamg(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    groups: Groups,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales by group moments, transported as the groups move on spheres of a fixed radius.

    ```
    m = b1 T(m) + (1 - b1) g        v = b2 v + (1 - b2) |g|^2        (v: one per group)
    mhat / (sqrt(vhat) + eps)
    ```

    Hats denote Adam's bias correction. T is the transport from the previous point to x, as in
    `transport_moments`. Leaves without a group keep their update.

    Args:
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator.
      groups: See [`spherical_optax.groups`][].
      mu_dtype: dtype of the first moment; that of the parameter if `None`.

    Returns:
      A transformation with state `ScaleByAdamgState`; `update` needs params.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, if `groups` does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> tx = so.scale_by_adamg(groups=so.per_layer())
      >>> params = jnp.array([1., 0.])
      >>> updates, state = tx.update(jnp.array([0., 4.]), tx.init(params), params)
      >>> print(updates, state.mu)
      [0. 1.] [0.  0.4]

    References:
      Cho and Lee, Riemannian approach to batch normalization, NeurIPS 2017 (Adam-G).
    """
    check_adam("scale_by_adamg", b1, b2, eps)

    def init(params: optax.Params) -> ScaleByAdamgState:
        layout = Layout.at_init("scale_by_adamg", groups, params)
        like = {i: layout.params[i] for joint in layout.joints for i in joint}
        mu = {i: jnp.zeros_like(leaf, dtype=mu_dtype) for i, leaf in like.items()}
        return ScaleByAdamgState(
            count=jnp.zeros([], jnp.int32),
            mu=state_like(params, mu, zero),
            nu=state_like(params, zeros_per_group(layout), zero),
        )

    def prepare(layout: Layout, state: ScaleByAdamgState) -> Any:
        del layout
        return state._replace(count=optax.safe_increment(state.count)), on_group

    def on_group(g: Vector, x: Vector, state: Any) -> tuple[Vector, Any]:
        m, radial = state.mu * b1 + g * (1 - b1), 0
        if g.space.size > 1:
            m, radial = carry(state.mu, g * (1 - b1), x, b1)
        m = m.stored()
        v, denominator = group_moment(g.square(), state, b1, b2, eps)
        return (m + x * radial) * (1 / denominator), state._replace(mu=m, nu=v)

    shapes = ScaleByAdamgState(NOT_PER_LEAF, per_entry_in_groups, per_group)
    return lift(Step("scale_by_adamg", groups, init, shapes, prepare))
