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
    """The rules of `groups_by_path`.

    They are not callable, so `optax.inject_hyperparams` does not take them for a schedule.
    """

    rules: tuple[tuple[str, Entry], ...]


def groups_by_path(rules: Mapping[str, RadialGroup | bool | None]) -> PathRules:
    r"""Groups named by regular expressions on the parameters' paths.

    A path is the leaf's keys joined by slashes, such as `encoder/conv1/kernel`. Rules are tried in
    order with `re.search`; the first match wins. `conv/kernel` also matches `preconv/kernel`;
    `(^|/)conv/kernel` does not. Leaves that no rule matches have no group.

    In a `joint` label, `\1` stands for the text in the first parenthesis of the match. If that
    parenthesis matches the whole path of a module, one rule makes one joint group per module.

    Args:
      rules: Maps a regular expression to a `RadialGroup`, to `True` for `per_filter()`, or to
        `None` for leaves without a group.

    Returns:
      A rules object, accepted wherever `groups` is.

    Raises:
      TypeError: If a pattern is not a string, or a value is not a group.
      ValueError: If there are no rules, or a pattern is not a regular expression. At `init`, if a
        rule matches no path, if earlier rules match all its paths, if a label refers to a
        parenthesis that its pattern lacks, or if a rule gives one label to the same layer of
        several blocks (`encoder/query` and `decoder/query`).

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
                + " Call it, as in so.per_filter()."
                * callable(group)
            )
    return PathRules(tuple(rules.items()))


def first_match(patterns: Iterable[P], path: str) -> tuple[P, re.Match[str]] | None:
    """The first pattern that is found in a path, with its match; `None` if there is none."""
    matches = ((pattern, re.search(pattern, path)) for pattern in patterns)
    return next(((pattern, match) for pattern, match in matches if match), None)


def by_rules(rules: PathRules, leaves: list[_trees.Leaf]) -> list[Entry]:
    """The entry that the rules give to each leaf."""
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
    # The leaves of the other rules may be in a subtree that optax.masked hides.
    if not idle or (deciding and any(leaf.hidden for leaf in leaves)):
        return result
    if unused := [p for p in idle if not any(re.search(p, leaf.path) for leaf in leaves)]:
        raise ValueError(
            f"groups_by_path: no parameter path matches {unused}. The paths are "
            f"{[leaf.path for leaf in leaves]}."
        )
    raise ValueError(
        f"groups_by_path: earlier rules match every path that {idle} match. Put {idle} first. "
        f"The rules are {list(group_of)}."
    )


def _check_one_block(pattern: str, label: str | None, leaves: list[_trees.Leaf]) -> None:
    """Raises if one rule joins the same layer of several blocks, such as every `query`.

    Two layers are the same if their names differ only in digits.
    """
    alike: dict[tuple[str, str], dict[str, str]] = {}
    for leaf in leaves:
        module, _, name = leaf.path.rpartition("/")
        kind = re.sub(r"\d", "", module.rpartition("/")[2]).rstrip("_-. ")
        alike.setdefault((kind, name), {})[module] = leaf.path
    for modules in alike.values():
        if len(modules) > 1:
            raise ValueError(
                f"groups_by_path: rule {pattern!r}: expected one joint label per block, found "
                f"{label!r} for the same layer of several blocks, {list(modules.values())}. Put "
                r'the block into the label, as in r"(.*)/(kernel|bias)" with joint=r"\1". If they '
                "do form one group, write one rule for each, with the same label."
            )


def _with_label(group: RadialGroup, match: re.Match[str], leaf: _trees.Leaf) -> RadialGroup:
    """The group, with the references in its label replaced by text from the match."""
    try:
        return dataclasses.replace(group, joint=match.expand(group.joint or ""))
    except (re.error, IndexError, ValueError) as error:
        raise ValueError(
            f"groups_by_path: rule {match.re.pattern!r}: expected a joint label that refers to "
            f"parentheses of the rule, found {group.joint!r} for {leaf.path}: {error}."
        ) from None
