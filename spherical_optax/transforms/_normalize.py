"""Normalization: scales updates to the radius of their group, so that a step is an angle."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax import geometry
from spherical_optax._checks import check_number
from spherical_optax._engine.layout import Layout, check_type, per_group
from spherical_optax._engine.lift import lift
from spherical_optax._engine.state import pick, state_like, zero, zeros_per_group
from spherical_optax._engine.step import NOT_PER_LEAF, Step, stateless
from spherical_optax._engine.vector import Vector
from spherical_optax._numerics import bias_correction, safe_divide, safe_sqrt
from spherical_optax.groups import Groups


class NormalizeUpdatesState(NamedTuple):
    """State of `normalize_updates` with a running mean.

    Attributes:
      steps: Number of updates so far.
      mean_square: Running mean of |v|^2, one per group.
    """

    steps: jax.Array
    mean_square: optax.Params


def normalize_updates(
    groups: Groups, decay: jax.typing.ArrayLike | None = None, eps: jax.typing.ArrayLike = 0.0
) -> optax.GradientTransformationExtraArgs:
    """Scales each group's update to the length of its weights.

    ```
    |x| v / |v|                                  without decay
    |x| v / (sqrt(mean of |v|^2) + eps)          with decay: the length on average
    mean of |v|^2 = decay mean of |v|^2 + (1 - decay) |v|^2, corrected for its bias
    ```

    Multiplied by a learning rate, a tangent update then rotates its group by that many radians, to
    first order. A group of length 0 gets a step of 0. Leaves without a group keep their update.

    The sign does not change. Put this after a `scale_by_*` and before
    `optax.scale_by_learning_rate`, which flips the sign. Do not put it between a complete optimizer
    and `optax.scale_by_learning_rate`: the sign would be flipped twice, and the steps would climb.

    Args:
      groups: See [`spherical_optax.groups`][].
      decay: Decay rate of the running mean, in [0, 1). With `None`, each update is divided by its
        own length.
      eps: Added to the running length.

    Returns:
      A transformation; `update` needs params. With decay its state is `NormalizeUpdatesState`.
      Without decay it has no state.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, if `groups` does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> tx = so.normalize_updates(groups=so.per_layer())
      >>> params = jnp.array([3., 4.])
      >>> updates, _ = tx.update(jnp.array([0., 7.]), tx.init(params), params)
      >>> updates
      Array([0., 5.], dtype=float32)
    """
    if decay is not None:
        check_number("normalize_updates", "decay", decay, below=1)
    check_number("normalize_updates", "eps", eps)

    def init(params: optax.Params) -> NormalizeUpdatesState:
        zeros = zeros_per_group(Layout.at_init("normalize_updates", groups, params))
        return NormalizeUpdatesState(jnp.zeros([], jnp.int32), state_like(params, zeros, zero))

    def to_radius(v: Vector, x: Vector, state: Any) -> tuple[Vector, Any]:
        return v * safe_divide(x.norm(), v.norm()), state

    if decay is None:
        return lift(stateless("normalize_updates", groups, to_radius))

    def prepare(layout: Layout, state: NormalizeUpdatesState) -> Any:
        del layout
        return state._replace(steps=optax.safe_increment(state.steps)), on_average

    def on_average(v: Vector, x: Vector, state: Any) -> tuple[Vector, Any]:
        square = v.square().astype(state.mean_square.dtype)
        mean = decay * state.mean_square + (1 - decay) * square
        length = safe_sqrt(mean / bias_correction(decay, state.steps, mean)) + eps
        return v * safe_divide(x.norm(), length), state._replace(mean_square=mean)

    shapes = NormalizeUpdatesState(NOT_PER_LEAF, per_group)
    return lift(Step("normalize_updates", groups, init, shapes, prepare))


def center_updates(groups: Groups) -> optax.GradientTransformationExtraArgs:
    """Removes the mean of each group's update.

    ```
    v - mean(v)
    ```

    Weights that are centered before the first step, as by `center_params`, stay centered.

    Args:
      groups: See [`spherical_optax.groups`][].

    Returns:
      A stateless transformation.

    Raises:
      TypeError, ValueError: At `init`, if `groups` does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> tx = so.center_updates(groups=so.per_layer())
      >>> params = jnp.array([1., 3.])
      >>> tx.update(params, tx.init(params))[0]
      Array([-1.,  1.], dtype=float32)

    References:
      Kosson et al., Rotational Equilibrium, ICML 2024.
    """

    # Not a Step: a mean is not an inner product of a group's arrays.
    def init(params: optax.Params) -> optax.EmptyState:
        Layout.at_init("center_updates", groups, params)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del extra_args
        check_type("center_updates", state, optax.EmptyState)
        like = updates if params is None else None
        layout = Layout.read("center_updates", groups, params, updates, like=like)
        for joint in layout.present():
            for i, leaf in geometry.center(pick(joint, layout.updates), joint).items():
                layout.updates[i] = leaf
        return layout.trees(layout.updates)[0], state

    return optax.GradientTransformationExtraArgs(init, update)
