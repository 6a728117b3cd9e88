"""How one parameter array splits into groups."""

import dataclasses
import math
import operator
from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np


@dataclasses.dataclass(frozen=True)
class RadialGroup:
    """How one parameter array splits into radially invariant groups.

    Entries with the same indices on the index axes form one group. Sums over a group run over
    all other axes. Per-group values have the sizes of the index axes as their shape, in array
    order: `(cout,)` for the default on a kernel `(h, w, cin, cout)`.

    Args:
      index_axes: The axes that index the groups. `(-1,)` makes one group per output channel of a
        Flax kernel. `()` makes the whole array one group.
      num_blocks: Splits the last index axis into this many contiguous blocks, one group each, as
        for GroupNorm. It must divide the size of that axis.
      joint: A label. Leaves with the same label form groups together, such as a kernel and its
        bias before LayerNorm. They must have the same number of groups.
      ndim: The number of axes of one kernel; `index_axes` refers to these axes. Axes in front of
        them, as `vmap` or `scan` makes by stacking kernels, also index groups. With `None` the
        array is one kernel.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If an axis is repeated, `num_blocks` or `ndim` is below one, `num_blocks` has no
        axis to split, or `joint` is empty or not printable.

    Examples:
      >>> from spherical_optax import RadialGroup
      >>> RadialGroup(index_axes=(0,)).shape((8, 5))
      (8,)
      >>> RadialGroup(num_blocks=4).shape((3, 3, 16, 32))
      (4,)
      >>> columns = RadialGroup(ndim=2)  # of one kernel (in, out), or of a stack of them
      >>> columns.shape((8, 5)), columns.shape((3, 8, 5))
      ((5,), (3, 5))
    """

    index_axes: tuple[int, ...] = (-1,)
    num_blocks: int | None = None
    joint: str | None = None
    ndim: int | None = None

    def __post_init__(self) -> None:
        axes = self.index_axes
        if isinstance(axes, str) or not isinstance(axes, Iterable):
            raise TypeError(
                f"RadialGroup: expected index_axes as a tuple of ints, found {axes!r}; "
                "write (-1,) for one axis and () for the whole array."
            )
        axes = tuple(_index("index_axes", axis) for axis in axes)
        if len(set(axes)) < len(axes):
            raise ValueError(f"RadialGroup: expected distinct index_axes, found {axes!r}.")
        if self.num_blocks is not None:
            object.__setattr__(self, "num_blocks", _index("num_blocks", self.num_blocks))
            if self.num_blocks < 1:
                raise ValueError(
                    f"RadialGroup: expected num_blocks of at least 1, found {self.num_blocks}."
                )
            if not axes:
                raise ValueError(
                    "RadialGroup: expected an index axis for num_blocks to split, found that "
                    "index_axes is empty. Name the axis, for example index_axes=(-1,)."
                )
        if self.ndim is not None:
            object.__setattr__(self, "ndim", _index("ndim", self.ndim))
            if self.ndim < 1:
                raise ValueError(f"RadialGroup: expected ndim of at least 1, found {self.ndim}.")
        if self.joint is not None and not isinstance(self.joint, str):
            raise TypeError(f"RadialGroup: expected joint as a string, found {self.joint!r}.")
        if self.joint is not None and not (self.joint and self.joint.isprintable()):
            raise ValueError(
                f"RadialGroup: expected joint as printable text, found {self.joint!r}. Write a "
                r'reference to the first parenthesis of a rule as a raw string, r"\1".'
            )
        object.__setattr__(self, "index_axes", axes)

    def axes(self, ndim: int) -> tuple[int, ...]:
        """The index axes of an array of rank `ndim`, non-negative and ascending.

        Raises:
          ValueError: If an axis is out of range or named twice (as 1 and as -1), or if the array
            has fewer axes than a kernel.
        """
        own = ndim if self.ndim is None else self.ndim
        if own > ndim:
            raise ValueError(f"expected an array of at least {own} axes, found {ndim}")
        for axis in self.index_axes:
            if not -own <= axis < own:
                raise ValueError(
                    f"expected index_axes within an array of {own} axes, found {self.index_axes}"
                )
        stacked = ndim - own
        axes = tuple(sorted(stacked + axis % own for axis in self.index_axes))
        if len(set(axes)) < len(axes):
            raise ValueError(
                f"expected distinct index_axes, found {self.index_axes}, which name an axis twice "
                f"in an array of {own} axes"
            )
        return (*range(stacked), *axes)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of per-group values for an array of the given shape.

        Raises:
          ValueError: If the axes do not fit, or `num_blocks` does not divide the last index axis.
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


def per_filter(*, axis: int = -1, joint: str | None = None, ndim: int | None = None) -> RadialGroup:
    """One group per output channel (BatchNorm).

    Args:
      axis: The axis of the output channels: the last axis of a Flax kernel, axis 0 of an Equinox
        or PyTorch kernel `(out, in, ...)`.
      joint: Label shared with the leaves that belong to the same groups.
      ndim: The number of axes of one kernel; axes in front are stacks, as in `RadialGroup`.

    Examples:
      >>> from spherical_optax import per_filter
      >>> per_filter().shape((3, 3, 16, 32))
      (32,)
      >>> per_filter(axis=0).shape((32, 16, 3, 3))
      (32,)
      >>> per_filter(ndim=2).shape((2, 16, 32))
      (2, 32)
    """
    return RadialGroup(index_axes=(axis,), joint=joint, ndim=ndim)


def per_layer(*, joint: str | None = None, ndim: int | None = None) -> RadialGroup:
    """The whole array as one group (LayerNorm, RMSNorm).

    Args:
      joint: Label shared with the leaves that belong to the same group.
      ndim: The number of axes of one kernel; axes in front are stacks, as in `RadialGroup`.

    Examples:
      >>> from spherical_optax import per_layer
      >>> per_layer().shape((16, 32))
      ()
      >>> per_layer(ndim=2).shape((12, 16, 32))
      (12,)
    """
    return RadialGroup(index_axes=(), joint=joint, ndim=ndim)


def per_channel_block(n: int, *, axis: int = -1, joint: str | None = None) -> RadialGroup:
    """`n` contiguous blocks of output channels, one group each (GroupNorm).

    Args:
      n: Number of blocks; must divide the number of output channels.
      axis: The axis of the output channels, as in `per_filter`. It is 0 for an Equinox bias.
      joint: Label shared with the leaves that belong to the same groups.

    Examples:
      >>> from spherical_optax import per_channel_block
      >>> per_channel_block(4).shape((3, 3, 16, 32))
      (4,)
      >>> per_channel_block(4, axis=0).shape((32, 16, 3, 3))
      (4,)
    """
    return RadialGroup(index_axes=(axis,), num_blocks=n, joint=joint)


def per_head(*, axis: int, joint: str | None = None) -> RadialGroup:
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


Joint: TypeAlias = dict[int, RadialGroup]
"""Leaves that form groups together, by the number of the leaf: one, or all with one label."""

Entry: TypeAlias = RadialGroup | bool | None
"""An entry of rules and trees: a group, `True` for `per_filter()`, `False` or `None` for none."""


def is_entry(value: Any) -> bool:
    """Whether this may be an entry of rules and trees."""
    return value is None or isinstance(value, RadialGroup | bool | np.bool_)


def group_size(joint: Joint, leaves: Any) -> int:
    """Entries per group, counted over all leaves of the joint; `leaves` is indexed by number."""
    return sum(
        math.prod(leaves[i].shape) // max(1, math.prod(group.shape(leaves[i].shape)))
        for i, group in joint.items()
    )
