"""Finds radial groups by experiment, and checks given groups by experiment."""

from spherical_optax.detection._find import check_radial_groups, find_radial_groups

__all__ = ["check_radial_groups", "find_radial_groups"]
