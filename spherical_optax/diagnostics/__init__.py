"""Measurements on the sphere during training, recorded in the optimizer's state or computed.

In a chain, `record_sphere` measures each step and `record_gradient` measures the gradient.
`record_effective_learning_rate` wraps an optimizer. `sphere_report` flattens their records for a
logger. `sphere_metrics` compares two snapshots of the parameters, without touching the optimizer.
`effective_learning_rate` predicts how far a step rotates a group.
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
