"""Rules on the paths of parameters."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from spherical_optax import _trees
from spherical_optax.groups._group import Entry, RadialGroup, is_entry

P = TypeVar("P", str, re.Pattern[str])


@dataclasses.dataclass(frozen=True)
class PathRules:
    """Rules of `groups_by_path`.

    Not callable, so that `optax.inject_hyperparams` does not take it for a schedule.
    """

    rules: tuple[tuple[str, Entry], ...]


def groups_by_path(rules: Mapping[str, RadialGroup | bool | None]) -> PathRules:
    r"""Groups named by regular expressions on the parameters' paths.

    A path is the leaf's keys joined by slashes, such as `encoder/conv1/kernel`. Rules are tried in
    order with `re.search`; the first match wins. `conv/kernel` also matches `preconv/kernel`,
    `(^|/)conv/kernel` does not. Leaves that no rule matches have no group.
    In a `joint` label, `\1` stands for the match's first parenthesis: where that matches a
    module's whole path, one rule forms one joint group per module.

    Args:
      rules: Maps a regular expression to a `RadialGroup`, or to `None` for leaves without a group.

    Returns:
      A rules object, accepted wherever `groups` is.

    Raises:
      TypeError: If a pattern is not a string, or a value is not a group.
      ValueError: If there are no rules, a pattern is not a regular expression, or a label
        names a parenthesis that its pattern lacks; and at `init`, if a rule matches no
        path, or none that an earlier rule leaves, or gives one label to the same layer
        of several blocks (`encoder/query` and `decoder/query`).

    Examples:
      >>> import jax.numpy as jnp
      >>> import spherical_optax as so
      >>> params = {"conv": {"kernel": jnp.ones((3, 3, 1, 8)), "bias": jnp.ones(8)},
      ...           "norm": {"scale": jnp.ones(8)}}
      >>> groups = so.groups_by_path({r"conv/kernel": so.per_filter()})
      >>> print(so.describe_groups(params, groups))
      path         shape         groups  entries per group  label
      conv/bias    (8,)          -       -                  -
      conv/kernel  (3, 3, 1, 8)  8       9                  -
      norm/scale   (8,)          -       -                  -
      >>> joint = so.groups_by_path({r"(.*)/(kernel|bias)": so.per_layer(joint=r"\1")})
    """
    if not isinstance(rules, Mapping):
        raise TypeError(
            f"groups_by_path: expected a dictionary from regular expression to group, found "
            f"{rules!r} of type {type(rules).__name__}."
        )
    if not rules:
        raise ValueError("groups_by_path: expected at least one rule, found none.")
    for pattern, group in rules.items():
        if not isinstance(pattern, str):
            raise TypeError(
                f"groups_by_path: expected strings with regular expressions as keys, found "
                f"{pattern!r}."
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"groups_by_path: {pattern!r} is not a regular expression: {error}."
            ) from error
        if not is_entry(group):
            raise TypeError(
                f"groups_by_path: expected a RadialGroup, None, True or False for rule "
                f"{pattern!r}, found {group!r}."
            )
    return PathRules(tuple(rules.items()))


def first_match(patterns: Iterable[P], path: str) -> tuple[P, re.Match[str]] | None:
    """The first pattern that is found in a path, with its match; `None` if none is."""
    matches = ((pattern, re.search(pattern, path)) for pattern in patterns)
    return next(((pattern, match) for pattern, match in matches if match), None)


def by_rules(rules: PathRules, leaves: list[_trees.Leaf]) -> list[Entry]:
    """What the rules say of each leaf."""
    group_of = dict(rules.rules)
    deciding: set[str] = set()
    labelled: dict[tuple[str, str | None], list[_trees.Leaf]] = {}
    result: list[Entry] = []
    for leaf in leaves:
        group: Entry = None
        if first := first_match(group_of, leaf.path):
            pattern, match = first
            deciding.add(pattern)
            group = group_of[pattern]
            if isinstance(group, RadialGroup) and group.joint is not None:
                group = _with_label(group, match, leaf)
                labelled.setdefault((pattern, group.joint), []).append(leaf)
        result.append(group)
    for (pattern, label), together in labelled.items():
        _check_one_block(pattern, label, together)
    idle = [pattern for pattern in group_of if pattern not in deciding]
    # Below a subtree that optax.masked hides, other rules may have their leaves.
    if not idle or (deciding and any(leaf.hidden for leaf in leaves)):
        return result
    if unused := [p for p in idle if not any(re.search(p, leaf.path) for leaf in leaves)]:
        raise ValueError(
            f"groups_by_path: no parameter path matches {unused}. The paths are "
            f"{[leaf.path for leaf in leaves]}."
        )
    raise ValueError(
        f"groups_by_path: every path that {idle} match is decided by an earlier rule; put "
        f"them first. The rules are {list(group_of)}."
    )


def _check_one_block(pattern: str, label: str | None, leaves: list[_trees.Leaf]) -> None:
    """Raises where one rule joins the same layer of several blocks, as `encoder1/query` of all.

    Layers are the same if their names are, but for numbers.
    """
    alike: dict[tuple[str, str], dict[str, str]] = {}
    for leaf in leaves:
        module, _, name = leaf.path.rpartition("/")
        kind = re.sub(r"\d", "", module.rpartition("/")[2]).rstrip("_-. ")
        alike.setdefault((kind, name), {})[module] = leaf.path
    for modules in alike.values():
        if len(modules) > 1:
            raise ValueError(
                f"groups_by_path: rule {pattern!r} gives the joint label {label!r} to "
                f"{list(modules.values())}, the same layer of several blocks, expected one label "
                'per block; put the block into the label, as r"(.*)/(kernel|bias)" with '
                r'joint=r"\1" does. Where they are one group indeed, write one rule for each, '
                "with the same label."
            )


def _with_label(group: RadialGroup, match: re.Match[str], leaf: _trees.Leaf) -> RadialGroup:
    """The group with its label's references to the match filled in."""
    try:
        return dataclasses.replace(group, joint=match.expand(group.joint or ""))
    except (re.error, IndexError, ValueError) as error:
        raise ValueError(
            f"groups_by_path: rule {match.re.pattern!r} gives {leaf.path} the joint label "
            f"{group.joint!r}, expected a label that its parentheses fill, found: {error}."
        ) from None
