"""A warning of groups that look like columns of a convolution's window."""

import warnings

from spherical_optax import _trees
from spherical_optax.groups._group import Joint, RadialGroup


def warn_of_windows(joints: list[Joint], leaves: list[_trees.Leaf]) -> None:
    """Warns the caller's caller of such groups."""
    suspects = []
    for i, group in (item for joint in joints for item in joint.items()):
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
