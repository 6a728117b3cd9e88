"""AdamS and AdamSRT, with coupled and with decoupled weight decay."""

import jax
import optax

from spherical_optax._checks import check_adam
from spherical_optax._checks.arguments import groups_by_name
from spherical_optax._masks import Mask
from spherical_optax.groups import Groups
from spherical_optax.optimizers._common import decayed_weights, learning_rates
from spherical_optax.transforms import chain, scale_by_adams, scale_by_adamsrt


@groups_by_name
def adams(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    groups: Groups,
    other_learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamS: Adam with one second moment per radially invariant group.

    ```
    g = grad L(x) + weight_decay x
    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) |g|^2
    x' = x - learning_rate sqrt(d) mhat / (sqrt(vhat) + eps)
    ```

    Weight decay is coupled: weight_decay x is added to the gradient.

    There is no `nesterov`, because no such form is published. For Nesterov momentum, put
    `transport_moments(optax.scale_by_adam(nesterov=True), groups)` before the learning rate (for
    `sgdmrt`, `transport_moments(optax.trace(momentum, nesterov=True), groups)`). There is no
    `eps_root`: it keeps gradients through the square root finite at zero, and they are finite here.

    Args:
      learning_rate: A number or a schedule.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator.
      groups: See [`spherical_optax.groups`][]. Leaves without a group are trained as by
        `optax.adam`.
      other_learning_rate: The learning rate of leaves without a group; `learning_rate` if `None`.
      weight_decay: Factor of the L2 term.
      mask: The leaves that decay, as in `optax.adamw`; all if `None`.
      mu_dtype: dtype of the first moment; that of the parameter if `None`.

    Returns:
      The optimizer.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, if `groups` or `mask`
        does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> tx = so.adams(0.1, groups=so.per_layer())
      >>> params = jnp.array([3., 4.])
      >>> tx.update(jnp.array([8., -6.]), tx.init(params), params)[0]  # along the gradient
      Array([-0.1131, 0.0849], dtype=float32)

    References:
      Roburin et al., Spherical perspective on learning with normalization layers,
      Neurocomputing 2022.
    """
    check_adam("adams", b1, b2, eps)
    return chain(
        decayed_weights("adams", weight_decay, mask),
        scale_by_adams(b1, b2, eps, groups=groups, mu_dtype=mu_dtype),
        learning_rates("adams", learning_rate, other_learning_rate, groups),
        who="adams",
    )


@groups_by_name
def adamsrt(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    groups: Groups,
    other_learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamSRT: AdamS whose moments are rescaled and transported as the groups move.

    The update formula is that of `adams`. Between steps the moments are rescaled and transported
    as by `transport_moments`; `scale_by_adamsrt` describes the stored form. For `nesterov` and
    `eps_root` see `adams`.

    Weight decay is coupled: weight_decay x is added to the gradient.

    Args:
      learning_rate: A number or a schedule.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator.
      groups: See [`spherical_optax.groups`][]. Leaves without a group are trained as by
        `optax.adam`.
      other_learning_rate: The learning rate of leaves without a group; `learning_rate` if `None`.
      weight_decay: Factor of the L2 term. In groups it acts 1 - b1 times as strongly as in
        `adams`, because its momentum is radial and is not carried to the next step.
      mask: The leaves that decay, as in `optax.adamw`; all if `None`.
      mu_dtype: dtype of the first moment; that of the parameter if `None`.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, if `groups` or `mask`
        does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> tx = so.adamsrt(0.1, groups=so.per_layer())
      >>> params = jnp.array([3., 4.])
      >>> tx.update(jnp.array([8., -6.]), tx.init(params), params)[0]
      Array([-0.1131, 0.0849], dtype=float32)

    References:
      Roburin et al., Neurocomputing 2022.
    """
    check_adam("adamsrt", b1, b2, eps)
    return chain(
        decayed_weights("adamsrt", weight_decay, mask),
        scale_by_adamsrt(b1, b2, eps, groups=groups, mu_dtype=mu_dtype),
        learning_rates("adamsrt", learning_rate, other_learning_rate, groups),
        who="adamsrt",
    )


@groups_by_name
def adamsw(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    groups: Groups,
    other_learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: jax.typing.ArrayLike = 1e-4,
    mask: Mask = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamS with decoupled weight decay.

    ```
    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) |g|^2
    x' = x - learning_rate (sqrt(d) mhat / (sqrt(vhat) + eps) + weight_decay x)
    ```

    Weight decay is decoupled: it shortens the weights and does not enter the moments.
    It does not rotate a group, but determines how large its effective learning rate becomes. For
    `nesterov` and `eps_root` see `adams`.

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
      mu_dtype: dtype of the first moment; that of the parameter if `None`.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, if `groups` or `mask`
        does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> tx = so.adamsw(0.1, groups=so.per_layer(), weight_decay=0.5)
      >>> params = jnp.array([3., 4.])
      >>> tx.update(jnp.zeros(2), tx.init(params), params)[0]
      Array([-0.15, -0.2 ], dtype=float32)

    References:
      Roburin et al., Neurocomputing 2022 (AdamS); Loshchilov and Hutter, Decoupled weight decay
      regularization, ICLR 2019.
    """
    check_adam("adamsw", b1, b2, eps)
    return chain(
        scale_by_adams(b1, b2, eps, groups=groups, mu_dtype=mu_dtype),
        decayed_weights("adamsw", weight_decay, mask),
        learning_rates("adamsw", learning_rate, other_learning_rate, groups),
        who="adamsw",
    )


@groups_by_name
def adamsrtw(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    groups: Groups,
    other_learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: jax.typing.ArrayLike = 1e-4,
    mask: Mask = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamSRT with decoupled weight decay.

    The update formula is that of `adamsw`. The moments are carried as in `adamsrt`, and are also
    rescaled when decay changes the length of a group. Weight decay is decoupled: it shortens the
    weights and does not enter the moments.

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
      mu_dtype: dtype of the first moment; that of the parameter if `None`.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, if `groups` or `mask`
        does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> tx = so.adamsrtw(0.1, groups=so.per_layer(), weight_decay=0.5)
      >>> params = jnp.array([3., 4.])
      >>> tx.update(jnp.zeros(2), tx.init(params), params)[0]
      Array([-0.15, -0.2 ], dtype=float32)

    References:
      Roburin et al., Neurocomputing 2022 (AdamSRT); Loshchilov and Hutter, ICLR 2019.
    """
    check_adam("adamsrtw", b1, b2, eps)
    return chain(
        scale_by_adamsrt(b1, b2, eps, groups=groups, mu_dtype=mu_dtype),
        decayed_weights("adamsrtw", weight_decay, mask),
        learning_rates("adamsrtw", learning_rate, other_learning_rate, groups),
        who="adamsrtw",
    )
