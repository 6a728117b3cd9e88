"""Checks of an optimizer's inputs: numbers when it is built, values and groups at `init`."""

from spherical_optax._checks.numbers import (
    check_adam,
    check_learning_rate,
    check_number,
    check_transformation,
    warn_of_angle,
)

__all__ = [
    "check_adam",
    "check_learning_rate",
    "check_number",
    "check_transformation",
    "warn_of_angle",
]
