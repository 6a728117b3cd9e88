"""Which parameter entries are radially invariant, and how they group.

A group is a set of entries x with L(a x) = L(x) for all a > 0. `RadialGroup` says
how one array splits into groups; a `groups` argument says it for a whole tree, as

- rules on the parameters' paths, from `groups_by_path`;
- a tree with the parameters' keys, of `RadialGroup`, `None` (no group) or `True` (one
  group per output channel) and `False` (no group). An entry may stand for a whole
  subtree: `groups=True` gives a group to every leaf, biases as well;
- what `find_radial_groups` returns;
- a function of the parameters that returns such a tree, reading paths and shapes only.

A tree may be a module with a `__call__`, as one made from an Equinox model is: it is not
called. `optax.inject_hyperparams` does take everything callable for a schedule, and would
call such a tree, or a function, with a step count: name it, `static_args=("groups",)`, or
use rules.

`describe_groups` shows what was selected.
"""

import dataclasses
import math
import numbers
import operator
import re
import reprlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from spherical_optax import _complex, _trees


@dataclasses.dataclass(frozen=True)
class RadialGroup:
    """How one parameter array splits into radially invariant groups.

    Entries that agree on the index axes form one group; sums run over all other
    axes. Per-group quantities have the index axes' sizes as their shape, in array
    order: `(cout,)` for the default on a kernel `(h, w, cin, cout)`.

    Args:
      index_axes: The axes that index the groups. `(-1,)` is one group per output
        channel of a Flax kernel, `()` the whole array.
      num_blocks: Splits the last index axis into this many contiguous blocks, one
        group each (GroupNorm). Must divide that axis.
      joint: Leaves with the same label, and the same number of groups, form one
        group together (a kernel and its bias before LayerNorm).

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If an axis is repeated, or `num_blocks` is below one or has no
        axis to split.

    Examples:
      >>> from spherical_optax import RadialGroup
      >>> RadialGroup(index_axes=(0,)).shape((8, 5))
      (8,)
      >>> RadialGroup(num_blocks=4).shape((3, 3, 16, 32))
      (4,)
    """

    index_axes: tuple[int, ...] = (-1,)
    num_blocks: int | None = None
    joint: str | None = None

    def __post_init__(self) -> None:
        axes = self.index_axes
        if isinstance(axes, str) or not isinstance(axes, Iterable):
            raise TypeError(
                f"RadialGroup: expected index_axes as a tuple of ints, found {axes!r}; "
                "write (-1,) for one axis and () for the whole array."
            )
        axes = tuple(_index("index_axes", axis) for axis in axes)
        if len(set(axes)) < len(axes):
            raise ValueError(f"RadialGroup: index_axes repeats an axis: {axes!r}.")
        if self.num_blocks is not None:
            object.__setattr__(self, "num_blocks", _index("num_blocks", self.num_blocks))
            if self.num_blocks < 1:
                raise ValueError(
                    f"RadialGroup: expected num_blocks of at least 1, found {self.num_blocks}."
                )
            if not axes:
                raise ValueError(
                    "RadialGroup: num_blocks splits the last index axis, and index_axes is "
                    "empty; name the axis, for example index_axes=(-1,)."
                )
        if self.joint is not None and not isinstance(self.joint, str):
            raise TypeError(f"RadialGroup: expected joint as a string, found {self.joint!r}.")
        if self.joint is not None and not (self.joint and self.joint.isprintable()):
            raise ValueError(
                f"RadialGroup: expected a printable label joint, found {self.joint!r}; the "
                r'first parenthesis of a rule is written as a raw string, r"\1".'
            )
        object.__setattr__(self, "index_axes", axes)

    def axes(self, ndim: int) -> tuple[int, ...]:
        """The index axes of an array of rank `ndim`, non-negative and ascending.

        Raises:
          ValueError: If an axis is out of range, or named twice (as 1 and as -1).
        """
        for axis in self.index_axes:
            if not -ndim <= axis < ndim:
                raise ValueError(
                    f"expected index_axes within an array of {ndim} axes, found {self.index_axes}"
                )
        axes = tuple(sorted(axis % ndim for axis in self.index_axes))
        if len(set(axes)) < len(axes):
            raise ValueError(
                f"expected distinct index_axes, found {self.index_axes}, "
                f"which repeats an axis of an array of {ndim} axes"
            )
        return axes

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of per-group quantities for an array of the given shape.

        Raises:
          ValueError: If the axes do not fit, or `num_blocks` does not divide.
        """
        sizes = [shape[axis] for axis in self.axes(len(shape))]
        if self.num_blocks is not None:
            if sizes[-1] % self.num_blocks:
                raise ValueError(
                    f"expected num_blocks to divide the last index axis of size {sizes[-1]}, "
                    f"found num_blocks={self.num_blocks}"
                )
            sizes[-1] = self.num_blocks
        return tuple(sizes)


def _index(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"RadialGroup: expected integer {name}, found {value!r}.") from None


def per_filter(*, axis: int = -1) -> RadialGroup:
    """One group per output channel (BatchNorm).

    Args:
      axis: The axis of the output channels: the last of a Flax kernel, 0 of an Equinox or
        PyTorch kernel `(out, in, ...)`.

    Examples:
      >>> from spherical_optax import per_filter
      >>> per_filter().shape((3, 3, 16, 32))
      (32,)
      >>> per_filter(axis=0).shape((32, 16, 3, 3))
      (32,)
    """
    return RadialGroup(index_axes=(axis,))


def per_layer(joint: str | None = None) -> RadialGroup:
    """The whole array as one group (LayerNorm, RMSNorm).

    Args:
      joint: Label shared with the leaves that belong to the same group.

    Examples:
      >>> from spherical_optax import per_layer
      >>> per_layer().shape((16, 32))
      ()
    """
    return RadialGroup(index_axes=(), joint=joint)


def per_channel_block(n: int, joint: str | None = None, *, axis: int = -1) -> RadialGroup:
    """`n` contiguous blocks of output channels, one group each (GroupNorm).

    Args:
      n: Number of blocks; must divide the number of output channels.
      joint: Label shared with the leaves that belong to the same groups.
      axis: The axis of the output channels: the last of a Flax kernel, 0 of an Equinox or
        PyTorch kernel `(out, in, ...)` and of its bias.

    Examples:
      >>> from spherical_optax import per_channel_block
      >>> per_channel_block(4).shape((3, 3, 16, 32))
      (4,)
      >>> per_channel_block(4, axis=0).shape((32, 16, 3, 3))
      (4,)
    """
    return RadialGroup(index_axes=(axis,), num_blocks=n, joint=joint)


def per_head(axis: int, joint: str | None = None) -> RadialGroup:
    """One group per attention head, for a norm over each head (QK-norm).

    Args:
      axis: The axis that indexes the heads: -2 for a kernel `(d, heads, k)` and for its
        bias `(heads, k)`.
      joint: Label shared with the leaves that belong to the same groups.

    Examples:
      >>> from spherical_optax import per_head
      >>> per_head(axis=-2).shape((512, 8, 64))
      (8,)
    """
    return RadialGroup(index_axes=(axis,), joint=joint)


_HELPERS = (RadialGroup, per_filter, per_layer, per_channel_block, per_head)


@dataclasses.dataclass(frozen=True)
class PathRules:
    """Rules of `groups_by_path`.

    Not callable, so that `optax.inject_hyperparams` does not take it for a schedule.
    """

    rules: tuple[tuple[str, RadialGroup | bool | None], ...]


def groups_by_path(rules: Mapping[str, RadialGroup | bool | None]) -> PathRules:
    r"""Groups named by regular expressions on the parameters' paths.

    A path is the leaf's keys joined by slashes, such as `encoder/conv1/kernel`; the first
    rule found anywhere in it (`re.search`) decides: `conv/kernel` is also found in
    `preconv/kernel`, `(^|/)conv/kernel` is not. Leaves that no rule matches have no group.
    In a `joint` label, `\1` stands for the match's first parenthesis: where that matches a
    module's whole path, one rule forms one joint group per module.

    Args:
      rules: Maps a regular expression to a `RadialGroup`, or to `None` for leaves
        without a group.

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
        if not _is_group(group):
            raise TypeError(
                f"groups_by_path: expected a RadialGroup, None, True or False for rule "
                f"{pattern!r}, found {group!r}."
            )
    return PathRules(tuple(rules.items()))


