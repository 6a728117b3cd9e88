"""AdamS, AdamSRT, SGD-MRT and AdamG: the optimizers of the paper."""

import jax
import optax

from spherical_optax._checks import check_number
from spherical_optax._masks import Mask
from spherical_optax.groups import Groups
from spherical_optax.optimizers._at_init import refuse_single_entries
from spherical_optax.optimizers._parts import decayed_weights, decays, learning_rates
from spherical_optax.transforms import (
    retract,
    scale_by_adamg_star,
    scale_by_adams,
    scale_by_adamsrt,
    transported_trace,
)
from spherical_optax.transforms._adamg import scale_by_adamg
from spherical_optax.transforms._lift import chain


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

    There is no `nesterov`, as no such form is published (for one, put
    `transport_moments(optax.scale_by_adam(nesterov=True), groups)` before the learning rate),
    and no `eps_root`, which is for gradients through the root at zero: in groups they pass.

    Args:
      learning_rate: A number or a schedule.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator.
      groups: See the module `spherical_optax.groups`. Leaves without a group follow
        `optax.adam`.
      other_learning_rate: That of leaves without a group, a number or a schedule;
        `learning_rate` if `None`.
      weight_decay: Factor of the coupled L2 term.
      mask: The leaves that decay, as in `optax.adamw`: a tree of booleans, or a prefix of one,
        or a function of the parameters that returns one; all if `None`.
      mu_dtype: dtype of the first moment; the parameter's if `None`.

    Returns:
      The optimizer.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, if `groups` or `mask`
        does not fit the parameters.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> loss = lambda x: -x[0] / jnp.linalg.norm(x)
      >>> params = jnp.array([0., 1.])
      >>> tx = so.adams(0.1, groups=so.per_layer())
      >>> state = tx.init(params)
      >>> for _ in range(20):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{loss(params):.2f}")
      -1.00

    References:
      Roburin et al., Spherical perspective on learning with normalization layers,
      Neurocomputing 2022.
    """
    return chain(
        decayed_weights("adams", weight_decay, mask),
        scale_by_adams(b1, b2, eps, groups=groups, mu_dtype=mu_dtype),
        learning_rates("adams", learning_rate, other_learning_rate, groups),
        who="adams",
        needs_params=decays(weight_decay),
    )


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

    The update is that of `adams`; the moments are carried as `transport_moments` does, and
    kept as `scale_by_adamsrt` says.

    There is no `nesterov`, as no such form is published (for one, put
    `transport_moments(optax.scale_by_adam(nesterov=True), groups)` before the learning rate),
    and no `eps_root`, which is for gradients through the root at zero: in groups they pass.

    Args:
      learning_rate: A number or a schedule.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator.
      groups: See the module `spherical_optax.groups`. Leaves without a group follow
        `optax.adam`.
      other_learning_rate: That of leaves without a group, a number or a schedule;
        `learning_rate` if `None`.
      weight_decay: Factor of the coupled L2 term. In groups it acts 1 - b1 times as strongly
        as in `adams`: its momentum is radial, and not carried.
      mask: The leaves that decay, as in `optax.adamw`: a tree of booleans, or a prefix of one,
        or a function of the parameters that returns one; all if `None`.
      mu_dtype: dtype of the first moment; the parameter's if `None`.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, if `groups` or `mask`
        does not fit the parameters.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> loss = lambda x: -x[0] / jnp.linalg.norm(x)
      >>> params = jnp.array([0., 1.])
      >>> tx = so.adamsrt(0.1, groups=so.per_layer())
      >>> state = tx.init(params)
      >>> for _ in range(50):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{loss(params):.2f}")
      -1.00

    References:
      Roburin et al., Spherical perspective on learning with normalization layers,
      Neurocomputing 2022.
    """
    return chain(
        decayed_weights("adamsrt", weight_decay, mask),
        scale_by_adamsrt(b1, b2, eps, groups=groups, mu_dtype=mu_dtype),
        learning_rates("adamsrt", learning_rate, other_learning_rate, groups),
        who="adamsrt",
    )


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

    There is no `nesterov`, as no such form is published: for one, put
    `transport_moments(optax.trace(momentum, nesterov=True), groups)` before the learning rate.

    Args:
      learning_rate: A number or a schedule.
      momentum: Decay rate of the momentum, in [0, 1).
      dampening: Fraction of the gradient kept out of the momentum, in [0, 1).
      groups: See the module `spherical_optax.groups`. Leaves without a group follow
        `optax.sgd`.
      other_learning_rate: That of leaves without a group, a number or a schedule;
        `learning_rate` if `None`.
      weight_decay: Factor of the coupled L2 term. In groups it acts 1 - momentum times as
        strongly as in `optax.sgd` after `optax.add_decayed_weights`: its momentum is
        radial, and not carried.
      mask: The leaves that decay, as in `optax.adamw`: a tree of booleans, or a prefix of one,
        or a function of the parameters that returns one; all if `None`.
      accumulator_dtype: dtype of the momentum; the parameter's if `None`.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, if `groups` or `mask`
        does not fit the parameters.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> loss = lambda x: -x[0] / jnp.linalg.norm(x)
      >>> params = jnp.array([0., 1.])
      >>> tx = so.sgdmrt(0.1, groups=so.per_layer())
      >>> state = tx.init(params)
      >>> for _ in range(50):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{loss(params):.2f}")
      -1.00

    References:
      Roburin et al., Spherical perspective on learning with normalization layers,
      Neurocomputing 2022.
    """
    check_number("sgdmrt", "momentum", momentum, below=1)
    check_number("sgdmrt", "dampening", dampening, below=1)
    dampened = not (isinstance(dampening, (int, float)) and dampening == 0)
    return chain(
        decayed_weights("sgdmrt", weight_decay, mask),
        optax.scale(1 - dampening) if dampened else optax.identity(),
        transported_trace(momentum, groups=groups, accumulator_dtype=accumulator_dtype),
        learning_rates("sgdmrt", learning_rate, other_learning_rate, groups),
        who="sgdmrt",
    )


def adamg(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    groups: Groups,
    other_learning_rate: optax.ScalarOrSchedule | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamG: Adam on the unit sphere of each group.

    ```
    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) |g|^2
    x' = (x - learning_rate mhat / (sqrt(vhat) + eps)) / |same|
    ```

    and m is transported from x to x'. The first step puts each group on its sphere, or the
    first few where it is far longer: see `retract`.

    There is no `nesterov`, as no such form is published (for one, put
    `transport_moments(optax.scale_by_adam(nesterov=True), groups)` before the learning rate),
    and no `eps_root`, which is for gradients through the root at zero: in groups they pass.

    Args:
      learning_rate: A number or a schedule: the angle of a step, in radians, to first
        order, where gradients agree.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator.
      groups: See the module `spherical_optax.groups`. Leaves without a group follow
        `optax.adam`.
      other_learning_rate: That of leaves without a group, a number or a schedule;
        `learning_rate` if `None`.
      mu_dtype: dtype of the first moment; the parameter's if `None`.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, if `groups` does
        not fit the parameters.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> loss = lambda x: -x[0] / jnp.linalg.norm(x)
      >>> params = jnp.array([0., 1.])
      >>> tx = so.adamg(0.1, groups=so.per_layer())
      >>> state = tx.init(params)
      >>> for _ in range(50):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{loss(params):.2f} {jnp.linalg.norm(params):.2f}")
      -1.00 1.00

    References:
      Cho and Lee, Riemannian approach to batch normalization, NeurIPS 2017 (Adam-G), in
      the form of the code of Roburin et al., Neurocomputing 2022.
    """
    tx = chain(
        scale_by_adamg(b1, b2, eps, groups=groups, mu_dtype=mu_dtype),
        learning_rates("adamg", learning_rate, other_learning_rate, groups),
        retract(groups, radius=1.0),
        who="adamg",
    )
    return refuse_single_entries("adamg", groups, tx)


