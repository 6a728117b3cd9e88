"""All code that is written for XLA's compilers.

`inner_products` and `compute_once` compute the same on every platform, but they are written in the
form that the platform's compiler handles best. No other part of the library depends on the
platform.
"""

from spherical_optax._xla._once import compute_once, materialize
from spherical_optax._xla._products import Request, inner_products, sums_together

__all__ = ["Request", "compute_once", "inner_products", "materialize", "sums_together"]