def _is_group(value: Any) -> bool:
    return value is None or isinstance(value, RadialGroup | bool | np.bool_)


def _by_rules(rules: PathRules, leaves: list[_trees.Leaf]) -> list[RadialGroup | bool | None]:
    matched: set[str] = set()
    deciding: set[str] = set()
    labelled: dict[tuple[str, str], list[_trees.Leaf]] = {}
    result: list[RadialGroup | bool | None] = []
    for leaf in leaves:
        group: RadialGroup | bool | None = None
        decided = False
        for pattern, candidate in rules.rules:
            match = re.search(pattern, leaf.path)
            if match is None:
                continue
            matched.add(pattern)
            if decided:
                continue
            deciding.add(pattern)
            group, decided = candidate, True
            if isinstance(group, RadialGroup) and group.joint is not None:
                group = _with_label(group, match, leaf)
                labelled.setdefault((pattern, group.joint or ""), []).append(leaf)
        result.append(group)
    for (pattern, label), together in labelled.items():
        _check_one_block(pattern, label, together)
    unused = [pattern for pattern, _ in rules.rules if pattern not in matched]
    # Below a subtree that optax.masked hides, other rules may have their leaves.
    hidden = matched and any(leaf.hidden for leaf in leaves)
    if unused and not hidden:
        raise ValueError(
            f"groups_by_path: no parameter path matches {unused}. The paths are "
            f"{[leaf.path for leaf in leaves]}."
        )
    shadowed = [pattern for pattern, _ in rules.rules if pattern in matched - deciding]
    if shadowed and not hidden:
        raise ValueError(
            f"groups_by_path: every path that {shadowed} match is decided by an earlier rule; put "
            f"them first. The rules are {[pattern for pattern, _ in rules.rules]}."
        )
    return result


