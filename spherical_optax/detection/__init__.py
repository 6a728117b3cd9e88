"""Radial groups found by experiment, and masks checked by it."""

from spherical_optax.detection._find import check_radial_groups, find_radial_groups

__all__ = ["check_radial_groups", "find_radial_groups"]
