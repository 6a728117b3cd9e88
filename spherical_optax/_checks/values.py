"""Checks of parameter values: bad groups are counted where their values can be read."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spherical_optax import _trees, geometry
from spherical_optax._engine.state import pick
from spherical_optax.groups import Joint


def check_values(
    who: str,
    params: Any,
    joints: list[Joint],
    bad: Callable[[dict[int, Any], Joint], jax.Array],
    expected: str,
    found: str,
) -> None:
    """Raises a `ValueError` that counts the bad groups, where their values are known.

    Traced and abstract values pass. One number is read per joint, and it is the same on every host.

    `bad` maps a joint's arrays and the joint to one truth value per group. In the message,
    `expected` describes good groups, and `found` describes bad ones and how to put them right.
    """
    counts = _counts(params, joints, bad, _known)
    known = {number: count for number, count in counts.items() if _known(count)}
    for number, count in jax.device_get(known).items():
        if count:
            names, total = _named(params, joints[number])
            raise ValueError(
                f"{who}: {names}: expected {expected}, found {count} of {total} {found}."
            )


def warn_of_zeros(who: str, params: Any, joints: list[Joint]) -> None:
    """Warns of groups of length 0: at once, or by a host callback if the values are traced."""
    counts = _counts(
        params,
        joints,
        lambda x, joint: geometry.norm(x, joint) == 0,
        lambda value: _known(value, True),
    )
    if not counts:
        return
    named = [_named(params, joints[number]) for number in counts]

    def warn(*counts: Any) -> None:
        bad = [
            f"{names} ({int(np.max(count))} of {total})"
            for (names, total), count in zip(named, counts, strict=True)
            if np.any(count)
        ]
        if bad:
            warnings.warn(
                f"{who}: expected groups of length above 0, found 0 in {', '.join(bad)}. Steps are "
                "relative to the length, so these groups never move. Initialize them to other "
                "values, or give the parameter no group.",
                stacklevel=2,
            )

    if all(_known(count) for count in counts.values()):
        warn(*jax.device_get(list(counts.values())))
    else:
        jax.debug.callback(warn, *counts.values())


def _counts(
    params: Any,
    joints: list[Joint],
    bad: Callable[[dict[int, Any], Joint], jax.Array],
    readable: Callable[[Any], bool],
) -> dict[int, jax.Array]:
    """The number of bad groups of each joint that can be read, by the joint's number."""
    leaves = _trees.visible_leaves(params)
    return {
        number: jnp.sum(bad(pick(joint, [leaf.value for leaf in leaves]), joint))
        for number, joint in enumerate(joints)
        if all(readable(leaves[i].value) for i in joint)
    }


def _named(params: Any, joint: Joint) -> tuple[str, int]:
    """The paths of a joint's leaves, and its number of groups."""
    leaves = _trees.visible_leaves(params)
    i, group = next(iter(joint.items()))
    return ", ".join(leaves[i].path for i in joint), math.prod(group.shape(leaves[i].value.shape))


def _known(value: Any, traced: bool = False) -> bool:
    """Whether this is an array whose values can be read; with `traced`, a tracer counts too."""
    array = isinstance(value, jax.Array | np.ndarray)
    return array and (traced or not isinstance(value, jax.core.Tracer))