def adamg_star(
    learning_rate: jax.typing.ArrayLike,
    weight_decay: jax.typing.ArrayLike = 0.0,
    *,
    groups: Groups,
) -> optax.GradientTransformationExtraArgs:
    """AdamG*: traces the directions of SGD with L2, on the unit sphere.

    ```
    u' = retract(u - (2 beta)^(-1/2) grad L(u) / sqrt(v))        v' = beta v + |grad L(u)|^2
    beta = (1 - learning_rate weight_decay)^4        v_0 = r_0^4 / (2 learning_rate^2 sqrt(beta))
    ```

    Equal to SGD to high order in its effective learning rate: what the growing radius does
    to SGD's steps, the second moment does here. The first step puts each group on its
    sphere, after which its radius is 1, or the first few where it is far longer: see
    `retract`.

    Args:
      learning_rate: That of the SGD, a number.
      weight_decay: Its L2 factor, a number.
      groups: See the module `spherical_optax.groups`. Leaves without a group follow SGD
        with L2, at the same rate, which is part of the equivalence; `optax.partition` gives
        them another.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: If a number is out of range; at `init`, if `groups` does
        not fit the parameters.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> loss = lambda x: -x[0] / jnp.linalg.norm(x)
      >>> directions = []
      >>> for tx in (so.adamg_star(0.1, groups=so.per_layer()), optax.sgd(0.1)):
      ...     params = jnp.array([0., 2.])
      ...     state = tx.init(params)
      ...     for _ in range(20):
      ...         updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...         params = optax.apply_updates(params, updates)
      ...     directions.append(params / jnp.linalg.norm(params))
      >>> bool(jnp.linalg.norm(directions[0] - directions[1]) < 1e-5)
      True

    References:
      Roburin et al., Neurocomputing 2022 (equivalence of SGD and AdamG*).
    """
    tx = chain(
        scale_by_adamg_star(learning_rate, weight_decay, groups=groups),
        retract(groups, radius=1.0),
        who="adamg_star",
    )
    return refuse_single_entries("adamg_star", groups, tx)
