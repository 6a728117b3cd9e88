"""What the transforms share: leaves picked by unit, and state kept per group."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from spherical_optax import _trees, geometry
from spherical_optax.groups import RadialGroup

Unit = dict[int, RadialGroup]
"""Leaves that form groups together: from a leaf's number to its group."""


def pick(unit: Unit, leaves: Any) -> dict[int, jax.Array]:
    """The arrays of a unit's leaves."""
    return {i: leaves[i] for i in unit}


def present(units: list[Unit], leaves: Any) -> list[Unit]:
    """The units without the leaves that are `None`, as a missing gradient is."""
    units = [{i: group for i, group in unit.items() if leaves[i] is not None} for unit in units]
    return [unit for unit in units if unit]


def require_params(transform: str, params: Any) -> None:
    """Raises a `ValueError` that names the transform where params is missing."""
    if params is None:
        raise ValueError(
            f"{transform} requires the current value of the parameters, but `params` was not "
            "passed to `update`: call update(updates, state, params)."
        )


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


def zeros_per_group(units: list[Unit], leaves: list[Any]) -> dict[int, jax.Array]:
    """One zero per group, by leaf number, in the dtype that sums accumulate in."""
    return {
        i: jnp.zeros(group.shape(leaves[i].shape), geometry.accumulator(leaves[i].dtype))
        for unit in units
        for i, group in unit.items()
    }


def per_leaf(values: jax.Array, unit: Unit, like: Any) -> dict[int, jax.Array]:
    """The values of a unit's groups as each of its leaves keeps them."""
    return {i: values.reshape(like[i].shape).astype(like[i].dtype) for i in unit}
