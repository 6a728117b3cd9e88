"""Rotational optimizers: each group rotates by a given average angle, at a fixed radius."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from spherical_optax._checks import (
    check_adam,
    check_learning_rate,
    check_number,
)
from spherical_optax._checks.arguments import groups_by_name
from spherical_optax._checks.direction import direction
from spherical_optax._masks import Mask
from spherical_optax.groups import Groups
from spherical_optax.optimizers._common import at_fixed_radius, decayed_weights
from spherical_optax.transforms import (
    center_updates,
    normalize_updates,
    project_radial,
)
from spherical_optax.transforms._radius import Radius


@groups_by_name
def rotational(
    inner: optax.GradientTransformation,
    average_angle: optax.ScalarOrSchedule,
    *,
    groups: Groups,
    other: optax.GradientTransformation | None = None,
    radius: Radius | Literal["initial"] = "initial",
    decay: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    center: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Rotational variant of any optimizer: each group rotates by a given angle on average.

    ```
    p = w - <w, u> u        s = decay s + (1 - decay) |p|^2
    x' = r normalize(x - average_angle r p / (sqrt(shat) + eps))
    ```

    Here w is the direction of `inner`, and r is the length of the group when training begins. A
    group of length 0 never moves, as in `hyperball`.

    Args:
      inner: The transformation that gives the direction, as in `hyperball`.
      average_angle: A number or a schedule, in radians per step.
      groups: See [`spherical_optax.groups`][].
      other: The optimizer of leaves without a group, as in `hyperball`.
      radius: The radius to keep, as in `retract`.
      decay: Decay rate of the running mean of squared update norms, in [0, 1).
      eps: Added to the running norm.
      center: Whether to remove the mean of each group's update. Centered weights then stay
        centered. They must be centered at `init`: see `center_params`.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: As in `hyperball`; at `init`, also if `center` is set and a group is
        known to have a mean.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> tx = so.rotational(optax.trace(0.9), 0.01, groups=so.per_layer())
      >>> params, grads = jnp.array([3., 4.]), jnp.array([1., 2.])
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(f"{so.geometry.angle(params, params + updates, so.per_layer()):.4f}")
      0.0100

    References:
      Kosson et al., Rotational Equilibrium: how weight decay balances learning across
      neural networks, ICML 2024, section 4.
    """
    check_learning_rate("rotational", average_angle, "average_angle")
    return _rotational(
        "rotational", inner, average_angle, other, groups, radius, center, decay, eps
    )


