"""The forms that a `groups` argument may have, and what it says of each leaf."""

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
    """What `find_radial_groups` measured for one leaf.

    Attributes:
      path: The leaf's path.
      tried: Each candidate tried, in words, and the deviation measured for it: 0 for
        groups that are exactly invariant, of order 1 for groups that are not.
      verdict: What follows, in words.
    """

    path: str
    tried: tuple[tuple[str, float], ...]
    verdict: str


@dataclasses.dataclass(frozen=True)
class FoundGroups:
    """Groups with the evidence for them; accepted wherever `groups` is.

    Attributes:
      groups: A tree like the parameters, of `RadialGroup` and `None`.
      findings: One `Finding` per leaf, in the tree's order.
      invariant_up_to: The largest deviation of a group found, 0 if none was.
      others_from: The smallest deviation of a candidate turned down; infinite if none was.
      forward_passes: What it cost, a gradient counted as three forward passes.
      varied: The constant arguments of the function that were varied, in words.
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
"""Any of the forms that the docstring of `spherical_optax.groups` lists."""

_HELPERS = (RadialGroup, per_filter, per_layer, per_channel_block, per_head)


def entries_of(groups: Groups, tree: Any, leaves: list[_trees.Leaf]) -> list[Entry]:
    """What `groups` says of each leaf of a tree."""
    rules_or_tree = _rules_or_tree(groups, tree)
    by = by_rules if isinstance(rules_or_tree, PathRules) else _by_prefix
    return by(rules_or_tree, leaves)


def _rules_or_tree(groups: Any, tree: Any) -> Any:
    """Rules, or a tree of groups."""
    if any(groups is helper for helper in _HELPERS):
        raise TypeError(f"groups: expected a group, found a function; call {groups.__name__}(...).")
    if hasattr(groups, "init") and hasattr(groups, "update"):
        raise TypeError(
            "groups: expected groups, found a gradient transformation; compose transformations "
            "with optax.chain, and give each its groups, such as per_filter()."
        )
    # What jax.tree looks into is a tree, be it a module that can be called.
    is_tree = not jax.tree_util.treedef_is_leaf(jax.tree.structure(groups))
    if callable(groups) and (not is_tree or isinstance(groups, jax.tree_util.Partial)):
        groups = groups(tree)
    if groups is None or groups is False:
        raise ValueError(
            f"groups: expected a group for some of the leaves, found {groups} for all of them: the "
            "optimizer would be one without groups. optax.inject_hyperparams takes a function of "
            'groups for a schedule and calls it with a step: name it in static_args=("groups",), '
            "or pass the rules of groups_by_path."
        )
    return groups.groups if isinstance(groups, FoundGroups) else groups


def _by_prefix(groups: Any, leaves: list[_trees.Leaf]) -> list[Entry]:
    """What a tree of groups, or a prefix of one, says of each leaf."""
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
                f"groups: expected a plain joint label at {where}, found {group.joint!r}; "
                "references to a match are for the rules of groups_by_path."
            )
    expected = "groups: expected a pytree prefix of the parameters"
    remedy = (
        "put None there for a leaf without a group. groups names "
        f"{['/'.join(keys) for keys in entries]}; regular expressions go through groups_by_path"
    )
    return [group for _, group in _trees.by_prefix(entries, leaves, expected, remedy)]
