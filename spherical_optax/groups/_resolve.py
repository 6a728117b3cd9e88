"""Which leaves of a tree form groups together."""

import dataclasses
import math
import numbers
import reprlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spherical_optax import _complex, _trees
from spherical_optax.groups._forms import FoundGroups, Groups, entries_of
from spherical_optax.groups._group import Entry, RadialGroup, group_size, per_filter
from spherical_optax.groups._rules import PathRules
from spherical_optax.groups._windows import warn_of_windows


def radial_units(groups: Groups, tree: Any) -> list[dict[int, RadialGroup]]:
    """Resolves `groups` on a tree into the sets of leaves that form groups together.

    Args:
      groups: See the module `spherical_optax.groups`.
      tree: Parameters or updates; only paths, shapes and dtypes are read.

    Returns:
      One dictionary per leaf, or per label of joint leaves, from the leaf's number
      (as `_trees.flatten` counts) to its group. Leaves without a group are absent.

    Raises:
      TypeError: If something other than groups is given, or a leaf with a group is
        not of a real floating dtype.
      ValueError: If `groups` does not fit the tree, or `optax.masked` hides part of a joint
        group; the message names the path.
    """
    leaves = _trees.leaves_with_paths(tree)
    if not leaves:  # optax.tree_map_params calls init with a leafless placeholder
        return []
    statistics = {"params", "batch_stats"} <= {key for leaf in leaves for key in leaf.keys[:1]}
    for leaf in leaves:
        _check_parameter(leaf, statistics and leaf.keys[0] == "batch_stats")
    said = entries_of(groups, tree, leaves)
    found = [_checked(leaf, group) for leaf, group in zip(leaves, said, strict=True)]
    pairs = _complex.pairs(tree) if any(leaf.keys[-1:] == ("real",) for leaf in leaves) else set()
    for n, (leaf, group) in enumerate(zip(leaves, found, strict=True)):
        if group is not None and group.joint is None and leaf.keys[:-1] in pairs:
            label = f"{'/'.join(leaf.keys[:-1])} (complex)"
            found[n] = dataclasses.replace(group, joint=label)
    _check_none_hidden(leaves, said, found)
    return _units(
        [(leaf, group) for leaf, group in zip(leaves, found, strict=True) if not leaf.hidden]
    )


def _check_parameter(leaf: _trees.Leaf, statistic: bool) -> None:
    """Raises for what a whole model holds besides its parameters."""
    value, dtype = leaf.value, getattr(leaf.value, "dtype", None)
    if leaf.absent or isinstance(value, numbers.Number):
        return
    if isinstance(value, PathRules | FoundGroups | RadialGroup):
        raise TypeError(
            f"expected a tree of parameters, found {type(value).__name__}; params and groups seem "
            "to have changed places."
        )
    if leaf.is_state:
        found = f"a {leaf.box.__name__}"
    elif statistic:
        found = "a statistic"
    elif dtype is None or isinstance(dtype, str):  # a string for a Keras variable
        found = f"{reprlib.repr(value)} of type {type(value).__name__}"
    elif jnp.issubdtype(dtype, jax.dtypes.prng_key):
        found = f"a random key of dtype {dtype}"
    else:
        return
    raise TypeError(
        f"{leaf.path}: expected an array of parameters, found {found}; pass the parameters "
        "alone: nnx.state(model, nnx.Param), variables['params'] of a Linen model, "
        "eqx.filter(model, eqx.is_inexact_array), or "
        "{v.path: v.value for v in model.trainable_variables} of a Keras model."
    )


