"""Finds moments in another transformation's state by the paths of their parameters."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from spherical_optax import _trees
from spherical_optax.groups import Joint

FIRST_MOMENTS, SECOND_MOMENTS = ("mu", "trace"), ("nu",)

Field = dict[int, int]
"""A field of an inner state: maps the number of a parameter to the number of its moment."""


class Names(NamedTuple):
    """The names of the fields that hold first and second moments."""

    first: tuple[str, ...]
    second: tuple[str, ...]


def check_names(who: str, argument: str, names: Any) -> tuple[str, ...]:
    """The field names as a tuple; raises a `TypeError` if they are not a tuple or list of names."""
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"{who}: expected {argument} as a tuple of field names, found {names!r}. "
            'Write ("mu",) for a single name.'
        )
    return tuple(names)


def find_moments(inner_state: Any, params: Any, names: Names) -> tuple[list[Field], list[Field]]:
    """The fields of first and of second moments with leaves at the parameters' paths."""
    numbers = {leaf.keys: i for i, leaf in enumerate(_trees.visible_leaves(params))}
    found: dict[tuple[str, ...], Field] = {}
    for place, leaf in enumerate(_trees.visible_leaves(inner_state)):
        for depth, key in enumerate(leaf.keys, start=1):
            # The outermost key decides, because a parameter may itself be called mu or nu.
            if key in names.first + names.second and leaf.keys[depth:] in numbers:
                found.setdefault(leaf.keys[:depth], {})[numbers[leaf.keys[depth:]]] = place
                break
    first = [field for keys, field in found.items() if keys[-1] in names.first]
    second = [field for keys, field in found.items() if keys[-1] in names.second]
    return first, second


def fields_of(joint: Joint, fields: list[Field], kept: list[Any]) -> Iterator[tuple[Field, Joint]]:
    """The fields with moments of a joint, each with the part of the joint that it holds."""
    for field in fields:
        part = {i: g for i, g in joint.items() if i in field and kept[field[i]] is not None}
        if part:
            yield field, part


def check_moments(
    who: str, inner_state: Any, params: Any, joints: list[Joint], names: Names
) -> None:
    """Raises a `ValueError` if a field is missing, or a moment does not fit its parameter."""
    leaves = _trees.visible_leaves(params)
    kept = _trees.visible_leaves(inner_state)
    first, second = find_moments(inner_state, params, names)
    if any(leaf.value is not None for leaf in leaves):
        moments = {kept[place].keys for field in first + second for place in field.values()}
        _check_found(who, leaves, kept, moments, names)
    for fields, of_groups in ((first, False), (second, True)):
        for field in fields:
            for i, group in ((i, g) for joint in joints for i, g in joint.items() if i in field):
                expected = [leaves[i].value.shape]
                if of_groups:
                    expected.append(group.shape(leaves[i].value.shape))
                moment = kept[field[i]]
                if moment.value.shape not in expected:
                    raise ValueError(
                        f"{who}: {leaves[i].path} of shape {leaves[i].value.shape}: "
                        f"expected its moment {moment.path} to have shape "
                        f"{' or '.join(map(str, expected))}, found {moment.value.shape}."
                    )


def _without_suffix(keys: tuple[str, ...], suffixes: set[tuple[str, ...]]) -> tuple[str, ...]:
    return next((keys[:n] for n in range(len(keys)) if keys[n:] in suffixes), keys)


def _check_found(
    who: str,
    leaves: list[_trees.Leaf],
    kept: list[_trees.Leaf],
    moments: set[tuple[str, ...]],
    names: Names,
) -> None:
    """Raises if no moment was found, or none under a name other than the defaults."""
    paths = {leaf.keys for leaf in leaves}
    fields = sorted({"/".join(_without_suffix(leaf.keys, paths)) for leaf in kept})
    found = {key for keys in moments for key in keys}
    given = [
        name
        for each, default in ((names.first, FIRST_MOMENTS), (names.second, SECOND_MOMENTS))
        for name in each
        if each != default
    ]
    missing = [name for name in given if name not in found]
    if missing or not moments:
        wanted = missing or sorted(names.first + names.second)
        raise ValueError(
            f"{who}: expected a field named {wanted} in the inner state, found "
            f"{fields or 'no moments'}. Name the fields with first_moments=(...)."
        )
