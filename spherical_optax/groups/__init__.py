"""Which parameter entries are radially invariant, and how they group.

A group is a set of entries x with L(a x) = L(x) for all a > 0. `RadialGroup` says
how one array splits into groups; a `groups` argument says it for a whole tree, as

- rules on the parameters' paths, from `groups_by_path`;
- a tree with the parameters' keys, of `RadialGroup`, `None` (no group) or `True` (one
  group per output channel) and `False` (no group). An entry may stand for a whole
  subtree: `groups=True` gives a group to every leaf, biases as well;
- what `find_radial_groups` returns;
- a function of the parameters that returns such a tree, reading paths and shapes only.

A tree may be a module with a `__call__`, as one made from an Equinox model is: it is not called.
`optax.inject_hyperparams` does take everything callable for a schedule, and would call such a tree,
or a function, with a step count: name it, `static_args=("groups",)`, or use rules.

`describe_groups` shows what was selected.
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
