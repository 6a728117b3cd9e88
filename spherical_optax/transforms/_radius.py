"""The radii of spheres: a number, numbers by rule, or the radius at which the mean square is 1."""

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from spherical_optax import _trees, geometry
from spherical_optax._checks import check_number
from spherical_optax._checks.values import check_values
from spherical_optax._engine.layout import Layout
from spherical_optax._engine.state import pick
from spherical_optax._numerics import safe_divide
from spherical_optax.groups import Groups, Joint, by_rule, check_rules, check_used, group_size

ByRule: TypeAlias = Mapping[str, jax.typing.ArrayLike | Literal["sqrt(d)"]]
Radius: TypeAlias = jax.typing.ArrayLike | Literal["sqrt(d)"] | ByRule
"""A number; `"sqrt(d)"`, with d entries per group; or a dictionary from regular expressions to
these. In a dictionary the first pattern found in a leaf's path decides."""


def check_radius(who: str, radius: Any, words: tuple[str, ...] = ("sqrt(d)",)) -> None:
    """Raises unless this is a radius, or one of the words that stand for one."""
    if isinstance(radius, Mapping):
        check_rules(who, "radius", radius)
        for pattern, each in radius.items():
            if isinstance(each, Mapping):
                raise TypeError(f"{who}: expected a radius for rule {pattern!r}, found {each!r}.")
            check_radius(who, each)
    elif isinstance(radius, str):
        if radius not in words:
            known = " or ".join(f'"{word}"' for word in words)
            raise ValueError(f"{who}: expected radius as a number or {known}, found {radius!r}.")
    else:
        check_number(who, "radius", radius, above=0)


def remembered(target: jax.Array, r: jax.Array) -> jax.Array:
    """The radius to keep for `radius="initial"`, from the remembered radius and the current length.

    Rounding, averaging and decay do not halve or double a length in one step. A larger change means
    that weights were loaded, cut or added. A remembered radius of 0 means that none is remembered.
    """
    return jnp.where((target / 2 <= r) & (r <= 2 * target), target, r)


def radii_of(who: str, radius: Any, joints: list[Joint], params: Any) -> list[Any]:
    """The radius of each joint, one number for all its groups; raises if a rule does not fit."""
    leaves = _trees.visible_leaves(params)
    said: list[Any] = [radius] * len(joints)
    if isinstance(radius, Mapping) and leaves:
        check_used(who, "radius", radius, joints, params)
        said = [radius[pattern] for pattern in by_rule(who, "radius", radius, joints, params)]
    sizes = [group_size(joint, {i: leaves[i].value for i in joint}) for joint in joints]
    return [
        math.sqrt(size) if isinstance(each, str) else each
        for each, size in zip(said, sizes, strict=True)
    ]


def place_on_sphere(params: Any, groups: Groups, radius: Radius) -> Any:
    """Scales each group to a radius, for optimizers that keep it.

    ```
    x' = radius x / |x|
    ```

    Args:
      params: The parameters: nested dictionaries, an NNX state, any pytree.
      groups: See [`spherical_optax.groups`][].
      radius: A number for all groups; `"sqrt(d)"`, with d entries per group, which makes their mean
        square 1; or a dictionary from regular expressions on paths to such radii. In a dictionary
        the first pattern found in a path (`re.search`) decides, and every group needs a radius.

    Returns:
      A tree like params, with the same dtypes. Leaves without a group are unchanged.

    Raises:
      TypeError, ValueError: If `groups` or `radius` does not fit the parameters, a radius is not
        positive, or the norm of a group is known to be 0, NaN or infinite.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> params = {"up": jnp.array([[3., 1.], [4., 1.]]), "scale": jnp.ones(2)}
      >>> groups = so.groups_by_path({"up": so.per_filter()})
      >>> so.place_on_sphere(params, groups, 10.0)["up"]
      Array([[6.      , 7.071068],
             [8.      , 7.071068]], dtype=float32)
      >>> placed = so.place_on_sphere(params, groups, {"up": "sqrt(d)"})
      >>> so.geometry.norm(placed["up"], so.per_filter())
      Array([1.41421, 1.41421], dtype=float32)

    References:
      Karras et al., Analyzing and improving the training dynamics of diffusion models, CVPR
      2024, section 2.3 (weights of norm sqrt(d)).
    """
    check_radius("place_on_sphere", radius)
    layout = Layout.at_init("place_on_sphere", groups, params, keeps_radius=True)
    joints, leaves = layout.joints, list(layout.params)
    check_values(
        "place_on_sphere",
        params,
        joints,
        lambda x, joint: (
            ~jnp.isfinite(1 / geometry.norm(x, joint)) | (geometry.norm(x, joint) == 0)
        ),
        "groups of finite norm above 0",
        "of norm 0, NaN or infinite. Initialize them to other values, or give the parameter no "
        "group",
    )
    targets = radii_of("place_on_sphere", radius, joints, params)
    for joint, target in zip(joints, targets, strict=True):
        x = pick(joint, leaves)
        factor = safe_divide(target, geometry.norm(x, joint))
        for i, leaf in geometry.scale(jnp.where(factor == 0, 1, factor), x, joint).items():
            leaves[i] = leaf
    return _trees.flatten(params)[1].unflatten(leaves)