def _check_one_block(pattern: str, label: str, leaves: list[_trees.Leaf]) -> None:
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


def _by_prefix(groups: Any, leaves: list[_trees.Leaf]) -> list[RadialGroup | bool | None]:
    given = {leaf.keys: leaf.value for leaf in _trees.leaves_with_paths(groups)}
    for keys, group in given.items():
        if not _is_group(group):
            raise TypeError(
                f"groups: expected a RadialGroup, None, True or False at "
                f"{'/'.join(keys) or 'the root'}, found {group!r} of type "
                f"{type(group).__name__}."
            )
        if isinstance(group, RadialGroup) and "\\" in (group.joint or ""):
            raise ValueError(
                f"groups: expected a plain joint label at {'/'.join(keys) or 'the root'}, found "
                f"{group.joint!r}; references to a match are for the rules of groups_by_path."
            )
    result: list[RadialGroup | bool | None] = []
    used = set()
    for leaf in leaves:
        prefix = next(
            (leaf.keys[:n] for n in range(len(leaf.keys) + 1) if leaf.keys[:n] in given), None
        )
        if prefix is not None:
            used.add(prefix)
            result.append(given[prefix])
            continue
        if leaf.value is None or leaf.hidden:  # groups may reach below what is absent here
            used |= {keys for keys in given if keys[: len(leaf.keys)] == leaf.keys}
            result.append(None)
            continue
        raise ValueError(
            f"groups: expected a pytree prefix of the parameters, found nothing for "
            f"{leaf.path} of shape {np.shape(leaf.value)}; put None there for a leaf "
            f"without a group. groups names {['/'.join(keys) for keys in given]}; regular "
            "expressions go through groups_by_path."
        )
    unknown = ["/".join(keys) for keys in given if keys not in used]
    if unknown:
        raise ValueError(
            f"groups: expected a pytree prefix of the parameters, found {unknown}, which "
            f"no parameter has. The paths are {[leaf.path for leaf in leaves]}."
        )
    return result


