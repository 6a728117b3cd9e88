"""Optimizers, as short chains of the library's transforms.

Arguments that an Optax alias also has mean the same here. `groups` is required: without groups, a
spherical optimizer is plain Adam or momentum SGD.
"""

from spherical_optax._checks.direction import direction
from spherical_optax.optimizers._adamg import adamg, adamg_star
from spherical_optax.optimizers._adamp import adamp, sgdp
from spherical_optax.optimizers._adams import adams, adamsrt, adamsrtw, adamsw
from spherical_optax.optimizers._hyperball import adamh, hyperball, muonh
from spherical_optax.optimizers._rotational import (
    rotational,
    rotational_adamw,
    rotational_lion,
    rotational_sgdm,
)
from spherical_optax.optimizers._sgdmrt import sgdmrt

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
