"""Optimizers, as short chains of the library's transforms.

Arguments that an optax alias has too mean here what they mean there. `groups` is
required: a spherical optimizer without groups is just Adam or momentum SGD.
"""

from spherical_optax.optimizers._adamp import adamp, sgdp
from spherical_optax.optimizers._decoupled import adamsrtw, adamsw
from spherical_optax.optimizers._direction import direction
from spherical_optax.optimizers._fixed_radius import (
    hyperball,
    rotational,
    rotational_adamw,
    rotational_lion,
    rotational_sgdm,
)
from spherical_optax.optimizers._named import adamh, muonh
from spherical_optax.optimizers._spherical import adamg, adamg_star, adams, adamsrt, sgdmrt

__all__ = [
    "adamg",
    "adamg_star",
    "adamh",
    "adamp",
    "adams",
    "adamsrt",
    "adamsrtw",
    "adamsw",
    "direction",
    "hyperball",
    "muonh",
    "rotational",
    "rotational_adamw",
    "rotational_lion",
    "rotational_sgdm",
    "sgdmrt",
    "sgdp",
]
