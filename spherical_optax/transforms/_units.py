"""What the transforms share: leaves picked by unit, and state kept per group."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spherical_optax import _trees, geometry
from spherical_optax.groups import RadialGroup
from spherical_optax.sharding import laid_out

Unit = dict[int, RadialGroup]
"""Leaves that form groups together: from a leaf's number to its group."""


def pick(unit: Unit, leaves: Any) -> dict[int, jax.Array]:
    """The arrays of a unit's leaves."""
    return {i: leaves[i] for i in unit}


def present(units: list[Unit], leaves: Any, tree: Any) -> list[Unit]:
    """The units whose leaves are there; a missing gradient is `None`.

    Args:
      units: The units.
      leaves: The updates, by leaf number.
      tree: A tree of such leaves, for the paths.

    Raises:
      ValueError: If only some leaves of a joint group are there.
    """
    found = []
    for unit in units:
        there = [i for i in unit if leaves[i] is not None]
        if there and len(there) < len(unit):
            paths = [leaf.path for leaf in _trees.visible_leaves(tree)]
            raise ValueError(
                f"joint label {next(iter(unit.values())).joint!r}: expected gradients for all its "
                f"{len(unit)} leaves or none, found None for "
                f"{[paths[i] for i in unit if i not in there]} and gradients for "
                f"{[paths[i] for i in there]}."
            )
        if there:
            found.append(unit)
    return found


def elsewhere(units: list[Unit], leaves: list[Any]) -> list[int]:
    """The leaves in no unit that can be scaled: not `None`, integer or float0."""
    grouped = {i for unit in units for i in unit}
    return [
        i
        for i, leaf in enumerate(leaves)
        if i not in grouped
        and leaf is not None
        and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    ]


def state_like(params: Any, values: Mapping[int, jax.Array], otherwise: Any) -> Any:
    """A tree like params with raw arrays from `values`, by leaf number.

    A leaf that has none gets `otherwise(leaf)`; its box of metadata, if any, is kept.
    """
    boxes, treedef = _trees.flatten_boxes(params)
    return treedef.unflatten(
        [
            values[i] if i in values else None if box is None else otherwise(box)
            for i, box in enumerate(boxes)
        ]
    )


def zero(box: Any) -> jax.Array:
    """What per-group state holds for a leaf without a group."""
    del box
    return jnp.zeros((), jnp.float32)


def zeros_as(fn: Callable[..., jax.Array], *args: Any) -> jax.Array:
    """Zeros of the type, sharding included, of what a function returns."""
    found = jax.eval_shape(fn, *args)
    return jnp.zeros_like(found, device=found.sharding)


def zeros_per_group(units: list[Unit], leaves: list[Any]) -> dict[int, jax.Array]:
    """One zero per group, by leaf number, typed as the sums over the leaf's groups are."""
    return {
        i: zeros_as(lambda x, group=group: geometry.norm(x, group), leaves[i])
        for unit in units
        for i, group in unit.items()
    }


def per_leaf(values: jax.Array, unit: Unit, like: Any) -> dict[int, jax.Array]:
    """The values of a unit's groups as each of its leaves keeps them, in own buffers."""
    kept = {
        i: laid_out(values, like[i].shape, jax.typeof(like[i]).sharding).astype(like[i].dtype)
        for i in unit
    }
    return kept if len(kept) == 1 else {i: jnp.array(value) for i, value in kept.items()}


def check_values(
    who: str,
    params: Any,
    units: list[Unit],
    bad: Callable[[dict[int, Any], Unit], jax.Array],
    expected: str,
    found: str,
) -> None:
    """Raises a `ValueError` that counts the groups that are bad, where their values are known.

    What is traced or abstract passes. Of each unit one number is read, which is the same on
    every host.

    Args:
      who: The transform.
      params: The parameters.
      units: Their units.
      bad: From a unit's arrays and the unit to one truth value per group.
      expected: What groups should be, in words.
      found: What bad groups are, and how to put it right.
    """
    counts = _counts(params, units, bad, _known)
    known = {number: count for number, count in counts.items() if _known(count)}
    for number, count in jax.device_get(known).items():
        if count:
            names, total = _named(params, units[number])
            raise ValueError(
                f"{who}: {names}: expected {expected}, found {count} of {total} {found}."
            )


def warn_of_zeros(who: str, params: Any, units: list[Unit]) -> None:
    """Warns of groups of length 0: at once, or from the host where the values are traced."""
    counts = _counts(
        params,
        units,
        lambda x, unit: geometry.norm(x, unit) == 0,
        lambda value: _known(value, True),
    )
    if not counts:
        return
    named = [_named(params, units[number]) for number in counts]

    def warn(*counts: Any) -> None:
        bad = [
            f"{names} ({int(np.max(count))} of {total})"
            for (names, total), count in zip(named, counts, strict=True)
            if np.any(count)
        ]
        if bad:
            warnings.warn(
                f"{who}: expected groups of length above 0, found 0 in {', '.join(bad)}: a step "
                "relative to a length of 0 is none, so they never move; initialise them "
                "otherwise, or give the leaf no group.",
                stacklevel=2,
            )

    if all(_known(count) for count in counts.values()):
        warn(*jax.device_get(list(counts.values())))
    else:
        jax.debug.callback(warn, *counts.values())


def _counts(
    params: Any,
    units: list[Unit],
    bad: Callable[[dict[int, Any], Unit], jax.Array],
    readable: Callable[[Any], bool],
) -> dict[int, jax.Array]:
    """How many groups of each unit are bad, by the unit's number, where they can be read."""
    leaves = _trees.visible_leaves(params)
    return {
        number: jnp.sum(bad(pick(unit, [leaf.value for leaf in leaves]), unit))
        for number, unit in enumerate(units)
        if all(readable(leaves[i].value) for i in unit)
    }


def _named(params: Any, unit: Unit) -> tuple[str, int]:
    """The paths of a unit's leaves, and how many groups it has."""
    leaves = _trees.visible_leaves(params)
    i, group = next(iter(unit.items()))
    return ", ".join(leaves[i].path for i in unit), math.prod(group.shape(leaves[i].value.shape))


def _known(value: Any, traced: bool = False) -> bool:
    """Whether this is an array whose values can be looked at, or is traced where that will do."""
    array = isinstance(value, jax.Array | np.ndarray)
    return array and (traced or not isinstance(value, jax.core.Tracer))
