"""Parameter trees as flat lists of leaves with readable paths."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax


class Leaf(NamedTuple):
    """A leaf of a parameter tree.

    Attributes:
      keys: The keys on the path to the leaf, as strings.
      value: The array (or an abstract array), `None`, or an
        `optax.MaskedNode` where `optax.masked` hides a subtree.
      box: The type of the metadata box that held the value; `NoneType` without a box.
    """

    keys: tuple[str, ...]
    value: Any
    box: type = type(None)

    @property
    def path(self) -> str:
        """The keys joined by slashes, such as `conv1/kernel`."""
        return "/".join(self.keys)

    @property
    def hidden(self) -> bool:
        """Whether `optax.masked` hides this leaf or subtree."""
        return isinstance(self.value, optax.MaskedNode)

    @property
    def absent(self) -> bool:
        """Whether there is no array: the value is `None` or hidden."""
        return self.value is None or self.hidden

    @property
    def is_state(self) -> bool:
        """Whether it is an NNX variable for statistics or random numbers, not a parameter."""
        return any(base.__name__ in ("BatchStat", "RngState") for base in self.box.__mro__)


def is_box(node: Any) -> bool:
    """Whether a node wraps one array with metadata (NNX variable, Linen box)."""
    marked = hasattr(type(node), "get_metadata") or hasattr(type(node), "unbox")
    return marked and len(flatten(node)[0]) < 2


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Flattens a tree with `None` as a leaf, and looks inside boxes.

    The leaves are those of `leaves_with_paths` that are not hidden, in the same order.
    """
    return jax.tree.flatten(tree, is_leaf=lambda node: node is None)


def flatten_boxes(tree: Any) -> tuple[list[Any], Any]:
    """Like `flatten`, but a box that holds an array is a leaf."""
    return jax.tree.flatten(
        tree, is_leaf=lambda node: node is None or (is_box(node) and bool(flatten(node)[0]))
    )


def key_name(key: Any) -> str:
    """The bare name or number in one key of a JAX key path."""
    return jax.tree_util.keystr((key,), simple=True)


def leaves_with_paths(tree: Any) -> list[Leaf]:
    """All leaves of a tree in order. A box counts as one leaf and is shown as its array."""
    found = jax.tree_util.tree_leaves_with_path(
        tree,
        is_leaf=lambda node: node is None or is_box(node) or isinstance(node, optax.MaskedNode),
    )
    return [
        Leaf(tuple(key_name(key) for key in path), _unboxed(value), type(value))
        if is_box(value)
        else Leaf(tuple(key_name(key) for key in path), value)
        for path, value in found
    ]


def _unboxed(box: Any) -> Any:
    """The array in a box, or an `optax.MaskedNode` if `optax.masked` emptied the box."""
    held = flatten(box)[0]
    return held[0] if held else optax.MaskedNode()


def visible_leaves(tree: Any) -> list[Leaf]:
    """The leaves that `optax.masked` does not hide, numbered as in `flatten`."""
    return [leaf for leaf in leaves_with_paths(tree) if not leaf.hidden]


def by_prefix(
    entries: Mapping[tuple[str, ...], Any], leaves: list[Leaf], expected: str, remedy: str
) -> Iterator[tuple[Leaf, Any]]:
    """Each leaf with its entry in a prefix: that of the leaf itself, or of a node above it.

    An absent leaf without an entry gets `None`. Raises a `ValueError` if any other leaf has no
    entry, or if an entry has no leaf. The message begins with `expected`. For a leaf without an
    entry it ends with `remedy`.
    """
    used = set()
    for leaf in leaves:
        above = (leaf.keys[:n] for n in range(len(leaf.keys) + 1))
        keys = next((keys for keys in above if keys in entries), None)
        if keys is not None:
            used.add(keys)
        elif leaf.absent:  # the prefix may reach below an absent leaf
            used |= {keys for keys in entries if keys[: len(leaf.keys)] == leaf.keys}
        else:
            raise ValueError(
                f"{expected}, found nothing for {leaf.path} of shape {np.shape(leaf.value)}; "
                f"{remedy}."
            )
        yield leaf, None if keys is None else entries[keys]
    unknown = ["/".join(keys) for keys in entries if keys not in used]
    if unknown:
        raise ValueError(
            f"{expected}, found {unknown}, which no parameter has. The paths are "
            f"{[leaf.path for leaf in leaves]}."
        )
