"""SGD-MRT: momentum SGD on the sphere."""

import jax
import optax

from spherical_optax._checks import check_number
from spherical_optax._checks.arguments import groups_by_name
from spherical_optax._masks import Mask
from spherical_optax.groups import Groups
from spherical_optax.optimizers._common import decayed_weights, decays, learning_rates
from spherical_optax.transforms import chain, transported_trace


@groups_by_name
def sgdmrt(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
    dampening: jax.typing.ArrayLike = 0.0,
    *,
    groups: Groups,
    other_learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask = None,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SGD-MRT: momentum SGD whose momentum is rescaled and transported.

    ```
    g = grad L(x) + weight_decay x
    m = momentum m + (1 - dampening) g        x' = x - learning_rate m
    ```

    Weight decay is coupled: weight_decay x is added to the gradient. For `nesterov` see `adams`.

    Args:
      learning_rate: A number or a schedule.
      momentum: Decay rate of the momentum, in [0, 1).
      dampening: Fraction of the gradient that is kept out of the momentum, in [0, 1).
      groups: See [`spherical_optax.groups`][]. Leaves without a group are trained as by
        `optax.sgd`.
      other_learning_rate: The learning rate of leaves without a group; `learning_rate` if `None`.
      weight_decay: Factor of the L2 term. In groups it acts 1 - momentum times as strongly as in
        `optax.sgd` after `optax.add_decayed_weights`, because its momentum is radial and is not
        carried to the next step.
      mask: The leaves that decay, as in `optax.adamw`; all if `None`.
      accumulator_dtype: dtype of the momentum; that of the parameter if `None`.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, if `groups` or `mask`
        does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> tx = so.sgdmrt(0.1, groups=so.per_layer())
      >>> params = jnp.array([3., 4.])
      >>> tx.update(jnp.array([8., -6.]), tx.init(params), params)[0]
      Array([-0.8, 0.6], dtype=float32)

    References:
      Roburin et al., Neurocomputing 2022.
    """
    check_number("sgdmrt", "momentum", momentum, below=1)
    check_number("sgdmrt", "dampening", dampening, below=1)
    return chain(
        decayed_weights("sgdmrt", weight_decay, mask),
        optax.scale(1 - dampening) if decays(dampening) else optax.identity(),
        transported_trace(momentum, groups=groups, accumulator_dtype=accumulator_dtype),
        learning_rates("sgdmrt", learning_rate, other_learning_rate, groups),
        who="sgdmrt",
    )
