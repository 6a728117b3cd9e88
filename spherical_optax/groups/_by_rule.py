"""Numbers by rule: for each joint, that of the first pattern found in its leaves' paths."""

import re
from collections.abc import Mapping
from typing import Any

from spherical_optax import _trees
from spherical_optax.groups._group import Joint
from spherical_optax.groups._rules import first_match


def check_rules(who: str, what: str, rules: Mapping[str, Any]) -> None:
    """Raises unless there are rules, and their keys are regular expressions."""
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
    """The first rule found in the paths of each joint; raises where none is, or leaves disagree."""
    leaves = _trees.visible_leaves(params)
    found = []
    for joint in joints:
        said: dict[int, str] = {}
        for i in joint:
            match = first_match(rules, leaves[i].path)
            if match is None:
                raise ValueError(
                    f"{who}: expected a rule for the {what} of {leaves[i].path}, found none among "
                    f'{list(rules)}; add ".*" as the last one, for all others.'
                )
            said[i] = match[0]
        first, *others = joint
        for i in others:
            values = rules[said[i]], rules[said[first]]
            if values[0] is not values[1] and values[0] != values[1]:
                raise ValueError(
                    f"{who}: expected one {what} for the joint label {joint[i].joint!r}, found "
                    f"{values[1]!r} for {leaves[first].path} and {values[0]!r} for "
                    f"{leaves[i].path}."
                )
        found.append(said[first])
    return found


def check_used(
    who: str, what: str, rules: Mapping[str, Any], joints: list[Joint], params: Any
) -> None:
    """Raises a `ValueError` if a rule decides for no leaf with a group."""
    leaves = _trees.visible_leaves(params)
    paths = [leaves[i].path for joint in joints for i in joint]
    used = {match[0] for path in paths if (match := first_match(rules, path))}
    if unused := [pattern for pattern in rules if pattern not in used]:
        raise ValueError(
            f"{who}: expected each rule for {what} to decide for a leaf with a group, found "
            f"{unused}, which decide for none of {paths}."
        )
