"""Optimizers on the sphere for radially invariant weights, as Optax transformations."""

from spherical_optax import detection, diagnostics, geometry, groups, optimizers, transforms
from spherical_optax.checkpoints import state_differences
from spherical_optax.detection import *
from spherical_optax.diagnostics import *
from spherical_optax.groups import *
from spherical_optax.optimizers import *
from spherical_optax.sharding import state_sharding
from spherical_optax.transforms import *

__version__ = "0.1.0"

__all__ = ["geometry", "state_differences", "state_sharding"]
__all__ += detection.__all__
__all__ += diagnostics.__all__
__all__ += groups.__all__
__all__ += optimizers.__all__
__all__ += transforms.__all__
