"""A table of the selected groups."""

import math
from typing import Any

import numpy as np

from spherical_optax import _complex, _trees
from spherical_optax.groups._forms import Finding, FoundGroups, Groups
from spherical_optax.groups._group import group_size
from spherical_optax.groups._resolve import joints_of
from spherical_optax.groups._windows import warn_of_windows


def describe_groups(params: Any, groups: Groups) -> str:
    """A table of the groups: path, shape, number of groups, entries per group, label.

    Args:
      params: The parameters.
      groups: See [`spherical_optax.groups`][].

    Returns:
      One line per leaf that is not `None`; a complex leaf has two. Entries are counted over all
      leaves of a joint group. A dash marks a leaf without a group. For the result of
      `find_radial_groups(..., explain=True)`, the table also has the verdict on each leaf and the
      measured deviations.

    Raises:
      TypeError, ValueError: If `groups` does not fit `params`.

    Warns:
      UserWarning: If groups on the last axis look like columns of a convolution window, as
        in a kernel `(out, in, h, w)`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from spherical_optax import describe_groups
      >>> print(describe_groups({"kernel": jnp.ones((5, 8))}, {"kernel": True}))
      path    shape   groups  entries per group  label
      kernel  (5, 8)  8       5                  -
    """
    params = _complex.split(params)
    joints, leaves = joints_of(groups, params), _trees.visible_leaves(params)
    warn_of_windows(joints, leaves)
    rows = [[leaf.path, str(np.shape(leaf.value)), "-", "-", "-"] for leaf in leaves]
    values = [leaf.value for leaf in leaves]
    for joint in joints:
        size = str(group_size(joint, values))
        for i, group in joint.items():
            rows[i][2:] = [str(math.prod(group.shape(values[i].shape))), size, group.joint or "-"]
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
        + "".join(f"\nvaried, being constant: {name}" for name in groups.varied)
    )


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
