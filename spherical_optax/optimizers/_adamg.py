"""AdamG, Adam on the unit sphere, and AdamG*, its variant that is equivalent to SGD with L2."""

import jax
import optax

from spherical_optax._checks import check_adam
from spherical_optax._checks.arguments import groups_by_name
from spherical_optax._checks.at_init import refuse_single_entries, require_other
from spherical_optax.groups import Groups
from spherical_optax.transforms import chain, retract, scale_by_adamg, scale_by_adamg_star
from spherical_optax.transforms._learning_rates import learning_rates_as


@groups_by_name
def adamg(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    groups: Groups,
    other: optax.GradientTransformation | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamG: Adam on the unit sphere of each group.

    ```
    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) |g|^2
    x' = (x - learning_rate mhat / (sqrt(vhat) + eps)) / |same|
    ```

    Then m is transported from x to x'. The first step puts each group on the unit sphere. A group
    that is much longer needs a few steps: see `retract`.

    For `nesterov` and `eps_root` see `adams`.

    Args:
      learning_rate: A number or a schedule. To first order it is the angle per step, in radians,
        while successive gradients agree.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator.
      groups: See [`spherical_optax.groups`][].
      other: The optimizer of leaves without a group, as in `hyperball`.
      mu_dtype: dtype of the first moment; that of the parameter if `None`.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, if `groups` does not fit the
        parameters, a group has one entry, or `other` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> tx = so.adamg(0.1, groups=so.per_layer())
      >>> params = jnp.array([3., 4.])
      >>> updates, _ = tx.update(jnp.array([4., -3.]), tx.init(params), params)
      >>> print(f"{so.geometry.norm(params + updates, so.per_layer()):.2f}")
      1.00

    References:
      Cho and Lee, Riemannian approach to batch normalization, NeurIPS 2017 (Adam-G), in
      the form of the code of Roburin et al., Neurocomputing 2022.
    """
    check_adam("adamg", b1, b2, eps)
    tx = chain(
        require_other("adamg", groups, other),
        scale_by_adamg(b1, b2, eps, groups=groups, mu_dtype=mu_dtype),
        learning_rates_as("adamg", learning_rate, groups, other),
        retract(groups, radius=1.0),
        who="adamg",
    )
    return refuse_single_entries("adamg", groups, tx)


@groups_by_name
def adamg_star(
    learning_rate: jax.typing.ArrayLike, weight_decay: jax.typing.ArrayLike = 0.0, *, groups: Groups
) -> optax.GradientTransformationExtraArgs:
    """AdamG*: follows the directions of SGD with L2, on the unit sphere.

    ```
    u' = retract(u - (2 beta)^(-1/2) grad L(u) / sqrt(v))        v' = beta v + |grad L(u)|^2
    beta = (1 - learning_rate weight_decay)^4        v_0 = r_0^4 / (2 learning_rate^2 sqrt(beta))
    ```

    The directions equal those of SGD to high order in the effective learning rate. In SGD, the
    growing radius makes steps rotate the weights less; here the second moment does so. The first
    step puts each group on the unit sphere. A group that is much longer needs a few steps: see
    `retract`.

    Args:
      learning_rate: The learning rate of SGD, a number.
      weight_decay: The L2 factor of SGD, a number.
      groups: See [`spherical_optax.groups`][]. Leaves without a group are trained by SGD with L2
        at the same learning rate, which the equivalence requires. For another optimizer of these
        leaves, use `optax.partition`.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, if `groups` does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> tx = so.adamg_star(0.1, groups=so.per_layer())
      >>> params, grads = jnp.array([0., 2.]), jnp.array([-0.5, 0.])
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(f"{so.geometry.angle(params, params + updates, so.per_layer()):.3f}")  # SGD's
      0.025

    References:
      Roburin et al., Neurocomputing 2022 (equivalence of SGD and AdamG*).
    """
    tx = chain(
        scale_by_adamg_star(learning_rate, weight_decay, groups=groups),
        retract(groups, radius=1.0),
        who="adamg_star",
    )
    return refuse_single_entries("adamg_star", groups, tx)
