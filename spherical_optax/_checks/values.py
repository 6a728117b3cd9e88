"""Checks of values: groups that are bad are counted where they can be read."""

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
    """Raises a `ValueError` that counts the groups that are bad, where their values are known.

    What is traced or abstract passes. Of each joint one number is read, which is the same on
    every host. `bad` makes of a joint's arrays and the joint one truth value per group; what groups
    should be, and how bad ones are put right, stands in `expected` and `found`.
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
    """Warns of groups of length 0: at once, or from the host where the values are traced."""
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
    joints: list[Joint],
    bad: Callable[[dict[int, Any], Joint], jax.Array],
    readable: Callable[[Any], bool],
) -> dict[int, jax.Array]:
    """How many groups of each joint are bad, by the joint's number, where they can be read."""
    leaves = _trees.visible_leaves(params)
    return {
        number: jnp.sum(bad(pick(joint, [leaf.value for leaf in leaves]), joint))
        for number, joint in enumerate(joints)
        if all(readable(leaves[i].value) for i in joint)
    }


def _named(params: Any, joint: Joint) -> tuple[str, int]:
    """The paths of a joint's leaves, and how many groups it has."""
    leaves = _trees.visible_leaves(params)
    i, group = next(iter(joint.items()))
    return ", ".join(leaves[i].path for i in joint), math.prod(group.shape(leaves[i].value.shape))


def _known(value: Any, traced: bool = False) -> bool:
    """Whether this is an array whose values can be looked at, or is traced where that will do."""
    array = isinstance(value, jax.Array | np.ndarray)
    return array and (traced or not isinstance(value, jax.core.Tracer))
