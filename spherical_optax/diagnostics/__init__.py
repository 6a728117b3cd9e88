"""What happens on the sphere during training: recorded in the state, or computed.

`record_sphere` measures each step and `record_gradient` the gradient, as members of a chain;
`record_effective_learning_rate` goes around an optimizer; `sphere_report` flattens what they
recorded for a logger. `sphere_metrics` measures between two snapshots, without touching the
optimizer; `effective_learning_rate` predicts how far a step turns a group.
"""

from spherical_optax.diagnostics._effective import (
    EffectiveStep,
    RecordEffectiveLearningRateState,
    effective_learning_rate,
    record_effective_learning_rate,
)
from spherical_optax.diagnostics._recorders import (
    RecordGradientState,
    RecordSphereState,
    SphereMetrics,
    record_gradient,
    record_sphere,
    sphere_metrics,
)
from spherical_optax.diagnostics._report import sphere_report

__all__ = [
    "EffectiveStep",
    "RecordEffectiveLearningRateState",
    "RecordGradientState",
    "RecordSphereState",
    "SphereMetrics",
    "effective_learning_rate",
    "record_effective_learning_rate",
    "record_gradient",
    "record_sphere",
    "sphere_metrics",
    "sphere_report",
]
