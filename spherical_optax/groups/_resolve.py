"""Which leaves of a tree form groups together."""

import dataclasses
import math
import numbers
import reprlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spherical_optax import _complex, _trees
from spherical_optax.groups._forms import FoundGroups, Groups, entries_of
from spherical_optax.groups._group import Entry, Joint, RadialGroup, group_size, per_filter
from spherical_optax.groups._rules import PathRules
from spherical_optax.groups._windows import warn_of_windows


def joints_of(groups: Groups, tree: Any) -> list[Joint]:
    """Resolves `groups` on a tree into joints: one per leaf, or per label of joint leaves.

    It reads only paths, shapes and dtypes of the tree. Leaves are numbered as in
    `_trees.flatten`; leaves without a group are absent. It raises an error with the path if
    `groups` does not fit, if a leaf with a group has no real floating dtype, or if `optax.masked`
    hides part of a joint.
    """
    leaves = _trees.leaves_with_paths(tree)
    if not leaves:  # optax.tree_map_params calls init with a leafless placeholder
        return []
    _check_parameters(leaves)
    entries = entries_of(groups, tree, leaves)
    group_of = [_checked(leaf, entry) for leaf, entry in zip(leaves, entries, strict=True)]
    pairs = _complex.pairs(tree) if any(leaf.keys[-1:] == ("real",) for leaf in leaves) else set()
    for n, (leaf, group) in enumerate(zip(leaves, group_of, strict=True)):
        if group is not None and group.joint is None and leaf.keys[:-1] in pairs:
            label = f"{'/'.join(leaf.keys[:-1])} (complex)"
            group_of[n] = dataclasses.replace(group, joint=label)
    _check_none_hidden(leaves, entries, group_of)
    grouped = zip(leaves, group_of, strict=True)
    return _joined([(leaf, group) for leaf, group in grouped if not leaf.hidden])


def _check_parameters(leaves: list[_trees.Leaf]) -> None:
    """Raises a `TypeError` for leaves of a model that are not parameters."""
    is_linen = {"params", "batch_stats"} <= {key for leaf in leaves for key in leaf.keys[:1]}
    for leaf in leaves:
        value, dtype = leaf.value, getattr(leaf.value, "dtype", None)
        if leaf.absent or isinstance(value, numbers.Number):
            continue
        if isinstance(value, PathRules | FoundGroups | RadialGroup):
            raise TypeError(
                f"expected a tree of parameters, found {type(value).__name__}. params and groups "
                "seem to be swapped."
            )
        if leaf.is_state:
            what = f"a {leaf.box.__name__}"
        elif is_linen and leaf.keys[0] == "batch_stats":
            what = "a statistic"
        elif dtype is None or isinstance(dtype, str):  # a string for a Keras variable
            what = f"{reprlib.repr(value)} of type {type(value).__name__}"
        elif jnp.issubdtype(dtype, jax.dtypes.prng_key):
            what = f"a random key of dtype {dtype}"
        else:
            continue
        raise TypeError(
            f"{leaf.path}: expected an array of parameters, found {what}. Pass only the "
            "parameters: nnx.state(model, nnx.Param), variables['params'] of a Linen model, "
            "eqx.filter(model, eqx.is_inexact_array), or "
            "{v.path: v.value for v in model.trainable_variables} of a Keras model."
        )


def _checked(leaf: _trees.Leaf, group: Entry) -> RadialGroup | None:
    """The leaf's group, after checking that the leaf can have it."""
    if isinstance(group, bool | np.bool_):
        group = per_filter() if group else None
    if group is None or leaf.absent:
        return None
    if not hasattr(leaf.value, "dtype"):
        raise TypeError(
            f"{leaf.path}: expected an array for a leaf with a radial group, found "
            f"{leaf.value!r} of type {type(leaf.value).__name__}. Give this parameter None."
        )
    shape, dtype = leaf.value.shape, leaf.value.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        split = ", or wrap the optimizer in optax.contrib.split_real_and_imaginary"
        raise TypeError(
            f"{leaf.path} of shape {shape}: expected a real floating dtype for a leaf with "
            f"a radial group, found {dtype}. Give this parameter None"
            f"{split if jnp.issubdtype(dtype, jnp.complexfloating) else ''}."
        )
    try:
        group.shape(shape)
    except ValueError as error:
        raise ValueError(f"{leaf.path} of shape {shape}: {error}, in {group}.") from None
    return group if 0 not in shape else None  # an empty leaf has no direction


