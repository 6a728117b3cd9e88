"""Optimizers on the sphere for radially invariant weights, as Optax transformations."""

from spherical_optax import geometry
from spherical_optax.detection import check_radial_groups, find_radial_groups
from spherical_optax.groups import (
    Finding,
    FoundGroups,
    Groups,
    RadialGroup,
    describe_groups,
    groups_by_path,
    per_channel_block,
    per_filter,
    per_head,
    per_layer,
)
from spherical_optax.optimizers import adamg, adams, adamsrt, sgdmrt
from spherical_optax.transforms import (
    RetractState,
    ScaleByAdamsState,
    TransportMomentsState,
    project_radial,
    retract,
    scale_by_adams,
    transport_moments,
)

__version__ = "0.1.0"

__all__ = [
    "Finding",
    "FoundGroups",
    "Groups",
    "RadialGroup",
    "RetractState",
    "ScaleByAdamsState",
    "TransportMomentsState",
    "adamg",
    "adams",
    "adamsrt",
    "check_radial_groups",
    "describe_groups",
    "find_radial_groups",
    "geometry",
    "groups_by_path",
    "per_channel_block",
    "per_filter",
    "per_head",
    "per_layer",
    "project_radial",
    "retract",
    "scale_by_adams",
    "sgdmrt",
    "transport_moments",
]
