"""A warning of groups that look like columns of a convolution window."""

import warnings

from spherical_optax import _trees
from spherical_optax.groups._group import Joint, RadialGroup


def warn_of_windows(joints: list[Joint], leaves: list[_trees.Leaf]) -> None:
    """Warns of such groups, at the line of the caller's caller."""
    suspects = []
    for i, group in (item for joint in joints for item in joint.items()):
        shape = leaves[i].value.shape
        channels = _channels_in_front(group, shape)
        if channels is not None:
            suspects.append(
                f"{leaves[i].path} of shape {shape}: expected groups of output channels, found "
                f"groups on its last axis, of size {shape[-1]}. In Equinox and PyTorch kernels "
                f"this axis belongs to the window: use index_axes={channels}, as in "
                f"per_filter(axis=0). If you mean the last axis, write {len(shape) - 1} instead "
                "of -1."
            )
    if suspects:
        warnings.warn("\n".join(suspects), UserWarning, stacklevel=3)


def _channels_in_front(group: RadialGroup, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The right index axes if this looks like a kernel `(out, in, h, w)`, `None` otherwise.

    The last axes count as a window if their sizes are equal, at most 11, and smaller than the
    number of output channels. If the first two sizes are equal and at most 7, these two axes are
    the window, of a kernel `(h, w, in, out)`.
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