def _checked(leaf: _trees.Leaf, group: RadialGroup | bool | None) -> RadialGroup | None:
    """The leaf's group, after checking that the leaf can have it."""
    if isinstance(group, bool | np.bool_):
        group = per_filter() if group else None
    if group is None or leaf.value is None or leaf.hidden:
        return None
    if not hasattr(leaf.value, "dtype"):
        raise TypeError(
            f"{leaf.path}: expected an array for a leaf with a radial group, found "
            f"{leaf.value!r} of type {type(leaf.value).__name__}; give this leaf None."
        )
    shape, dtype = leaf.value.shape, leaf.value.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{leaf.path} of shape {shape}: expected a real floating dtype for a leaf with "
            f"a radial group, found {dtype}; give this leaf None"
            + (
                ", or wrap the optimizer in optax.contrib.split_real_and_imaginary."
                if jnp.issubdtype(dtype, jnp.complexfloating)
                else "."
            )
        )
    try:
        group.shape(shape)
    except ValueError as error:
        raise ValueError(f"{leaf.path} of shape {shape}: {error}, in {group}.") from None
    return group if 0 not in shape else None  # a leaf without entries has nothing to turn


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
"""Any of the forms that this module's docstring lists."""


def radial_units(groups: Groups, tree: Any) -> list[dict[int, RadialGroup]]:
    """Resolves `groups` on a tree into the sets of leaves that form groups together.

    Args:
      groups: See this module's docstring.
      tree: Parameters or updates; only paths, shapes and dtypes are read.

    Returns:
      One dictionary per leaf, or per label of joint leaves, from the leaf's number
      (as `_trees.flatten` counts) to its group. Leaves without a group are absent.

    Raises:
      TypeError: If something other than groups is given, or a leaf with a group is
        not of a real floating dtype.
      ValueError: If `groups` does not fit the tree, or `optax.masked` hides part of a joint
        group; the message names the path.
    """
    leaves = _trees.leaves_with_paths(tree)
    if not leaves:  # optax.tree_map_params calls init with a leafless placeholder
        return []
    statistics = {"params", "batch_stats"} <= {key for leaf in leaves for key in leaf.keys[:1]}
    for leaf in leaves:
        _check_parameter(leaf, statistics and leaf.keys[0] == "batch_stats")
    given = _given(groups, tree)
    by = _by_rules if isinstance(given, PathRules) else _by_prefix
    said = by(given, leaves)
    found = [_checked(leaf, group) for leaf, group in zip(leaves, said, strict=True)]
    pairs = _complex.pairs(tree) if any(leaf.keys[-1:] == ("real",) for leaf in leaves) else set()
    for n, (leaf, group) in enumerate(zip(leaves, found, strict=True)):
        if group is not None and group.joint is None and leaf.keys[:-1] in pairs:
            label = f"{'/'.join(leaf.keys[:-1])} (complex)"
            found[n] = dataclasses.replace(group, joint=label)
    _check_none_hidden(leaves, said, found)
    return _units(
        [(leaf, group) for leaf, group in zip(leaves, found, strict=True) if not leaf.hidden]
    )


def _given(groups: Any, tree: Any) -> Any:
    """Rules, or a tree of groups."""
    for helper in _HELPERS:
        if groups is helper:
            raise TypeError(
                f"groups: expected a group, found a function; call {helper.__name__}(...)."
            )
    if hasattr(groups, "init") and hasattr(groups, "update"):
        raise TypeError(
            "groups: expected groups, found a gradient transformation; compose transformations "
            "with optax.chain, and give each its groups, such as per_filter()."
        )
    # What jax.tree looks into is a tree, be it a module that can be called.
    is_tree = not jax.tree_util.treedef_is_leaf(jax.tree.structure(groups))
    if callable(groups) and (not is_tree or isinstance(groups, jax.tree_util.Partial)):
        groups = groups(tree)
    if groups is None:
        raise ValueError(
            "groups: expected a group for some of the leaves, found None for all of them: the "
            "optimizer would be one without groups. optax.inject_hyperparams takes a function of "
            'groups for a schedule and calls it with a step: name it in static_args=("groups",), '
            "or pass the rules of groups_by_path."
        )
    return groups.groups if isinstance(groups, FoundGroups) else groups


