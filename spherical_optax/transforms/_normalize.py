"""Normalization: updates as long as their group's radius, so that a step is an angle."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax import geometry
from spherical_optax._checks import check_number
from spherical_optax.groups import Groups
from spherical_optax.transforms._adams import bias_correction
from spherical_optax.transforms._lift import lift
from spherical_optax.transforms._pair import check_type, pair, per_group, resolve
from spherical_optax.transforms._span import Step, Vector, only, shared
from spherical_optax.transforms._units import (
    pick,
    present,
    state_like,
    zero,
    zeros_per_group,
)


class NormalizeUpdatesState(NamedTuple):
    """State of `normalize_updates` with a running mean.

    Attributes:
      steps: Number of updates so far.
      mean_square: Running mean of |v|^2, one per group.
    """

    steps: jax.Array
    mean_square: optax.Params


def normalize_updates(
    groups: Groups,
    decay: jax.typing.ArrayLike | None = None,
    eps: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Scales each group's update to the length of its weights.

    ```
    |x| v / |v|                                  without decay
    |x| v / (sqrt(mean of |v|^2) + eps)          with decay: the length on average
    mean of |v|^2 = decay mean of |v|^2 + (1 - decay) |v|^2, corrected for its bias
    ```

    Times a learning rate, a tangent update then turns its group by that many radians, to
    first order. A group of length 0 gets a step of 0. Leaves without a group keep their update.

    The sign stays. It goes behind a `scale_by_*` and before `optax.scale_by_learning_rate`,
    which turns the sign; behind a whole optimizer, which has turned it, a second time climbs.

    Args:
      groups: See the module `spherical_optax.groups`.
      decay: Decay rate of the running mean, in [0, 1), or `None` for this update's length.
      eps: Added to the running length.

    Returns:
      A transformation with state `NormalizeUpdatesState`, or none without decay; `update`
      needs params.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, if `groups` does
        not fit the parameters.

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

    def init(params: optax.Params) -> NormalizeUpdatesState | optax.EmptyState:
        units, x = resolve("normalize_updates", groups, params)
        if decay is None:
            return optax.EmptyState()
        zeros = zeros_per_group(units, x)
        return NormalizeUpdatesState(jnp.zeros([], jnp.int32), state_like(params, zeros, zero))

    def to_radius(v: Vector, x: Vector, state: Any) -> tuple[Vector, Any]:
        return v * geometry.safe_divide(x.norm(), v.norm()), state

    if decay is None:
        return lift(Step("normalize_updates", groups, init, optax.EmptyState(), only(to_radius)))

    def begin(updates: Any, state: NormalizeUpdatesState, params: Any) -> Any:
        del params
        return updates, state._replace(steps=optax.safe_increment(state.steps)), on_average

    def on_average(v: Vector, x: Vector, state: Any) -> tuple[Vector, Any]:
        square = v.square().astype(state.mean_square.dtype)
        mean = decay * state.mean_square + (1 - decay) * square
        length = geometry.safe_sqrt(mean / bias_correction(decay, state.steps, mean)) + eps
        return v * geometry.safe_divide(x.norm(), length), state._replace(mean_square=mean)

    kinds = NormalizeUpdatesState(shared, per_group)
    return lift(Step("normalize_updates", groups, init, kinds, begin))


def center_updates(groups: Groups) -> optax.GradientTransformationExtraArgs:
    """Removes the mean of each group's update.

    ```
    v - mean(v)
    ```

    Weights that were centred before the first step, as by `center_params`, stay so.

    Args:
      groups: See the module `spherical_optax.groups`.

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

    def init(params: optax.Params) -> optax.EmptyState:
        resolve("center_updates", groups, params)
        return optax.EmptyState()

    def update(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del extra_args
        check_type("center_updates", state, optax.EmptyState)
        like = updates if params is None else params
        units, _, (v,), unflatten = pair("center_updates", groups, like, updates)
        for unit in present(units, v, like):
            for i, leaf in geometry.center(pick(unit, v), unit).items():
                v[i] = leaf
        return *unflatten(v), state

    return optax.GradientTransformationExtraArgs(init, update)
