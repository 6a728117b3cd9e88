"""The door to XLA: what is written for its compilers, and where.

`inner_products` and `compute_once` mean the same on every platform; how they are written follows
what the compiler of the platform makes of it. Nothing else in the library asks for a platform.
"""

from spherical_optax._xla._once import compute_once, materialize
from spherical_optax._xla._products import Request, inner_products, sums_together

__all__ = ["Request", "compute_once", "inner_products", "materialize", "sums_together"]
