"""AdamP and SGDP: Adam and momentum SGD, with updates projected where gradients are tangent."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from spherical_optax._checks import check_adam, check_number
from spherical_optax._checks.arguments import groups_by_name
from spherical_optax._masks import Mask
from spherical_optax.groups import Groups
from spherical_optax.optimizers._common import decays, learning_rates
from spherical_optax.transforms import chain
from spherical_optax.transforms._project_if_tangent import project_if_tangent_as


@groups_by_name
def adamp(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    groups: Groups,
    other_learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask = None,
    delta: jax.typing.ArrayLike = 0.1,
    wd_ratio: jax.typing.ArrayLike = 0.1,
    nesterov: bool = False,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamP: AdamW, with updates projected where gradients are nearly tangent.

    ```
    p = mhat / (sqrt(vhat) + eps), projected by project_if_tangent
    x' = x - learning_rate (p + weight_decay x (times wd_ratio where projected))
    ```

    Weight decay is decoupled: it shortens the weights and does not enter the moments.

    Args:
      learning_rate: A number or a schedule.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator.
      groups: See [`spherical_optax.groups`][]. Leaves without a group are trained as by
        `optax.adamw`.
      other_learning_rate: The learning rate of leaves without a group; `learning_rate` if `None`.
      weight_decay: Decay factor, which is multiplied by the learning rate.
      mask: The leaves that decay, as in `optax.adamw`; all if `None`.
      delta: Threshold for sqrt(d) times the cosine between gradient and weights, with d entries
        per group.
      wd_ratio: Factor on the decay where updates are projected, in [0, 1].
      nesterov: Whether to use b1 m + (1 - b1) g in place of m. Its bias is corrected as that of m;
        `optax.adam` corrects it for one more step.
      mu_dtype: dtype of the first moment; that of the parameter if `None`.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, if `groups` or `mask`
        does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> tx = so.adamp(0.1, groups=so.per_layer())
      >>> params = jnp.array([3., 4.])
      >>> tx.update(jnp.array([8., -6.]), tx.init(params), params)[0]  # orthogonal to params
      Array([-0.112, 0.084], dtype=float32)

    References:
      Heo et al., AdamP: slowing down the slowdown for momentum optimizers on
      scale-invariant weights, ICLR 2021.
    """
    check_adam("adamp", b1, b2, eps)
    if nesterov:
        adam = _scale_by_nesterov_adam(b1, b2, eps, mu_dtype)
    else:
        adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)
    return chain(
        project_if_tangent_as("adamp", adam, groups, delta, weight_decay, mask, wd_ratio),
        learning_rates("adamp", learning_rate, other_learning_rate, groups),
        who="adamp",
    )


def _scale_by_nesterov_adam(
    b1: Any, b2: Any, eps: Any, mu_dtype: Any
) -> optax.GradientTransformation:
    """`optax.scale_by_adam(nesterov=True)` with the bias correction of the published AdamP."""

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        mu, nu = optax.tree.zeros_like(params, dtype=mu_dtype), optax.tree.zeros_like(params)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        ahead = optax.tree.update_moment(updates, mu, b1, 1)
        updates = jax.tree.map(
            lambda m, v: m / (jnp.sqrt(v) + eps),
            optax.tree.bias_correction(ahead, b1, count),
            optax.tree.bias_correction(nu, b2, count),
        )
        return updates, optax.ScaleByAdamState(count, optax.tree.cast(mu, mu_dtype), nu)

    return optax.GradientTransformation(init, update)


@groups_by_name
def sgdp(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
    dampening: jax.typing.ArrayLike = 0.0,
    *,
    groups: Groups,
    other_learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask = None,
    delta: jax.typing.ArrayLike = 0.1,
    wd_ratio: jax.typing.ArrayLike = 0.1,
    nesterov: bool = False,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SGDP: momentum SGD, with updates projected where gradients are nearly tangent.

    ```
    m = momentum m + (1 - dampening) g, projected by project_if_tangent
    x' = x - learning_rate (m + weight_decay / (1 - momentum) x (times wd_ratio ...))
    ```

    Weight decay is decoupled: it shortens the weights and does not enter the moments.

    Args:
      learning_rate: A number or a schedule.
      momentum: Decay rate of the momentum, in [0, 1).
      dampening: Fraction of the gradient that is kept out of the momentum, in [0, 1).
      groups: See [`spherical_optax.groups`][]. Leaves without a group are trained as by
        `optax.sgd`.
      other_learning_rate: The learning rate of leaves without a group; `learning_rate` if `None`.
      weight_decay: Decay factor, which is multiplied by the learning rate and divided by
        1 - momentum.
      mask: The leaves that decay, as in `optax.adamw`; all if `None`.
      delta: Threshold for sqrt(d) times the cosine between gradient and weights, with d entries
        per group.
      wd_ratio: Factor on the decay where updates are projected, in [0, 1].
      nesterov: Whether to use Nesterov momentum.
      accumulator_dtype: dtype of the momentum; that of the parameter if `None`.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, if `groups` or `mask`
        does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> tx = so.sgdp(0.1, groups=so.per_layer(), weight_decay=0.1)
      >>> params = jnp.array([3., 4.])
      >>> tx.update(jnp.array([8., -6.]), tx.init(params), params)[0]  # a tenth of the decay
      Array([-0.83, 0.56 ], dtype=float32)

    References:
      Heo et al., AdamP, ICLR 2021.
    """
    check_number("sgdp", "momentum", momentum, below=1)
    check_number("sgdp", "dampening", dampening, below=1)
    trace = optax.trace(momentum, nesterov=nesterov, accumulator_dtype=accumulator_dtype)
    decay, moments = weight_decay / (1 - momentum), () if nesterov else ("trace",)
    return chain(
        optax.scale(1 - dampening) if decays(dampening) else optax.identity(),
        project_if_tangent_as("sgdp", trace, groups, delta, decay, mask, wd_ratio, moments),
        learning_rates("sgdp", learning_rate, other_learning_rate, groups),
        who="sgdp",
    )
