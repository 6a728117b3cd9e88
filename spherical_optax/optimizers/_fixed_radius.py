"""Optimizers that keep each group's radius and set the angle of a step: Hyperball, rotational."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from spherical_optax._checks import check_learning_rate, check_number, check_transformation
from spherical_optax._masks import Mask, in_groups
from spherical_optax.groups import Groups
from spherical_optax.optimizers._at_init import (
    require_direction,
    require_other_rate,
    require_spheres,
)
from spherical_optax.optimizers._parts import (
    Rates,
    decayed_weights,
    elsewhere_only,
    in_groups_only,
    learning_rates,
)
from spherical_optax.transforms import center_updates, normalize_updates, project_radial, retract
from spherical_optax.transforms._lift import chain
from spherical_optax.transforms._radius import Radius


def hyperball(
    inner: optax.GradientTransformation,
    learning_rate: Rates,
    *,
    groups: Groups,
    other_learning_rate: optax.ScalarOrSchedule | None = None,
    radius: Radius | Literal["initial"] = "initial",
) -> optax.GradientTransformationExtraArgs:
    """Hyperball: steps of a given relative length along any direction, at a fixed radius.

    ```
    x' = r normalize(x - learning_rate |x| w / |w|)
    ```

    with w the direction of `inner` and r the length that training begins with. `adamh` and
    `muonh` are this with the directions of Adam and of Muon.

    Groups need a length: initialise output projections with something else than zeros. A group
    of length 0 does not move; `init` refuses it, and warns where it is traced, as by `jax.jit`.

    Args:
      inner: The transformation that gives the direction: a `scale_by_*` or `optax.trace`, not
        a whole optimizer, whose update has its sign turned already.
      learning_rate: The length of a step relative to the radius: a number or a schedule, or a
        dictionary from regular expressions on paths to these, of which the first found
        (`re.search`) decides. Rates and scales inside of `inner` cancel in groups.
      groups: See the module `spherical_optax.groups`.
      other_learning_rate: That of leaves without a group, which take inner's update as it
        is; a number or a schedule. Where there are such leaves it has to be given, as an angle
        is too much for most.
      radius: The radius to keep, as in `retract`: `"initial"` for the length that training begins
        with, or one of the forms of `place_on_sphere`, which puts weights there at once;
        `retract` takes a few steps where they are far outside.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: If inner is no transformation or a number is out of range; at
        `init`, if `groups` does not fit the parameters, no leaf has a group, a group has one
        entry or is known to have norm zero, inner's updates point against the gradients, or
        leaves without a group lack a learning rate.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> tx = so.hyperball(optax.scale_by_adam(), 0.1, groups=so.per_layer())
      >>> params = jnp.array([3., 4.])
      >>> updates, _ = tx.update(jnp.array([1., 2.]), tx.init(params), params)
      >>> so.geometry.norm(optax.apply_updates(params, updates), so.per_layer())
      Array(5., dtype=float32)

    References:
      Wen et al., Hyperball, 2026.
    """
    return hyperball_as("hyperball", inner, learning_rate, groups, other_learning_rate, radius)


def hyperball_as(
    who: str,
    inner: optax.GradientTransformation,
    learning_rate: Rates,
    groups: Groups,
    other_learning_rate: optax.ScalarOrSchedule | None,
    radius: Radius | Literal["initial"] = "initial",
) -> optax.GradientTransformationExtraArgs:
    """Hyperball under the name of the function that was called."""
    check_transformation(who, inner)
    initial = isinstance(radius, str) and radius == "initial"
    return chain(
        require_spheres(who, groups, warn=not initial),  # retract warns of its own
        require_other_rate(who, groups, other_learning_rate),
        require_direction(who, inner, groups),
        inner,
        normalize_updates(groups),
        learning_rates(who, learning_rate, other_learning_rate, groups),
        retract(groups, radius),
        who=who,
    )


def rotational(
    inner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    average_angle: optax.ScalarOrSchedule,
    *,
    groups: Groups,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask = None,
    decay: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    center: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Rotational variant of any optimizer: each group turns by a given angle on average.

    ```
    p = w - <w, u> u        s = decay s + (1 - decay) |p|^2
    x' = r normalize(x - average_angle r p / (sqrt(shat) + eps))
    ```

    with w the direction of `inner` and r the length that training begins with. Leaves without a
    group step by learning_rate (w + weight_decay x). Groups need a length, as in `hyperball`.

    Args:
      inner: The transformation that gives the direction: a `scale_by_*` or `optax.trace`, not
        a whole optimizer, whose update has its sign turned already.
      learning_rate: A number or a schedule, for leaves without a group.
      average_angle: A number or a schedule, in radians per step.
      groups: See the module `spherical_optax.groups`.
      weight_decay: Decoupled decay of leaves without a group.
      mask: The leaves without a group that decay, as in `optax.adamw`: a tree of booleans, or
        a prefix of one, or a function of the parameters that returns one; all if `None`.
      decay: Decay rate of the running mean of squared update norms, in [0, 1).
      eps: Added to the running norm.
      center: Whether to remove the mean of each group's update, so that weights stay centred;
        they must be so at `init`: see `center_params`.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: If inner is no transformation or a number is out of range; at
        `init`, if `groups` or `mask` does not fit the parameters, no leaf has a group, a group
        has one entry, is known to have norm zero or a mean that `center` forbids, or inner's
        updates point against the gradients.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import spherical_optax as so
      >>> tx = so.rotational(optax.trace(0.9), 0.1, 0.01, groups=so.per_layer())
      >>> params, grads = jnp.array([3., 4.]), jnp.array([1., 2.])
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(f"{so.geometry.angle(params, params + updates, so.per_layer()):.4f}")
      0.0100

    References:
      Kosson et al., Rotational Equilibrium: how weight decay balances learning across
      neural networks, ICML 2024, section 4.
    """
    check_transformation("rotational", inner)
    check_learning_rate("rotational", learning_rate)
    check_learning_rate("rotational", average_angle, "average_angle")
    others = optax.chain(
        decayed_weights("rotational", weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    return optax.chain(
        require_direction("rotational", inner, groups),
        _rotational(
            "rotational", inner, average_angle, others, groups, decay=decay, eps=eps, center=center
        ),
    )


def _rotational(
    who: str,
    inner: optax.GradientTransformation,
    average_angle: optax.ScalarOrSchedule,
    others: optax.GradientTransformation,
    groups: Groups,
    *,
    center: bool,
    decay: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """The rotational variant of `inner`, with the rest of the step of leaves without a group."""
    return chain(
        require_spheres(who, groups, center=center),
        inner,
        center_updates(groups) if center else optax.identity(),
        project_radial(groups),
        normalize_updates(groups, decay=decay, eps=eps),
        in_groups_only(optax.scale_by_learning_rate(average_angle), groups),
        elsewhere_only(others, groups),
        retract(groups),
        who=who,
    )


def _equilibrium(
    who: str,
    learning_rate: optax.ScalarOrSchedule,
    other_learning_rate: optax.ScalarOrSchedule | None,
    weight_decay: Any,
    factor: Any,
) -> tuple[optax.ScalarOrSchedule, optax.ScalarOrSchedule]:
    """The angle sqrt(2 learning_rate weight_decay factor), and other leaves' learning rate."""
    other = learning_rate if other_learning_rate is None else other_learning_rate
    check_learning_rate(who, learning_rate)
    check_learning_rate(who, other, "other_learning_rate")
    check_number(who, "weight_decay", weight_decay)
    if not isinstance(weight_decay, jax.core.Tracer) and weight_decay == 0:
        raise ValueError(
            f"{who}: expected weight_decay above 0, found 0: the angle follows from it, and groups "
            "would not turn; use rotational(inner, ..., average_angle), or hyperball."
        )

    def angle(rate: Any) -> jax.Array:
        # A schedule that ends at 0 may be rounded to just below it.
        return jnp.sqrt(jnp.maximum(2 * rate * weight_decay * factor, 0.0))

    if callable(learning_rate):
        return lambda count: angle(learning_rate(count)), other
    return angle(learning_rate), other


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
) -> optax.GradientTransformationExtraArgs:
    """Rotational AdamW: groups turn as AdamW turns them in equilibrium.

    ```
    average angle = sqrt(2 learning_rate weight_decay (1 - b1) / (1 + b1))
    ```

    Args:
      learning_rate: A number or a schedule.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator.
      groups: See the module `spherical_optax.groups`. Leaves without a group follow
        `optax.adamw`.
      other_learning_rate: That of leaves without a group, a number or a schedule;
        `learning_rate` if `None`.
      weight_decay: With the learning rate it sets the angle; decoupled decay of leaves
        without a group.
      mask: The leaves without a group that decay, as in `optax.adamw`: a tree of booleans, or
        a prefix of one, or a function of the parameters that returns one; all if `None`.
      center: See `rotational`.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: If a number is out of range, or weight_decay is 0; at `init`, if
        `groups` or `mask` does not fit the parameters, and where `rotational` raises.

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
    check_number("rotational_adamw", "b1", b1, below=1)
    check_number("rotational_adamw", "b2", b2, below=1)
    angle, rate = _equilibrium(
        "rotational_adamw", learning_rate, other_learning_rate, weight_decay, (1 - b1) / (1 + b1)
    )
    others = optax.chain(
        decayed_weights("rotational_adamw", weight_decay, mask), optax.scale_by_learning_rate(rate)
    )
    adam = optax.scale_by_adam(b1, b2, eps)
    return _rotational("rotational_adamw", adam, angle, others, groups, center=center)


def rotational_sgdm(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
    *,
    groups: Groups,
    other_learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: jax.typing.ArrayLike = 1e-4,
    mask: Mask = None,
    center: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Rotational momentum SGD: groups turn as momentum SGD turns them in equilibrium.

    ```
    average angle = sqrt(2 learning_rate weight_decay / (1 + momentum))
    ```

    Args:
      learning_rate: A number or a schedule.
      momentum: Decay rate of the momentum, in [0, 1).
      groups: See the module `spherical_optax.groups`. Leaves without a group follow
        `optax.sgd` after `optax.add_decayed_weights`.
      other_learning_rate: That of leaves without a group, a number or a schedule;
        `learning_rate` if `None`.
      weight_decay: With the learning rate it sets the angle; factor of the L2 term of leaves
        without a group, before the momentum, as the angle assumes.
      mask: The leaves without a group that decay, as in `optax.adamw`: a tree of booleans, or
        a prefix of one, or a function of the parameters that returns one; all if `None`.
      center: See `rotational`.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: If a number is out of range, or weight_decay is 0; at `init`, if
        `groups` or `mask` does not fit the parameters, and where `rotational` raises.

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
    check_number("rotational_sgdm", "momentum", momentum, below=1)
    angle, rate = _equilibrium(
        "rotational_sgdm", learning_rate, other_learning_rate, weight_decay, 1 / (1 + momentum)
    )
    coupled = decayed_weights("rotational_sgdm", weight_decay, mask)
    sgdm = optax.chain(optax.masked(coupled, in_groups(groups, False)), optax.trace(momentum))
    others = optax.scale_by_learning_rate(rate)
    return _rotational("rotational_sgdm", sgdm, angle, others, groups, center=center)


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
) -> optax.GradientTransformationExtraArgs:
    """Rotational Lion: groups turn as Lion turns them in equilibrium.

    ```
    average angle = sqrt(pi learning_rate weight_decay ((1 - b1)^2 + b1^2 (1 - b2) / (1 + b2)))
    ```

    Args:
      learning_rate: A number or a schedule.
      b1: Weight of the momentum in the sign's argument, in [0, 1).
      b2: Decay rate of the momentum, in [0, 1).
      groups: See the module `spherical_optax.groups`. Leaves without a group follow
        `optax.lion`.
      other_learning_rate: That of leaves without a group, a number or a schedule;
        `learning_rate` if `None`.
      weight_decay: With the learning rate it sets the angle; decoupled decay of leaves
        without a group.
      mask: The leaves without a group that decay, as in `optax.adamw`: a tree of booleans, or
        a prefix of one, or a function of the parameters that returns one; all if `None`.
      center: See `rotational`.

    Returns:
      The optimizer; `update` needs params.

    Raises:
      TypeError, ValueError: If a number is out of range, or weight_decay is 0; at `init`, if
        `groups` or `mask` does not fit the parameters, and where `rotational` raises.

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
    check_number("rotational_lion", "b1", b1, below=1)
    check_number("rotational_lion", "b2", b2, below=1)
    spread = (1 - b1) ** 2 + b1**2 * (1 - b2) / (1 + b2)
    angle, rate = _equilibrium(
        "rotational_lion",
        learning_rate,
        other_learning_rate,
        weight_decay,
        math.pi / 2 * spread,
    )
    others = optax.chain(
        decayed_weights("rotational_lion", weight_decay, mask), optax.scale_by_learning_rate(rate)
    )
    lion = optax.scale_by_lion(b1, b2)
    return _rotational("rotational_lion", lion, angle, others, groups, center=center)
