"""Which parameters are radially invariant, and how their entries form groups.

A group is a set of entries x whose length does not change the loss: L(a x) = L(x) for all a > 0.
`RadialGroup` describes how one array splits into groups. The `groups` argument of an optimizer
describes a whole tree of parameters. It has one of these forms:

- rules on the parameters' paths, from `groups_by_path`;
- a tree with the parameters' keys. Each entry is a `RadialGroup`, `True` (one group per output
  channel), or `None` or `False` (no group). An entry may stand for a whole subtree:
  `groups=True` gives groups to every leaf, including biases;
- the result of `find_radial_groups`;
- a function of the parameters that returns such a tree. It may read only paths and shapes.

A tree may be a callable module, such as an Equinox module. This library does not call it, but
`optax.inject_hyperparams` calls every callable argument as a schedule, with the step count. If
`groups` is a callable tree or a function, pass `static_args=("groups",)` there, or use rules.

`describe_groups` prints the selected groups.
"""

from spherical_optax.groups._by_rule import by_rule, check_rules, check_used
from spherical_optax.groups._forms import Finding, FoundGroups, Groups
from spherical_optax.groups._group import (
    Joint,
    RadialGroup,
    group_size,
    per_channel_block,
    per_filter,
    per_head,
    per_layer,
)
from spherical_optax.groups._resolve import joints_at_init, joints_of
from spherical_optax.groups._rules import PathRules, first_match, groups_by_path
from spherical_optax.groups._table import describe_groups

__all__ = [
    "Finding",
    "FoundGroups",
    "Groups",
    "RadialGroup",
    "describe_groups",
    "groups_by_path",
    "per_channel_block",
    "per_filter",
    "per_head",
    "per_layer",
]
