"""Centering: gives every group of the weights mean zero, before `init`."""

import jax
import jax.numpy as jnp
import optax

from spherical_optax import _trees, geometry
from spherical_optax._checks.values import check_values
from spherical_optax._engine.state import pick
from spherical_optax._numerics import wide
from spherical_optax.groups import Groups, Joint, group_size, joints_of


def center_params(params: optax.Params, groups: Groups) -> optax.Params:
    """Removes the mean of each group, and restores the length of the group.

    ```
    |x| (x - mean(x)) / |x - mean(x)|
    ```

    Call it before `init` of an optimizer that keeps weights centered, such as
    `rotational(..., center=True)`.

    Args:
      params: The parameters.
      groups: See [`spherical_optax.groups`][].

    Returns:
      A tree like params. Leaves without a group and groups of norm zero are unchanged.

    Raises:
      TypeError, ValueError: If `groups` does not fit the parameters, or if all entries of a group
        are known to be equal: without its mean, nothing is left of it. If its values are traced,
        such a group is unchanged.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> so.center_params(jnp.array([7., 1.]), so.per_layer())
      Array([ 5., -5.], dtype=float32)

    References:
      Kosson et al., Rotational Equilibrium, ICML 2024.
    """
    (x, treedef), joints = _trees.flatten(params), joints_of(groups, params)
    check_values(
        "center_params",
        params,
        joints,
        lambda x, joint: _constant(x, _centered(x, joint), joint) & (geometry.norm(x, joint) > 0),
        "groups that vary",
        "constant, so that centering leaves nothing. Initialize them to other values, or give the "
        "parameter no group",
    )
    for joint in joints:
        before = pick(joint, x)
        after = _centered(before, joint)
        constant = _constant(before, after, joint)
        length = jnp.where(constant, 1, geometry.norm(after, joint))
        scaled = geometry.scale(geometry.norm(before, joint) / length, after, joint)
        for i, group in joint.items():
            stays = geometry.spread(constant, x[i], group)
            x[i] = jnp.where(stays, x[i], scaled[i].astype(x[i].dtype))
    return treedef.unflatten(x)


def _centered(x: dict[int, jax.Array], joint: Joint) -> dict[int, jax.Array]:
    """Centers twice: the second time removes the rounding of a large mean."""
    once = geometry.center({i: wide(x[i]) for i in joint}, joint)
    return geometry.center(once, joint)


def _constant(x: dict[int, jax.Array], centered: dict[int, jax.Array], joint: Joint) -> jax.Array:
    """Whether only rounding is left after centering."""
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in centered.values())
    return geometry.norm(centered, joint) <= 8 * eps * geometry.norm(x, joint)


def off_center(x: dict[int, jax.Array], joint: Joint) -> jax.Array:
    """Whether groups have a mean that is larger than rounding."""
    x_wide = {i: wide(x[i]) for i in joint}
    ones = {i: jnp.ones_like(leaf) for i, leaf in x_wide.items()}
    root = group_size(joint, x) ** 0.5
    rounding, summing = (
        max(float(jnp.finfo(leaf.dtype).eps) for leaf in leaves.values()) for leaves in (x, x_wide)
    )
    cosine = jnp.abs(geometry.inner(x_wide, ones, joint)) / root
    return cosine > 8 * (rounding / root + summing) * geometry.norm(x_wide, joint)