def _checked(leaf: _trees.Leaf, group: Entry) -> RadialGroup | None:
    """The leaf's group, after checking that the leaf can have it."""
    if isinstance(group, bool | np.bool_):
        group = per_filter() if group else None
    if group is None or leaf.absent:
        return None
    if not hasattr(leaf.value, "dtype"):
        raise TypeError(
            f"{leaf.path}: expected an array for a leaf with a radial group, found "
            f"{leaf.value!r} of type {type(leaf.value).__name__}; give this leaf None."
        )
    shape, dtype = leaf.value.shape, leaf.value.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{leaf.path} of shape {shape}: expected a real floating dtype for a leaf with "
            f"a radial group, found {dtype}; give this leaf None"
            + (
                ", or wrap the optimizer in optax.contrib.split_real_and_imaginary."
                if jnp.issubdtype(dtype, jnp.complexfloating)
                else "."
            )
        )
    try:
        group.shape(shape)
    except ValueError as error:
        raise ValueError(f"{leaf.path} of shape {shape}: {error}, in {group}.") from None
    return group if 0 not in shape else None  # a leaf without entries has nothing to turn


def _check_none_hidden(
    leaves: list[_trees.Leaf],
    given: list[Entry],
    found: list[RadialGroup | None],
) -> None:
    """Raises a `ValueError` where `optax.masked` hides only some leaves of a joint group."""
    hidden: dict[str | None, list[str]] = {}
    for leaf, group in zip(leaves, given, strict=True):
        if leaf.hidden and isinstance(group, RadialGroup) and group.joint is not None:
            hidden.setdefault(group.joint, []).append(leaf.path)
    for group in found if hidden else ():
        if group is not None and group.joint in hidden:
            visible = [
                leaf.path
                for leaf, other in zip(leaves, found, strict=True)
                if other is not None and other.joint == group.joint
            ]
            raise ValueError(
                f"groups: joint label {group.joint!r}: expected all its leaves or none, found "
                f"{visible}, while optax.masked or optax.partition hides {hidden[group.joint]}: "
                "the rest would be another group. Give all of them to one transformation."
            )


def _units(
    grouped: list[tuple[_trees.Leaf, RadialGroup | None]],
) -> list[dict[int, RadialGroup]]:
    units: dict[Any, dict[int, RadialGroup]] = {}
    for number, (leaf, group) in enumerate(grouped):
        if group is None:
            continue
        unit = units.setdefault(number if group.joint is None else group.joint, {})
        if unit:
            first, first_group = grouped[next(iter(unit))]
            expected = math.prod(first_group.shape(first.value.shape))  # type: ignore[union-attr]
            count = math.prod(group.shape(leaf.value.shape))
            if count != expected:
                raise ValueError(
                    f"{leaf.path} of shape {leaf.value.shape}: joint label {group.joint!r} is "
                    f"shared with {first.path} of shape {first.value.shape}, expected "
                    f"{expected} groups as there, found {count}."
                )
        unit[number] = group
    return list(units.values())


def units_at_init(
    groups: Groups, params: Any, keeps_radius: str | None = None
) -> list[dict[int, RadialGroup]]:
    """As `radial_units`, for `init`: it looks more closely, once.

    Args:
      groups: See the module `spherical_optax.groups`.
      params: The parameters.
      keeps_radius: The function that keeps or sets radii, if it does: to it groups of one entry
        are an error.

    Raises:
      ValueError: If there are groups of one entry, and a radius is kept.

    Warns:
      UserWarning: If groups on the last axis look like columns of a convolution's window, or
        have one entry each.
    """
    units = radial_units(groups, params)
    leaves = _trees.visible_leaves(params)
    single = [
        ", ".join(leaves[i].path or "the parameters" for i in unit)
        for unit in units
        if group_size(unit, [leaf.value for leaf in leaves]) < 2
    ]
    if single and keeps_radius is not None:
        raise ValueError(
            f"{keeps_radius}: {single[0]}: expected groups of at least 2 entries, found 1: they "
            "have no direction to turn; name fewer axes in index_axes, or give the leaf no group."
        )
    if single:
        warnings.warn(
            f"{'; '.join(single)}: expected groups of at least 2 entries, found 1: entry by entry "
            "AdamS is Adam, and nothing is projected or transported. Name fewer axes in "
            "index_axes, or give the leaf no group.",
            stacklevel=2,
        )
    warn_of_windows(units, params)
    return units
