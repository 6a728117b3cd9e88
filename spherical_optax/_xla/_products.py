"""Several inner products over the groups of a joint."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from spherical_optax._numerics import accumulator, sum_groups
from spherical_optax._xla import _cpu, _gpu
from spherical_optax._xla._leaf import Leaf, sums_together
from spherical_optax.groups import RadialGroup
from spherical_optax.sharding import laid_out, on_one_device

__all__ = ["Request", "inner_products", "sums_together"]


PLATFORMS: dict[str, Any] = {"cpu": _cpu, "cuda": _gpu}  # by JAX's platform names


class Request(NamedTuple):
    """The inner products to compute over the groups of a joint.

    Attributes:
      vectors: One dictionary from leaf number to array for each vector.
      pairs: The positions of the vectors to multiply.
      joint: A dictionary from leaf number to `RadialGroup`.
    """

    vectors: Sequence[Mapping[int, jax.Array]]
    pairs: Sequence[tuple[int, int]]
    joint: Mapping[int, RadialGroup]


def inner_products(request: Request) -> list[jax.Array]:
    """The inner product of each pair, like `geometry.inner`: one per group, in the widest dtype."""
    vectors, pairs, joint = request
    dtypes = [accumulator(x.dtype) for vector in vectors for x in vector.values()]
    dtype = max(dtypes, key=lambda each: jnp.finfo(each).bits)
    totals: list[jax.Array] = []
    for i, group in joint.items():
        sums = _of_leaf(Leaf([vector[i] for vector in vectors], tuple(pairs), group, dtype))
        if totals:
            like = jax.typeof(totals[0])
            sums = [laid_out(each, like.shape, like.sharding) for each in sums]
            totals = [total + each for total, each in zip(totals, sums, strict=True)]
        else:
            totals = sums
    return totals


def _of_leaf(leaf: Leaf) -> list[jax.Array]:
    def by(sums: Any) -> Any:
        return lambda *arrays: sums(leaf._replace(arrays=arrays))

    # With several devices, one part of an array may be spread over more than one of them.
    platforms = PLATFORMS.items() if on_one_device() else ()
    branches = {name: by(each.in_parts) for name, each in platforms if each.parts_pay(leaf)}
    if not branches:
        return _plain(leaf)
    return lax.platform_dependent(*leaf.arrays, default=by(_plain), **branches)


def _plain(leaf: Leaf) -> list[jax.Array]:
    """One plain sum for each pair."""
    wide = [x.astype(leaf.dtype) for x in leaf.arrays]
    return [sum_groups(wide[i] * wide[j], leaf.group) for i, j in leaf.pairs]
