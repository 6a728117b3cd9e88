"""Optax transformations for radially invariant groups: project, scale, transport, retract.

Each takes `groups` (see `spherical_optax.groups`) and ignores extra arguments. Leaves without a
group keep their updates, unless a docstring names another transformation for them. Per-group state
has one value per group, on every leaf of a joint group. A leaf without a group has a single zero
there, or the state of its other transformation. So every tree in the state has the structure of the
parameters.
"""

from spherical_optax._engine.chain import chain
from spherical_optax.transforms._adamg import ScaleByAdamgState, scale_by_adamg
from spherical_optax.transforms._adamg_star import ScaleByAdamgStarState, scale_by_adamg_star
from spherical_optax.transforms._adams import ScaleByAdamsState, scale_by_adams
from spherical_optax.transforms._adamsrt import (
    ScaleByAdamsrtState,
    TransportedTraceState,
    scale_by_adamsrt,
    transported_trace,
)
from spherical_optax.transforms._center import center_params
from spherical_optax.transforms._forget import forget_radii
from spherical_optax.transforms._initial import AddDecayToInitialState, add_decay_to_initial
from spherical_optax.transforms._learning_rates import scale_by_learning_rates
from spherical_optax.transforms._normalize import (
    NormalizeUpdatesState,
    center_updates,
    normalize_updates,
)
from spherical_optax.transforms._project import project_radial
from spherical_optax.transforms._project_if_tangent import ProjectIfTangentState, project_if_tangent
from spherical_optax.transforms._radius import place_on_sphere
from spherical_optax.transforms._retract import RetractState, retract
from spherical_optax.transforms._split import SplitRadialState, split_radial
from spherical_optax.transforms._transport import TransportMomentsState, transport_moments

__all__ = [
    "AddDecayToInitialState",
    "NormalizeUpdatesState",
    "ProjectIfTangentState",
    "RetractState",
    "ScaleByAdamgStarState",
    "ScaleByAdamgState",
    "ScaleByAdamsState",
    "ScaleByAdamsrtState",
    "SplitRadialState",
    "TransportMomentsState",
    "TransportedTraceState",
    "add_decay_to_initial",
    "center_params",
    "center_updates",
    "chain",
    "forget_radii",
    "normalize_updates",
    "place_on_sphere",
    "project_if_tangent",
    "project_radial",
    "retract",
    "scale_by_adamg",
    "scale_by_adamg_star",
    "scale_by_adams",
    "scale_by_adamsrt",
    "scale_by_learning_rates",
    "split_radial",
    "transport_moments",
    "transported_trace",
]