def _rotational(
    who: str,
    inner: Any,
    average_angle: optax.ScalarOrSchedule,
    other: Any,
    groups: Groups,
    radius: Any,
    center: bool,
    decay: Any = 0.9,
    eps: Any = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """`rotational`, with the name of the function that was called for messages."""
    step = (
        center_updates(groups) if center else optax.identity(),
        project_radial(groups),
        normalize_updates(groups, decay=decay, eps=eps),
    )
    return at_fixed_radius(who, inner, step, average_angle, groups, other, radius, center=center)


def _equilibrium(
    who: str,
    learning_rate: optax.ScalarOrSchedule,
    other_learning_rate: optax.ScalarOrSchedule | None,
    weight_decay: Any,
    factor: Any,
) -> tuple[optax.ScalarOrSchedule, optax.ScalarOrSchedule]:
    """The angle sqrt(2 learning_rate weight_decay factor), and the rate of other leaves."""
    other = learning_rate if other_learning_rate is None else other_learning_rate
    check_learning_rate(who, learning_rate)
    check_learning_rate(who, other, "other_learning_rate")
    check_number(who, "weight_decay", weight_decay)
    if not isinstance(weight_decay, jax.core.Tracer) and weight_decay == 0:
        raise ValueError(
            f"{who}: expected weight_decay above 0, found 0. The angle is proportional to its "
            "square root, so groups would not rotate. To set the angle itself, use "
            "rotational(inner, average_angle, ...) or hyperball."
        )

    def angle(rate: Any) -> jax.Array:
        # A schedule that ends at 0 may be rounded to just below it.
        return jnp.sqrt(jnp.maximum(2 * rate * weight_decay * factor, 0.0))

    if callable(learning_rate):
        return lambda count: angle(learning_rate(count)), other
    return angle(learning_rate), other


@groups_by_name
def rotational_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    groups: Groups,
    other_learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: jax.typing.ArrayLike = 1e-2,
    mask: Mask = None,
    center: bool = False,
    radius: Radius | Literal["initial"] = "initial",
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rotational AdamW: groups rotate by the average angle of AdamW in equilibrium.

    ```
    average angle = sqrt(2 learning_rate weight_decay (1 - b1) / (1 + b1))
    ```

    Args:
      learning_rate: A number or a schedule.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator.
      groups: See [`spherical_optax.groups`][]. Leaves without a group are trained as by
        `optax.adamw`.
      other_learning_rate: The learning rate of leaves without a group; `learning_rate` if `None`.
      weight_decay: Sets the angle of groups. Leaves without a group have it as decoupled decay.
      mask: The leaves without a group that decay, as in `optax.adamw`; all if `None`.
      center: See `rotational`.
      radius: The radius to keep, as in `retract`.
      mu_dtype: dtype of the first moment; that of the parameter if `None`.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: If a number is out of range, or `weight_decay` is 0; at `init`, as in
        `rotational`, or if `mask` does not fit.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> tx = so.rotational_adamw(0.1, weight_decay=0.1, groups=so.per_layer())
      >>> params, grads = jnp.array([3., 4.]), jnp.array([1., 2.])
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(f"{so.geometry.angle(params, params + updates, so.per_layer()):.4f}")
      0.0324

    References:
      Kosson et al., ICML 2024, table 1.
    """
    who = "rotational_adamw"
    check_adam(who, b1, b2, eps)
    factor = (1 - b1) / (1 + b1)
    angle, rate = _equilibrium(who, learning_rate, other_learning_rate, weight_decay, factor)
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)
    decay = decayed_weights(who, weight_decay, mask)
    other = optax.chain(adam, decay, optax.scale_by_learning_rate(rate))
    return _rotational(who, direction(adam), angle, other, groups, radius, center)


@groups_by_name
def rotational_sgdm(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
    *,
    groups: Groups,
    other_learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: jax.typing.ArrayLike = 1e-4,
    mask: Mask = None,
    center: bool = False,
    radius: Radius | Literal["initial"] = "initial",
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rotational momentum SGD: groups rotate by its average angle in equilibrium.

    ```
    average angle = sqrt(2 learning_rate weight_decay / (1 + momentum))
    ```

    Args:
      learning_rate: A number or a schedule.
      momentum: Decay rate of the momentum, in [0, 1).
      groups: See [`spherical_optax.groups`][]. Leaves without a group are trained as by
        `optax.sgd` after `optax.add_decayed_weights`.
      other_learning_rate: The learning rate of leaves without a group; `learning_rate` if `None`.
      weight_decay: Sets the angle of groups. Leaves without a group have it as coupled decay.
      mask: The leaves without a group that decay, as in `optax.adamw`; all if `None`.
      center: See `rotational`.
      radius: The radius to keep, as in `retract`.
      accumulator_dtype: dtype of the momentum; that of the parameter if `None`.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: If a number is out of range, or `weight_decay` is 0; at `init`, as in
        `rotational`, or if `mask` does not fit.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> tx = so.rotational_sgdm(0.1, 0.9, weight_decay=0.1, groups=so.per_layer())
      >>> params, grads = jnp.array([3., 4.]), jnp.array([1., 2.])
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(f"{so.geometry.angle(params, params + updates, so.per_layer()):.4f}")
      0.1022

    References:
      Kosson et al., ICML 2024, table 1.
    """
    who = "rotational_sgdm"
    check_number(who, "momentum", momentum, below=1)
    factor = 1 / (1 + momentum)
    angle, rate = _equilibrium(who, learning_rate, other_learning_rate, weight_decay, factor)
    trace = optax.trace(momentum, accumulator_dtype=accumulator_dtype)
    sgd = optax.sgd(rate, momentum, accumulator_dtype=accumulator_dtype)
    other = optax.chain(decayed_weights(who, weight_decay, mask), sgd)
    return _rotational(who, direction(trace), angle, other, groups, radius, center)


@groups_by_name
def rotational_lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    *,
    groups: Groups,
    other_learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: jax.typing.ArrayLike = 1e-3,
    mask: Mask = None,
    center: bool = False,
    radius: Radius | Literal["initial"] = "initial",
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rotational Lion: groups rotate by the average angle of Lion in equilibrium.

    ```
    average angle = sqrt(pi learning_rate weight_decay ((1 - b1)^2 + b1^2 (1 - b2) / (1 + b2)))
    ```

    Args:
      learning_rate: A number or a schedule.
      b1: Weight of the momentum inside the sign function, in [0, 1).
      b2: Decay rate of the momentum, in [0, 1).
      groups: See [`spherical_optax.groups`][]. Leaves without a group are trained as by
        `optax.lion`.
      other_learning_rate: The learning rate of leaves without a group; `learning_rate` if `None`.
      weight_decay: Sets the angle of groups. Leaves without a group have it as decoupled decay.
      mask: The leaves without a group that decay, as in `optax.adamw`; all if `None`.
      center: See `rotational`.
      radius: The radius to keep, as in `retract`.
      mu_dtype: dtype of the first moment; that of the parameter if `None`.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: If a number is out of range, or `weight_decay` is 0; at `init`, as in
        `rotational`, or if `mask` does not fit.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> tx = so.rotational_lion(0.1, weight_decay=0.1, groups=so.per_layer())
      >>> params, grads = jnp.array([3., 4.]), jnp.array([1., 2.])
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(f"{so.geometry.angle(params, params + updates, so.per_layer()):.4f}")
      0.0211

    References:
      Kosson et al., ICML 2024, table 1.
    """
    who = "rotational_lion"
    check_adam(who, b1, b2)
    factor = math.pi / 2 * ((1 - b1) ** 2 + b1**2 * (1 - b2) / (1 + b2))
    angle, rate = _equilibrium(who, learning_rate, other_learning_rate, weight_decay, factor)
    lion = optax.scale_by_lion(b1, b2, mu_dtype=mu_dtype)
    decay = decayed_weights(who, weight_decay, mask)
    other = optax.chain(lion, decay, optax.scale_by_learning_rate(rate))
    return _rotational(who, direction(lion), angle, other, groups, radius, center)
