"""Layout: what a transformation is given, leaf by leaf, resolved and checked once per update."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from spherical_optax import _trees
from spherical_optax.groups import Groups, Joint, RadialGroup, group_size, joints_at_init, joints_of
from spherical_optax.sharding import check_whole

OTHER_STATE = (
    ": it was made with other groups, or for other parameters; call init again, or pad it with "
    "zeros where leaves grew"
)

Shape: TypeAlias = tuple[int, ...]
StateShape: TypeAlias = Callable[[Shape, RadialGroup | None], Shape]
"""The shape of a leaf of the state, from the parameter's shape and group."""


def per_entry(shape: Shape, group: RadialGroup | None) -> Shape:
    """State like the parameters."""
    del group
    return shape


def per_entry_in_groups(shape: Shape, group: RadialGroup | None) -> Shape:
    """State like the parameters with a group, and one value on a leaf without."""
    return () if group is None else shape


def per_group(shape: Shape, group: RadialGroup | None) -> Shape:
    """One value per group, and one on a leaf without a group."""
    return () if group is None else group.shape(shape)


def per_group_or_entry(shape: Shape, group: RadialGroup | None) -> Shape:
    """One value per group, and one per entry of a leaf without a group."""
    return shape if group is None else group.shape(shape)


class Layout(NamedTuple):
    """What a transformation is given, as lists in the order of the parameters.

    Attributes:
      tree: The parameters as they were given, `None` if they were not.
      like: A tree with their paths.
      params: The parameters.
      joints: The leaves that form groups together.
      rest: The leaves in no joint that can be scaled: not `None`, integers or float0.
      updates: The updates, not narrower than their parameters; `None` stands for one that is
        missing.
      fields: The fields of the state.
      trees: From lists of updates, and of the first fields, to trees.
      extra_args: Those of the update.
    """

    tree: Any
    like: Any
    params: list[Any]
    joints: list[Joint]
    rest: list[int]
    updates: list[Any]
    fields: list[list[Any]]
    trees: Callable[..., list[Any]]
    extra_args: Mapping[str, Any] = {}

    @classmethod
    def at_init(
        cls,
        who: str,
        groups: Groups,
        params: Any,
        *,
        skips_single_entries: bool = False,
        keeps_radius: bool = False,
    ) -> "Layout":
        """The layout of the parameters alone, after a closer look at their groups."""
        joints = joints_at_init(groups, params, who if keeps_radius else None)
        return cls._of(who, joints, params, params, skips_single_entries)

    @classmethod
    def read(
        cls,
        who: str,
        groups: Groups,
        params: Any,
        updates: Any,
        *state: tuple[Any, StateShape],
        like: Any = None,
        skips_single_entries: bool = False,
    ) -> "Layout":
        """The layout of an update.

        Fields of the state that are trees like the parameters come with their shapes. A transform
        that does without parameters gives a tree like them. With `skips_single_entries`, leaves of
        one entry per group, which have no tangent space, are in no joint. It raises a `ValueError`
        if there are no params, or a tree has other paths than they, or leaves of other shapes.
        """
        like = params if like is None else like
        if like is None:
            raise no_params(who)
        joints = joints_of(groups, like)
        layout = cls._of(who, joints, like, updates, skips_single_entries)
        group_of = {i: group for joint in layout.joints for i, group in joint.items()}
        fields = []
        for tree, shape_of in state:
            shapes = [
                None if leaf is None else shape_of(np.shape(leaf), group_of.get(i))
                for i, leaf in enumerate(layout.params)
            ]
            fields.append(aligned(who, like, tree, shapes))

        def trees(updates: list[Any], *lists: list[Any]) -> list[Any]:
            if params is not None:
                updates = list(map(as_dtype_of, updates, layout.params))
            backs = [back for _, back in fields[: len(lists)]]
            trees = [back(leaves) for back, leaves in zip(backs, lists, strict=True)]
            return [layout.trees(updates), *trees]

        return layout._replace(tree=params, fields=[leaves for leaves, _ in fields], trees=trees)

    def present(self) -> list[Joint]:
        """The joints whose updates are there; raises if only some leaves of one have them."""
        present = []
        for joint in self.joints:
            missing = [i for i in joint if self.updates[i] is None]
            if missing and len(missing) < len(joint):
                paths = [leaf.path for leaf in _trees.visible_leaves(self.like)]
                raise ValueError(
                    f"joint label {next(iter(joint.values())).joint!r}: expected gradients for all "
                    f"its {len(joint)} leaves or none, found None for "
                    f"{[paths[i] for i in missing]} and gradients for "
                    f"{[paths[i] for i in joint if i not in missing]}."
                )
            if not missing:
                present.append(joint)
        return present

    @classmethod
    def _of(
        cls, who: str, joints: list[Joint], params: Any, updates: Any, skips_single_entries: bool
    ) -> "Layout":
        leaves = _trees.flatten(params)[0]
        if skips_single_entries:
            joints = [joint for joint in joints if group_size(joint, leaves) > 1]
        check_whole(who, params, [i for joint in joints for i in joint])
        given, back = aligned(who, params, updates)
        given = list(map(widened, given, leaves))
        grouped = {i for joint in joints for i in joint}
        rest = [
            i
            for i, leaf in enumerate(given)
            if i not in grouped and leaf is not None and _inexact(leaf)
        ]
        return cls(params, params, leaves, joints, rest, given, [], back)


