"""Projection: updates without their radial part."""

from typing import Any

import optax

from spherical_optax import geometry
from spherical_optax.groups import Groups
from spherical_optax.transforms._lift import lift
from spherical_optax.transforms._pair import resolve
from spherical_optax.transforms._span import Step, Vector, only


def project_radial(groups: Groups) -> optax.GradientTransformationExtraArgs:
    """Removes the radial part of each group's update.

    ```
    v - <v, u> u,  u = x / |x|        (v where |x| = 0)
    ```

    Args:
      groups: See the module `spherical_optax.groups`.

    Returns:
      A stateless transformation; `update` needs params.

    Raises:
      TypeError, ValueError: At `init`, if `groups` does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import spherical_optax as so
      >>> tx = optax.chain(so.project_radial(groups=so.per_layer()), optax.sgd(1.0))
      >>> params = jnp.array([2., 0.])
      >>> updates, _ = tx.update(jnp.array([1., 1.]), tx.init(params), params)
      >>> updates
      Array([-0., -1.], dtype=float32)

    References:
      Heo et al., AdamP, ICLR 2021, section 3.
    """

    def init(params: optax.Params) -> optax.EmptyState:
        resolve("project_radial", groups, params)
        return optax.EmptyState()

    def on_group(v: Vector, x: Vector, state: Any) -> tuple[Vector, Any]:
        return v - x * geometry.safe_divide(v.inner(x), x.square()), state

    return lift(Step("project_radial", groups, init, optax.EmptyState(), only(on_group)))
