"""Centring: weights whose groups have mean zero, before `init`."""

import jax
import jax.numpy as jnp
import optax

from spherical_optax import _trees, geometry
from spherical_optax.groups import Groups, group_size, radial_units
from spherical_optax.transforms._units import Unit, check_values, pick


def center_params(params: optax.Params, groups: Groups) -> optax.Params:
    """Removes the mean of each group, and gives the group its length back.

    ```
    |x| (x - mean(x)) / |x - mean(x)|
    ```

    Call it before `init` of an optimizer that keeps weights centred, as
    `rotational(..., center=True)` does.

    Args:
      params: The parameters.
      groups: See the module `spherical_optax.groups`.

    Returns:
      A tree like params; leaves without a group, and groups of norm zero, as they were.

    Raises:
      TypeError, ValueError: If `groups` does not fit the parameters, or if a group is known to
        be constant: nothing is left of it without its mean. A traced one stays as it was.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> so.center_params(jnp.array([7., 1.]), so.per_layer())
      Array([ 5., -5.], dtype=float32)

    References:
      Kosson et al., Rotational Equilibrium, ICML 2024.
    """
    (x, treedef), units = _trees.flatten(params), radial_units(groups, params)
    check_values(
        "center_params",
        params,
        units,
        lambda x, unit: _constant(x, _centered(x, unit), unit) & (geometry.norm(x, unit) > 0),
        "groups that vary",
        "constant, of which centring leaves nothing; initialise them otherwise, or give the leaf "
        "no group",
    )
    for unit in units:
        before = pick(unit, x)
        after = _centered(before, unit)
        constant = _constant(before, after, unit)
        length = jnp.where(constant, 1, geometry.norm(after, unit))
        scaled = geometry.scale(geometry.norm(before, unit) / length, after, unit)
        for i, group in unit.items():
            stays = geometry.spread(constant, x[i], group)
            x[i] = jnp.where(stays, x[i], scaled[i].astype(x[i].dtype))
    return treedef.unflatten(x)


def _centered(x: dict[int, jax.Array], unit: Unit) -> dict[int, jax.Array]:
    """The second time removes what rounding of a large mean left."""
    once = geometry.center({i: geometry.wide(x[i]) for i in unit}, unit)
    return geometry.center(once, unit)


def _constant(x: dict[int, jax.Array], centered: dict[int, jax.Array], unit: Unit) -> jax.Array:
    """Whether rounding is all that centring left."""
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in centered.values())
    return geometry.norm(centered, unit) <= 8 * eps * geometry.norm(x, unit)


def off_center(x: dict[int, jax.Array], unit: Unit) -> jax.Array:
    """Whether groups have a mean that is more than rounding."""
    wide = {i: geometry.wide(x[i]) for i in unit}
    ones = {i: jnp.ones_like(leaf) for i, leaf in wide.items()}
    root = group_size(unit, x) ** 0.5
    rounding, summing = (
        max(float(jnp.finfo(leaf.dtype).eps) for leaf in leaves.values()) for leaves in (x, wide)
    )
    cosine = jnp.abs(geometry.inner(wide, ones, unit)) / root
    return cosine > 8 * (rounding / root + summing) * geometry.norm(wide, unit)
