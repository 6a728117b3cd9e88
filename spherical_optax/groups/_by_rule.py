"""Values by rule: each joint gets the value of the first pattern found in its leaves' paths."""

import re
from collections.abc import Mapping
from typing import Any

from spherical_optax import _trees
from spherical_optax.groups._group import Joint
from spherical_optax.groups._rules import first_match


def check_rules(who: str, what: str, rules: Mapping[str, Any]) -> None:
    """Raises unless there is at least one rule and all keys are regular expressions."""
    if not rules:
        raise ValueError(f"{who}: expected at least one rule for {what}, found none.")
    for pattern in rules:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"{who}: expected regular expressions as keys of {what}, found {pattern!r}: "
                f"{error}."
            ) from None


def by_rule(
    who: str, what: str, rules: Mapping[str, Any], joints: list[Joint], params: Any
) -> list[str]:
    """The first rule that matches each joint; raises if none does or the leaves disagree."""
    leaves = _trees.visible_leaves(params)
    found = []
    for joint in joints:
        said: dict[int, str] = {}
        for i in joint:
            match = first_match(rules, leaves[i].path)
            if match is None:
                raise ValueError(
                    f"{who}: expected a rule for the {what} of {leaves[i].path}, found none among "
                    f'{list(rules)}. Add ".*" as the last rule to match all other leaves.'
                )
            said[i] = match[0]
        first, *others = joint
        for i in others:
            values = rules[said[i]], rules[said[first]]
            if values[0] is not values[1] and values[0] != values[1]:
                raise ValueError(
                    f"{who}: expected one {what} for the joint label {joint[i].joint!r}, found "
                    f"{values[1]!r} for {leaves[first].path} and {values[0]!r} for "
                    f"{leaves[i].path}. Let one rule match all leaves of the label."
                )
        found.append(said[first])
    return found


def check_used(
    who: str, what: str, rules: Mapping[str, Any], joints: list[Joint], params: Any
) -> None:
    """Raises a `ValueError` if a rule applies to no leaf with a group."""
    leaves = _trees.visible_leaves(params)
    paths = [leaves[i].path for joint in joints for i in joint]
    used = {match[0] for path in paths if (match := first_match(rules, path))}
    if unused := [pattern for pattern in rules if pattern not in used]:
        raise ValueError(
            f"{who}: expected each rule for {what} to apply to a leaf with a group, found "
            f"{unused}, which apply to none of {paths}. The first rule that matches a "
            "path applies to it."
        )
