"""Parameter trees as flat lists of leaves with readable paths."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax


class Leaf(NamedTuple):
    """A leaf of a parameter tree.

    Attributes:
      keys: The keys on the way to the leaf, as strings.
      value: The array (or whatever stands for it), `None`, or a
        `optax.MaskedNode` where `optax.masked` hides a subtree.
      box: The type of the box that held it; that of `None` if none did.
    """

    keys: tuple[str, ...]
    value: Any
    box: type = type(None)

    @property
    def path(self) -> str:
        """The keys joined by slashes, as in `conv1/kernel`."""
        return "/".join(self.keys)

    @property
    def hidden(self) -> bool:
        """Whether `optax.masked` hides this leaf or subtree."""
        return isinstance(self.value, optax.MaskedNode)

    @property
    def absent(self) -> bool:
        """Whether there is no array: `None`, or hidden."""
        return self.value is None or self.hidden

    @property
    def is_state(self) -> bool:
        """Whether it is an NNX variable for statistics or random numbers, no parameter."""
        return any(base.__name__ in ("BatchStat", "RngState") for base in self.box.__mro__)


def is_box(node: Any) -> bool:
    """Whether a node wraps one array with metadata (NNX variable, Linen box)."""
    marked = hasattr(type(node), "get_metadata") or hasattr(type(node), "unbox")
    return marked and len(flatten(node)[0]) < 2


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Flattens with `None` as a leaf, looking into boxes.

    The leaves align with those of `leaves_with_paths` that are not hidden.
    """
    return jax.tree.flatten(tree, is_leaf=lambda node: node is None)


def flatten_boxes(tree: Any) -> tuple[list[Any], Any]:
    """As `flatten`, with boxes of an array as leaves."""
    return jax.tree.flatten(
        tree, is_leaf=lambda node: node is None or (is_box(node) and bool(flatten(node)[0]))
    )


def key_name(key: Any) -> str:
    """The bare name or number in one key of a JAX key path."""
    return jax.tree_util.keystr((key,), simple=True)


def leaves_with_paths(tree: Any) -> list[Leaf]:
    """All leaves of a tree in order, boxes counted and shown as their arrays."""
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
    """The array in a box; a box that `optax.masked` emptied holds none."""
    held = flatten(box)[0]
    return held[0] if held else optax.MaskedNode()


def visible_leaves(tree: Any) -> list[Leaf]:
    """The leaves that `optax.masked` does not hide, numbered as in `flatten`."""
    return [leaf for leaf in leaves_with_paths(tree) if not leaf.hidden]


def by_prefix(
    entries: Mapping[tuple[str, ...], Any], leaves: list[Leaf], expected: str, remedy: str
) -> Iterator[tuple[Leaf, Any]]:
    """Each leaf with the entry that stands for it: that of the leaf itself, or of a node above.

    A leaf that is absent has `None` where no entry stands for it. It raises if another leaf has
    none, and after the last leaf if an entry has no leaf: errors begin with what is expected of
    the prefix, and end with the remedy.
    """
    used = set()
    for leaf in leaves:
        above = (leaf.keys[:n] for n in range(len(leaf.keys) + 1))
        keys = next((keys for keys in above if keys in entries), None)
        if keys is not None:
            used.add(keys)
        elif leaf.absent:  # the prefix may reach below what is absent here
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
