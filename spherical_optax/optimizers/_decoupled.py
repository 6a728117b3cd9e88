"""AdamS and AdamSRT with decoupled weight decay, as `optax.adamw` is to `optax.adam`."""

import jax
import optax

from spherical_optax._masks import Mask
from spherical_optax.groups import Groups
from spherical_optax.optimizers._parts import decayed_weights, learning_rates
from spherical_optax.transforms import scale_by_adams, scale_by_adamsrt
from spherical_optax.transforms._lift import chain


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

    The decay of a group is radial: it does not turn it, and sets how large its effective
    learning rate becomes. For `nesterov` and `eps_root` see `adams`.

    Args:
      learning_rate: A number or a schedule.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator.
      groups: See the module `spherical_optax.groups`. Leaves without a group follow
        `optax.adamw`.
      other_learning_rate: That of leaves without a group, a number or a schedule;
        `learning_rate` if `None`.
      weight_decay: Decoupled decay, times the learning rate.
      mask: The leaves that decay, as in `optax.adamw`: a tree of booleans, or a prefix of one,
        or a function of the parameters that returns one; all if `None`.
      mu_dtype: dtype of the first moment; the parameter's if `None`.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, if `groups` or `mask`
        does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> tx = so.adamsw(0.1, groups=so.per_layer(), weight_decay=0.5)
      >>> params = jnp.array([3., 4.])
      >>> tx.update(jnp.zeros(2), tx.init(params), params)[0]
      Array([-0.15, -0.2 ], dtype=float32)

    References:
      Roburin et al., Spherical perspective on learning with normalization layers,
      Neurocomputing 2022 (AdamS); Loshchilov and Hutter, Decoupled weight decay
      regularization, ICLR 2019.
    """
    return chain(
        scale_by_adams(b1, b2, eps, groups=groups, mu_dtype=mu_dtype),
        decayed_weights("adamsw", weight_decay, mask),
        learning_rates("adamsw", learning_rate, other_learning_rate, groups),
        who="adamsw",
    )


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

    The update is that of `adamsw`; the moments are carried as in `adamsrt`, along decay too:
    they are rescaled as it shortens the group.

    Args:
      learning_rate: A number or a schedule.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator.
      groups: See the module `spherical_optax.groups`. Leaves without a group follow
        `optax.adamw`.
      other_learning_rate: That of leaves without a group, a number or a schedule;
        `learning_rate` if `None`.
      weight_decay: Decoupled decay, times the learning rate.
      mask: The leaves that decay, as in `optax.adamw`: a tree of booleans, or a prefix of one,
        or a function of the parameters that returns one; all if `None`.
      mu_dtype: dtype of the first moment; the parameter's if `None`.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, if `groups` or `mask`
        does not fit the parameters.

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
    return chain(
        scale_by_adamsrt(b1, b2, eps, groups=groups, mu_dtype=mu_dtype),
        decayed_weights("adamsrtw", weight_decay, mask),
        learning_rates("adamsrtw", learning_rate, other_learning_rate, groups),
        who="adamsrtw",
    )