def _check_parameter(leaf: _trees.Leaf, statistic: bool) -> None:
    """Raises for what a whole model holds besides its parameters."""
    value, dtype = leaf.value, getattr(leaf.value, "dtype", None)
    if value is None or leaf.hidden or isinstance(value, numbers.Number):
        return
    if isinstance(value, PathRules | FoundGroups | RadialGroup):
        raise TypeError(
            f"expected a tree of parameters, found {type(value).__name__}; params and groups seem "
            "to have changed places."
        )
    if leaf.is_state:
        found = f"a {leaf.box.__name__}"
    elif statistic:
        found = "a statistic"
    elif dtype is None or isinstance(dtype, str):  # a string for a Keras variable
        found = f"{reprlib.repr(value)} of type {type(value).__name__}"
    elif jnp.issubdtype(dtype, jax.dtypes.prng_key):
        found = f"a random key of dtype {dtype}"
    else:
        return
    raise TypeError(
        f"{leaf.path}: expected an array of parameters, found {found}; pass the parameters "
        "alone: nnx.state(model, nnx.Param), variables['params'] of a Linen model, "
        "eqx.filter(model, eqx.is_inexact_array), or "
        "{v.path: v.value for v in model.trainable_variables} of a Keras model."
    )


def _check_none_hidden(
    leaves: list[_trees.Leaf],
    given: list[RadialGroup | bool | None],
    found: list[RadialGroup | None],
) -> None:
    """Raises a `ValueError` where `optax.masked` hides only some leaves of a joint group."""
    hidden: dict[str | None, list[str]] = {}
    for leaf, group in zip(leaves, given, strict=True):
        if leaf.hidden and isinstance(group, RadialGroup) and group.joint is not None:
            hidden.setdefault(group.joint, []).append(leaf.path)
    for group in found if hidden else ():
        if group is not None and group.joint in hidden:
            visible = [
                leaf.path
                for leaf, other in zip(leaves, found, strict=True)
                if other is not None and other.joint == group.joint
            ]
            raise ValueError(
                f"groups: joint label {group.joint!r}: expected all its leaves or none, found "
                f"{visible}, while optax.masked or optax.partition hides {hidden[group.joint]}: "
                "the rest would be another group. Give all of them to one transformation."
            )


def _units(
    grouped: list[tuple[_trees.Leaf, RadialGroup | None]],
) -> list[dict[int, RadialGroup]]:
    units: dict[Any, dict[int, RadialGroup]] = {}
    for number, (leaf, group) in enumerate(grouped):
        if group is None:
            continue
        unit = units.setdefault(number if group.joint is None else group.joint, {})
        if unit:
            first, first_group = grouped[next(iter(unit))]
            expected = math.prod(first_group.shape(first.value.shape))  # type: ignore[union-attr]
            count = math.prod(group.shape(leaf.value.shape))
            if count != expected:
                raise ValueError(
                    f"{leaf.path} of shape {leaf.value.shape}: joint label {group.joint!r} is "
                    f"shared with {first.path} of shape {first.value.shape}, expected "
                    f"{expected} groups as there, found {count}."
                )
        unit[number] = group
    return list(units.values())


def units_at_init(
    groups: Groups, params: Any, keeps_radius: str | None = None
) -> list[dict[int, RadialGroup]]:
    """As `radial_units`, for `init`: it looks more closely, once.

    Args:
      groups: See this module's docstring.
      params: The parameters.
      keeps_radius: The function that keeps or sets radii, if it does: to it groups of one entry
        are an error.

    Raises:
      ValueError: If there are groups of one entry, and a radius is kept.

    Warns:
      UserWarning: If groups on the last axis look like columns of a convolution's window, or
        have one entry each.
    """
    units = radial_units(groups, params)
    leaves = _trees.visible_leaves(params)
    single = [
        ", ".join(leaves[i].path or "the parameters" for i in unit)
        for unit in units
        if group_size(unit, [leaf.value for leaf in leaves]) < 2
    ]
    if single and keeps_radius is not None:
        raise ValueError(
            f"{keeps_radius}: {single[0]}: expected groups of at least 2 entries, found 1: they "
            "have no direction to turn; name fewer axes in index_axes, or give the leaf no group."
        )
    if single:
        warnings.warn(
            f"{'; '.join(single)}: expected groups of at least 2 entries, found 1: entry by entry "
            "AdamS is Adam, and nothing is projected or transported. Name fewer axes in "
            "index_axes, or give the leaf no group.",
            stacklevel=2,
        )
    _warn_of_windows(units, params)
    return units


