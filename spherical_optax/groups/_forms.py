"""The forms that a `groups` argument may have, and the entry that it gives to each leaf."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import jax

from spherical_optax import _trees
from spherical_optax.groups._group import (
    Entry,
    RadialGroup,
    is_entry,
    per_channel_block,
    per_filter,
    per_head,
    per_layer,
)
from spherical_optax.groups._rules import PathRules, by_rules


class Finding(NamedTuple):
    """The measurements of `find_radial_groups` for one leaf.

    Attributes:
      path: The leaf's path.
      tried: Each candidate that was tried, in words, with its measured deviation: 0 for groups
        that are exactly invariant, of order 1 for groups that are not.
      verdict: The conclusion, in words.
    """

    path: str
    tried: tuple[tuple[str, float], ...]
    verdict: str


@dataclasses.dataclass(frozen=True)
class FoundGroups:
    """Groups with the evidence for them; accepted as a `groups` argument.

    Attributes:
      groups: A tree like the parameters, of `RadialGroup` and `None`.
      findings: One `Finding` per leaf, in the order of the tree.
      invariant_up_to: The largest deviation of a group that was found; 0 if none was found.
      others_from: The smallest deviation of a rejected candidate; infinite if none was rejected.
      forward_passes: The cost of the search. A gradient counts as three forward passes.
      varied: The constant arguments of the function that the search varied, in words.
    """

    groups: Any
    findings: tuple[Finding, ...]
    invariant_up_to: float
    others_from: float
    forward_passes: int
    varied: tuple[str, ...] = ()


class _Dataclass(Protocol):
    """A tree that is a dataclass, such as an Equinox module."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


Groups: TypeAlias = (
    RadialGroup
    | bool
    | PathRules
    | FoundGroups
    | Mapping[Any, Any]
    | list[Any]
    | tuple[Any, ...]
    | _Dataclass
    | Callable[[Any], Any]
    | None
)
"""One of the forms that the docstring of `spherical_optax.groups` lists."""

_HELPERS = (RadialGroup, per_filter, per_layer, per_channel_block, per_head)


def entries_of(groups: Groups, tree: Any, leaves: list[_trees.Leaf]) -> list[Entry]:
    """The entry that `groups` gives to each leaf of a tree."""
    rules_or_tree = _rules_or_tree(groups, tree)
    by = by_rules if isinstance(rules_or_tree, PathRules) else _by_prefix
    return by(rules_or_tree, leaves)


def _rules_or_tree(groups: Any, tree: Any) -> Any:
    """The rules or the tree of groups that a `groups` argument stands for."""
    if any(groups is helper for helper in _HELPERS):
        raise TypeError(f"groups: expected a group, found a function; call {groups.__name__}(...).")
    if hasattr(groups, "init") and hasattr(groups, "update"):
        raise TypeError(
            "groups: expected groups, found a gradient transformation; compose transformations "
            "with optax.chain, and give each its groups, such as per_filter()."
        )
    # Anything that jax.tree looks into is a tree, even a callable module.
    is_tree = not jax.tree_util.treedef_is_leaf(jax.tree.structure(groups))
    if callable(groups) and (not is_tree or isinstance(groups, jax.tree_util.Partial)):
        groups = groups(tree)
    if groups is None or groups is False:
        raise ValueError(
            f"groups: expected a group for at least one leaf, found {groups} for all of them. "
            "If groups is a function inside optax.inject_hyperparams, it was called with the step, "
            'like a schedule: pass static_args=("groups",) there, or the rules of groups_by_path.'
        )
    return groups.groups if isinstance(groups, FoundGroups) else groups


def _by_prefix(groups: Any, leaves: list[_trees.Leaf]) -> list[Entry]:
    """The entry that a tree of groups, or a prefix of one, gives to each leaf."""
    entries = {leaf.keys: leaf.value for leaf in _trees.leaves_with_paths(groups)}
    for keys, group in entries.items():
        where = "/".join(keys) or "the root"
        if not is_entry(group):
            raise TypeError(
                f"groups: expected a RadialGroup, None, True or False at {where}, found {group!r} "
                f"of type {type(group).__name__}."
            )
        if isinstance(group, RadialGroup) and "\\" in (group.joint or ""):
            raise ValueError(
                f"groups: expected a plain joint label at {where}, found {group.joint!r}. "
                "Only the rules of groups_by_path replace references to a match."
            )
    expected = "groups: expected a pytree prefix of the parameters"
    remedy = (
        "put None there for a leaf without a group. groups has entries for "
        f"{['/'.join(keys) for keys in entries]}. To use regular expressions, call groups_by_path"
    )
    return [group for _, group in _trees.by_prefix(entries, leaves, expected, remedy)]
