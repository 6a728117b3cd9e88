"""A check of how an optimizer is called."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax

from spherical_optax.groups import FoundGroups, PathRules, RadialGroup

P = ParamSpec("P")
T = TypeVar("T")


def groups_by_name(factory: Callable[P, T]) -> Callable[P, T]:
    """The same function, which says so where groups are given by position."""

    @functools.wraps(factory)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        if "groups" not in kwargs and any(map(_are_groups, args)):
            raise TypeError(
                f"{factory.__name__}: expected groups by name, found them as a positional "
                f"argument; write {factory.__name__}(..., groups=groups)."
            )
        return factory(*args, **kwargs)

    return checked


def _are_groups(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(isinstance(leaf, RadialGroup) for leaf in jax.tree.leaves(value))
    return isinstance(value, RadialGroup | PathRules | FoundGroups)
