"""Layout: the inputs of a transformation, leaf by leaf, resolved and checked once per update."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from spherical_optax import _trees
from spherical_optax.groups import Groups, Joint, RadialGroup, group_size, joints_at_init, joints_of
from spherical_optax.sharding import check_whole

OTHER_STATE = (
    ". The state was made with other groups, or for other parameters. Call init again, or pad the "
    "state with zeros where parameters grew"
)

Shape: TypeAlias = tuple[int, ...]
StateShape: TypeAlias = Callable[[Shape, RadialGroup | None], Shape]
"""Maps a parameter's shape and group to the shape of its leaf in the state."""


def per_entry(shape: Shape, group: RadialGroup | None) -> Shape:
    """One value per entry of every leaf."""
    del group
    return shape


def per_entry_in_groups(shape: Shape, group: RadialGroup | None) -> Shape:
    """One value per entry of a leaf with a group, and a single value for any other leaf."""
    return () if group is None else shape


def per_group(shape: Shape, group: RadialGroup | None) -> Shape:
    """One value per group, and a single value for a leaf without a group."""
    return () if group is None else group.shape(shape)


def per_group_or_entry(shape: Shape, group: RadialGroup | None) -> Shape:
    """One value per group, and one per entry of a leaf without a group."""
    return shape if group is None else group.shape(shape)


class Layout(NamedTuple):
    """The inputs of a transformation, as lists in the order of the parameters.

    Attributes:
      tree: The parameters as given to `update`, or `None`.
      like: A tree with the paths of the parameters.
      params: The leaves of `like`.
      joints: The joints: leaves that form groups together.
      rest: The leaves in no joint that can be scaled, that is, not `None`, integers or float0.
      updates: The updates, at least as wide as their parameters; `None` if an update is missing.
      fields: The fields of the state.
      trees: Maps a list of updates, and lists of the first fields, to trees.
      extra_args: The extra arguments of `update`.
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
        """The layout of the parameters alone, after the checks that groups get at `init`."""
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

        `state` has the fields that are trees like the parameters, each with its shape function. If
        there are no params, `like` is a tree in place of them. With `skips_single_entries`, joints
        of one entry per group are left out, because they have no tangent space.

        Raises a `ValueError` if neither `params` nor `like` is given, or if the paths or shapes of
        a tree differ from those of the parameters.
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
        """The joints that have updates; raises if only some leaves of a joint have one."""
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
    """The error of an update without params."""
    return ValueError(
        f"{who} requires the current value of the parameters, but `params` was not passed to "
        "`update`. Call update(updates, state, params)."
    )


def aligned(
    who: str, params: Any, tree: Any, state: list[Shape | None] | None = None
) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves of a tree in the order of the parameters, and a function from leaves to the tree.

    For a tree in the state, `state` has the shapes that its leaves should have. Without `state`,
    the tree holds updates, with the shapes of the parameters. Raises a `ValueError` if paths or
    shapes differ.
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
                f"{who}: expected {what} with the paths of the parameters, found missing paths "
                f"{missing} and unknown paths {extra}{remedy}."
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
    """A floating array in the dtype of a floating `like`; any other value unchanged."""
    if not _floating(value, like) or value.dtype == like.dtype:
        return value
    return value.astype(like.dtype)


def widened(value: Any, like: Any) -> Any:
    """A floating array widened to the dtype of a wider `like`; any other value unchanged."""
    if (
        not _floating(value, like)
        or (dtype := jnp.result_type(value.dtype, like.dtype)) == value.dtype
    ):
        return value
    return value.astype(dtype)


def _floating(*leaves: Any) -> bool:
    return all(jnp.issubdtype(getattr(leaf, "dtype", object), jnp.floating) for leaf in leaves)


def check_type(who: str, state: Any, expected: type) -> None:
    """Raises a `TypeError` if the state is of another transformation."""
    if not isinstance(state, expected):
        raise TypeError(
            f"{who}: expected a state of type {expected.__name__}, found one of type "
            f"{type(state).__name__}, made by another transformation. Call init of this one."
        )