def _inexact(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def no_params(who: str) -> ValueError:
    """The error of an update that lacks params."""
    return ValueError(
        f"{who} requires the current value of the parameters, but `params` was not passed to "
        "`update`: call update(updates, state, params)."
    )


def aligned(
    who: str, params: Any, tree: Any, state: list[Shape | None] | None = None
) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves of a tree in the order of the parameters, and the way back to such a tree.

    If the tree is part of the state, `state` has the shapes that its leaves should have; updates
    have those of the parameters. It raises a `ValueError` if paths or shapes differ.
    """
    (x, like), (leaves, treedef) = _trees.flatten(params), _trees.flatten(tree)
    what, remedy = ("updates", "") if state is None else ("state", OTHER_STATE)
    order = list(range(len(leaves)))
    if treedef != like:
        keys, found = ([leaf.keys for leaf in _trees.visible_leaves(t)] for t in (params, tree))
        missing, extra = (
            ["/".join(each) for each in some if each not in others]
            for some, others in ((keys, set(found)), (found, set(keys)))
        )
        if missing or extra:
            raise ValueError(
                f"{who}: expected {what} with the paths of the parameters, found none for "
                f"{missing}, and some for {extra}{remedy}."
            )
        if keys != found:
            number = {each: i for i, each in enumerate(found)}
            order = [number[each] for each in keys]
            leaves = [leaves[i] for i in order]
    shapes = [None if leaf is None else np.shape(leaf) for leaf in x]
    for i, (leaf, expected) in enumerate(zip(leaves, state or shapes, strict=True)):
        if leaf is not None and np.shape(leaf) != expected:
            raise ValueError(
                f"{who}: {_trees.visible_leaves(params)[i].path} of shape {shapes[i]}: expected "
                f"{what} of shape {expected}, found {np.shape(leaf)}{remedy}."
            )

    def back(leaves: list[Any]) -> Any:
        placed = dict(zip(order, leaves, strict=True))
        return treedef.unflatten([placed[i] for i in range(len(leaves))])

    return leaves, back


def as_dtype_of(value: Any, like: Any) -> Any:
    """A floating array in the dtype of another one; all else as it is."""
    if not _floating(value, like) or value.dtype == like.dtype:
        return value
    return value.astype(like.dtype)


def widened(value: Any, like: Any) -> Any:
    """The same where it is narrower than the other one."""
    if (
        not _floating(value, like)
        or (dtype := jnp.result_type(value.dtype, like.dtype)) == value.dtype
    ):
        return value
    return value.astype(dtype)


def _floating(*leaves: Any) -> bool:
    return all(jnp.issubdtype(getattr(leaf, "dtype", object), jnp.floating) for leaf in leaves)


def check_type(who: str, state: Any, expected: type) -> None:
    """Raises a `TypeError` where the state is another transformation's."""
    if not isinstance(state, expected):
        raise TypeError(
            f"{who}: expected a state of type {expected.__name__}, found one of type "
            f"{type(state).__name__}: it was made by another transformation; call init of this one."
        )
