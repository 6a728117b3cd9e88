"""A check that `groups` is passed by name."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax

from spherical_optax.groups import FoundGroups, PathRules, RadialGroup

P = ParamSpec("P")
T = TypeVar("T")


def groups_by_name(factory: Callable[P, T]) -> Callable[P, T]:
    """Wraps a function so that it raises a clear `TypeError` if groups are passed by position."""

    @functools.wraps(factory)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        if "groups" not in kwargs and any(map(_are_groups, args)):
            raise TypeError(
                f"{factory.__name__}: expected groups as a keyword argument, found them as a "
                f"positional argument. Write {factory.__name__}(..., groups=groups)."
            )
        return factory(*args, **kwargs)

    return checked


def _are_groups(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(isinstance(leaf, RadialGroup) for leaf in jax.tree.leaves(value))
    return isinstance(value, RadialGroup | PathRules | FoundGroups)