def _check_none_hidden(
    leaves: list[_trees.Leaf], entries: list[Entry], group_of: list[RadialGroup | None]
) -> None:
    """Raises a `ValueError` if `optax.masked` hides only some leaves of a joint group."""
    hidden: dict[str | None, list[str]] = {}
    for leaf, entry in zip(leaves, entries, strict=True):
        if leaf.hidden and isinstance(entry, RadialGroup) and entry.joint is not None:
            hidden.setdefault(entry.joint, []).append(leaf.path)
    labels = [None if group is None else group.joint for group in group_of]
    for label in labels:
        if label in hidden:
            visible = [
                leaf.path for leaf, other in zip(leaves, labels, strict=True) if other == label
            ]
            raise ValueError(
                f"groups: joint label {label!r}: expected all its leaves or none, found "
                f"{visible}, while optax.masked or optax.partition hides {hidden[label]}. "
                "Give all leaves of the label to one transformation."
            )


def _joined(grouped: list[tuple[_trees.Leaf, RadialGroup | None]]) -> list[Joint]:
    """The joints: one per leaf, or per label, whose leaves must have equally many groups."""
    joints: dict[int | str, Joint] = {}
    for i, (leaf, group) in enumerate(grouped):
        if group is None:
            continue
        joint = joints.setdefault(i if group.joint is None else group.joint, {})
        joint[i] = group
        number, first_group = next(iter(joint.items()))
        first = grouped[number][0]
        expected = math.prod(first_group.shape(first.value.shape))
        count = math.prod(group.shape(leaf.value.shape))
        if count != expected:
            raise ValueError(
                f"{leaf.path} of shape {leaf.value.shape}: expected {expected} groups, as in "
                f"{first.path} of shape {first.value.shape} with the same joint label "
                f"{group.joint!r}, found {count}."
            )
    return list(joints.values())


def joints_at_init(groups: Groups, params: Any, keeps_radius: str | None = None) -> list[Joint]:
    """Like `joints_of`, with further checks for `init`.

    It warns of groups that look like columns of a convolution window, and of groups with one entry.
    If `keeps_radius` names a function that keeps or sets radii, groups with one entry raise a
    `ValueError`.
    """
    joints, leaves = joints_of(groups, params), _trees.visible_leaves(params)
    values = [leaf.value for leaf in leaves]
    single = [
        ", ".join(leaves[i].path or "the parameters" for i in joint)
        for joint in joints
        if group_size(joint, values) < 2
    ]
    if single and keeps_radius is not None:
        raise ValueError(
            f"{keeps_radius}: {single[0]}: expected groups of at least 2 entries, found 1. A "
            "single entry cannot rotate. Name fewer axes in index_axes, or give the parameter no "
            "group."
        )
    if single:
        warnings.warn(
            f"{'; '.join(single)}: expected groups of at least 2 entries, found 1. AdamS then "
            "works entry by entry, as Adam does, and nothing is projected or transported. "
            "Name fewer axes in index_axes, or give the parameter no group.",
            stacklevel=2,
        )
    warn_of_windows(joints, leaves)
    _warn_of_narrow_weights([leaves[i] for joint in joints for i in joint])
    return joints


def _warn_of_narrow_weights(leaves: list[_trees.Leaf]) -> None:
    """Warns of weights in half precision, once per program."""
    narrow = [leaf for leaf in leaves if leaf.value.dtype.itemsize < 4]
    if narrow:
        first = narrow[0]
        warnings.warn(
            f"{first.path or 'the parameters'}: expected float32 weights in groups, found "
            f"{first.value.dtype} for {len(narrow)} of {len(leaves)} leaves. bfloat16 rounds away "
            "steps below 0.4 % of a weight, float16 those below 0.05 %. Keep weights in float32, "
            "and compute in half precision.",
            UserWarning,
            stacklevel=2,
        )
