"""Projection: removes the radial part of updates."""

from typing import Any

import optax

from spherical_optax._engine.lift import lift
from spherical_optax._engine.step import stateless
from spherical_optax._engine.vector import Vector
from spherical_optax._numerics import safe_divide
from spherical_optax.groups import Groups


def project_radial(groups: Groups) -> optax.GradientTransformationExtraArgs:
    """Removes the radial part of each group's update.

    ```
    v - <v, u> u,  u = x / |x|        (v where |x| = 0)
    ```

    Args:
      groups: See [`spherical_optax.groups`][].

    Returns:
      A stateless transformation; `update` needs params.

    Raises:
      TypeError, ValueError: At `init`, if `groups` does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> tx = optax.chain(so.project_radial(groups=so.per_layer()), optax.sgd(1.0))
      >>> params = jnp.array([2., 0.])
      >>> updates, _ = tx.update(jnp.array([1., 1.]), tx.init(params), params)
      >>> updates
      Array([-0., -1.], dtype=float32)

    References:
      Heo et al., AdamP, ICLR 2021, section 3.
    """

    def on_group(v: Vector, x: Vector, state: Any) -> tuple[Vector, Any]:
        return v - x * safe_divide(v.inner(x), x.square()), state

    return lift(stateless("project_radial", groups, on_group))
