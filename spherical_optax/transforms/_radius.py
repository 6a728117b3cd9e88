"""The radii of spheres: a number, one by rule, or that of entries with a mean square of 1."""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from spherical_optax import _trees, geometry
from spherical_optax._checks import check_number
from spherical_optax.groups import Groups, group_size
from spherical_optax.transforms._pair import resolve
from spherical_optax.transforms._units import Unit, check_values, pick

ByRule: TypeAlias = Mapping[str, jax.typing.ArrayLike | Literal["sqrt(d)"]]
Radius: TypeAlias = jax.typing.ArrayLike | Literal["sqrt(d)"] | ByRule
"""A number; `"sqrt(d)"`, d the entries per group; or a dictionary from regular expressions to
these, of which the first found in a leaf's path decides."""


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
    """The radius to keep, of the one remembered and the length found: `radius="initial"`.

    Rounding, averaging and decay do not halve or double a length in a step: that was someone
    who loaded, cut or added weights, and a memory of 0 is none.
    """
    return jnp.where((target / 2 <= r) & (r <= 2 * target), target, r)


def radii_of(who: str, radius: Any, units: list[Unit], params: Any) -> list[Any]:
    """The radius of each unit's groups, one number for all of them.

    Raises:
      ValueError: If a rule is missing for a unit, or matches none, or joint leaves disagree.
    """
    leaves = _trees.visible_leaves(params)
    said: list[Any] = [radius] * len(units)
    if isinstance(radius, Mapping) and leaves:
        check_used(who, "radius", radius, units, params)
        said = [radius[pattern] for pattern in by_rule(who, "radius", radius, units, params)]
    sizes = [group_size(unit, {i: leaves[i].value for i in unit}) for unit in units]
    return [
        math.sqrt(size) if isinstance(each, str) else each
        for each, size in zip(said, sizes, strict=True)
    ]


def check_rules(who: str, what: str, rules: Mapping[str, Any]) -> None:
    """Raises unless there are rules, and their keys are regular expressions."""
    if not rules:
        raise ValueError(f"{who}: expected at least one rule for {what}, found none.")
    for pattern in rules:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"{who}: expected regular expressions as keys of {what}, found {pattern!r}: "
                f"{error}."
            ) from None


def by_rule(
    who: str, what: str, rules: Mapping[str, Any], units: list[Unit], params: Any
) -> list[str]:
    """The rule that decides for each unit: the first found in its leaves' paths.

    Raises:
      ValueError: If a rule is missing for a unit, or matches none, or joint leaves disagree.
    """
    leaves = _trees.visible_leaves(params)
    found = []
    for unit in units:
        said: dict[int, str] = {}
        for i in unit:
            matching = [pattern for pattern in rules if re.search(pattern, leaves[i].path)]
            if not matching:
                raise ValueError(
                    f"{who}: expected a rule for the {what} of {leaves[i].path}, found none among "
                    f'{list(rules)}; add ".*" as the last one, for all others.'
                )
            said[i] = matching[0]
        first, *others = unit
        for i in others:
            values = rules[said[i]], rules[said[first]]
            if values[0] is not values[1] and values[0] != values[1]:
                raise ValueError(
                    f"{who}: expected one {what} for the joint label {unit[i].joint!r}, found "
                    f"{values[1]!r} for {leaves[first].path} and {values[0]!r} for "
                    f"{leaves[i].path}."
                )
        found.append(said[first])
    return found


def check_used(
    who: str, what: str, rules: Mapping[str, Any], units: list[Unit], params: Any
) -> None:
    """Raises a `ValueError` if a rule decides for no leaf with a group."""
    leaves = _trees.visible_leaves(params)
    paths = [leaves[i].path for unit in units for i in unit]
    used = {next((r for r in rules if re.search(r, path)), None) for path in paths}
    if unused := [pattern for pattern in rules if pattern not in used]:
        raise ValueError(
            f"{who}: expected each rule for {what} to decide for a leaf with a group, found "
            f"{unused}, which decide for none of {paths}."
        )


def place_on_sphere(params: Any, groups: Groups, radius: Radius) -> Any:
    """The parameters with each group scaled to a radius, for optimizers that keep it.

    ```
    x' = radius x / |x|
    ```

    Args:
      params: The parameters: nested dictionaries, an NNX state, any pytree.
      groups: See the module `spherical_optax.groups`.
      radius: A number for all groups; or `"sqrt(d)"`, d the entries per group, at which these
        have a mean square of 1; or a dictionary from regular expressions on paths to such
        radii, of which the first found (`re.search`) decides, with one for every group.

    Returns:
      A tree like params, of their dtypes. Leaves without a group are as they were.

    Raises:
      TypeError, ValueError: If `groups` or radius does not fit the parameters, a radius is not
        positive, or a group is known to have a norm that is 0, NaN or infinite.

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
    units, leaves = resolve("place_on_sphere", groups, params, keeps_radius=True)
    check_values(
        "place_on_sphere",
        params,
        units,
        lambda x, unit: ~jnp.isfinite(1 / geometry.norm(x, unit)) | (geometry.norm(x, unit) == 0),
        "groups of finite norm above 0",
        "of norm 0, NaN or infinite; initialise them otherwise, or give the leaf no group",
    )
    for unit, target in zip(units, radii_of("place_on_sphere", radius, units, params), strict=True):
        x = pick(unit, leaves)
        factor = geometry.safe_divide(target, geometry.norm(x, unit))
        for i, leaf in geometry.scale(jnp.where(factor == 0, 1, factor), x, unit).items():
            leaves[i] = leaf
    return _trees.flatten(params)[1].unflatten(leaves)
