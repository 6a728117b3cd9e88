"""AdamG*: a variant of Adam on the sphere that is equivalent to SGD with L2."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax._checks import check_number
from spherical_optax._engine.layout import Layout, per_group
from spherical_optax._engine.lift import lift
from spherical_optax._engine.state import state_like, zero, zeros_per_group
from spherical_optax._engine.step import Step
from spherical_optax._engine.vector import Vector
from spherical_optax._numerics import safe_sqrt
from spherical_optax.groups import Groups


class ScaleByAdamgStarState(NamedTuple):
    """State of `scale_by_adamg_star`.

    Attributes:
      accumulator: 2 learning_rate^2 sqrt(beta) v of the formula, one value per group. It is r^4
        for the radius r that SGD would have, and 0 before the first update.
    """

    accumulator: optax.Params


def scale_by_adamg_star(
    learning_rate: jax.typing.ArrayLike, weight_decay: jax.typing.ArrayLike, *, groups: Groups
) -> optax.GradientTransformationExtraArgs:
    """Makes the steps of SGD with L2 on the sphere, with only a second moment as state.

    ```
    beta = (1 - learning_rate weight_decay)^4        v_0 = r_0^4 / (2 learning_rate^2 sqrt(beta))
    step of u:  - (2 beta)^(-1/2) grad L(u) / sqrt(v),   then  v = beta v + |grad L(u)|^2
    ```

    Here u = x / |x| is the direction, and grad L(u) = |x| grad L(x) its gradient. r_0 is the length
    of the group when training begins. The step of x is |x| times the step of u. Leaves without a
    group take the step of SGD with L2. The state does not depend on the learning rate, so an
    injected learning rate that changes has the same effect as on SGD.

    Args:
      learning_rate: The learning rate of SGD, a number.
      weight_decay: The L2 factor of SGD, a number. learning_rate weight_decay must be below 1.
      groups: See [`spherical_optax.groups`][].

    Returns:
      A transformation with state `ScaleByAdamgStarState`; `update` needs params. The updates
      include the learning rate and its sign: add them to the parameters.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, if `groups` does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> tx = so.scale_by_adamg_star(0.1, 0.0, groups=so.per_layer())
      >>> params = jnp.array([1., 0.])
      >>> tx.update(jnp.array([0., 1.]), tx.init(params), params)[0]
      Array([-0. , -0.1], dtype=float32)

    References:
      Roburin et al., Neurocomputing 2022 (equivalence of SGD and AdamG*).
    """
    check_number("scale_by_adamg_star", "learning_rate", learning_rate, above=0)
    rate: Any = learning_rate
    most = math.inf if isinstance(rate, jax.core.Tracer) else 1 / float(rate)
    check_number("scale_by_adamg_star", "weight_decay", weight_decay, below=most)
    shrinkage = 1 - rate * weight_decay

    def init(params: optax.Params) -> ScaleByAdamgStarState:
        zeros = zeros_per_group(Layout.at_init("scale_by_adamg_star", groups, params))
        return ScaleByAdamgStarState(state_like(params, zeros, zero))

    def prepare(layout: Layout, state: ScaleByAdamgStarState) -> Any:
        for i in layout.rest:
            g = layout.updates[i]
            step = -rate * (g + weight_decay * layout.params[i])
            layout.updates[i] = step.astype(g.dtype)
        return state, on_group

    def on_group(g: Vector, x: Vector, state: Any) -> tuple[Vector, Any]:
        square = x.square()
        # 0 means no memory, as for a remembered radius: begin with the current length.
        fourth = jnp.where(state.accumulator > 0, state.accumulator, square**2)
        root = safe_sqrt(fourth)
        # If the length of the group or the radius of SGD is 0, take the step of SGD.
        known = (square > 0) & (root > 0)
        factor = jnp.where(known, square / (shrinkage * jnp.where(known, root, 1)), 1)
        grown = 2 * (rate * shrinkage) ** 2 * square * g.square()
        return g * (-rate * factor), ScaleByAdamgStarState(shrinkage**4 * fourth + grown)

    shapes = ScaleByAdamgStarState(per_group)
    return lift(Step("scale_by_adamg_star", groups, init, shapes, prepare))