def _warn_of_windows(units: list[dict[int, RadialGroup]], params: Any) -> None:
    leaves = _trees.visible_leaves(params)
    suspects = []
    for unit in units:
        for i, group in unit.items():
            shape = leaves[i].value.shape
            channels = _channels_in_front(group, shape)
            if channels is not None:
                suspects.append(
                    f"{leaves[i].path} of shape {shape}: expected groups of output channels, found "
                    f"groups on its last axis, of size {shape[-1]}, where Equinox and PyTorch have "
                    f"the window; there, index_axes={channels}, as in per_filter(axis=0). If the "
                    f"last axis is meant, say {len(shape) - 1} for -1."
                )
    if suspects:
        warnings.warn("\n".join(suspects), UserWarning, stacklevel=3)


def _channels_in_front(group: RadialGroup, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The index axes that the groups of a kernel `(out, in, h, w)` should have had, if it is one.

    A window's sizes are taken to be equal, of at most 11, and fewer than output channels; two
    equal sizes of at most 7 in front are a window themselves, of a kernel `(h, w, in, out)`.
    """
    if -1 not in group.index_axes:
        return None
    *others, _ = group.axes(len(shape))
    own = [axis for axis in range(len(shape)) if axis not in others]
    if len(own) < 4:
        return None
    outputs, inputs, *window = (shape[axis] for axis in own)
    is_window = len(set(window)) == 1 and window[0] <= min(11, outputs - 1)
    return (*others, own[0]) if is_window and not outputs == inputs <= 7 else None


def describe_groups(params: Any, groups: Groups) -> str:
    """A table of the groups: path, shape, number of groups, entries per group, label.

    Args:
      params: The parameters.
      groups: See this module's docstring.

    Returns:
      One line per leaf that is not `None`, two for a complex one. Entries count all leaves of a
      joint group together; a dash stands for a leaf without a group. For what
      `find_radial_groups(..., explain=True)` returns, also the verdict on each leaf and
      the deviations measured.

    Raises:
      TypeError, ValueError: If `groups` does not fit `params`.

    Warns:
      UserWarning: If groups on the last axis look like columns of a convolution's window,
        as in a kernel `(out, in, h, w)`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from spherical_optax import describe_groups
      >>> print(describe_groups({"kernel": jnp.ones((5, 8))}, {"kernel": True}))
      path    shape   groups  entries per group  label
      kernel  (5, 8)  8       5                  -
    """
    params = _complex.split(params)
    units, leaves = radial_units(groups, params), _trees.visible_leaves(params)
    _warn_of_windows(units, params)
    rows = [[leaf.path, str(np.shape(leaf.value)), "-", "-", "-"] for leaf in leaves]
    for unit in units:
        values = {i: leaves[i].value for i in unit}
        for i, group in unit.items():
            count = math.prod(group.shape(values[i].shape))
            rows[i][2:] = [str(count), str(group_size(unit, values)), group.joint or "-"]
    rows = [row for row, leaf in zip(rows, leaves, strict=True) if leaf.value is not None]
    header = ["path", "shape", "groups", "entries per group", "label"]
    if not isinstance(groups, FoundGroups):
        return _table([header, *rows])
    header += ["verdict", "deviations"]
    findings = {finding.path: finding for finding in groups.findings}
    for row in rows:
        finding = findings.get(row[0], Finding(row[0], (), "-"))
        tried = ", ".join(f"{name} {deviation:.0e}" for name, deviation in finding.tried)
        row += [finding.verdict, tried or "-"]
    return (
        f"{_table([header, *rows])}\ninvariant up to {groups.invariant_up_to:.0e}, others from "
        f"{groups.others_from:.0e}; {groups.forward_passes} forward passes"
        + "".join(f"\nvaried, being constant: {each}" for each in groups.varied)
    )


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def group_size(unit: Mapping[int, RadialGroup], leaves: Any) -> int:
    """Entries per group, all leaves of the unit together; leaves by their number."""
    return sum(
        math.prod(leaves[i].shape) // max(1, math.prod(group.shape(leaves[i].shape)))
        for i, group in unit.items()
    )
