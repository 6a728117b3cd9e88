"""What a state holds per group: made at `init`, and laid out as the leaves keep it."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from spherical_optax import _trees, geometry
from spherical_optax._engine.layout import Layout
from spherical_optax.groups import Joint
from spherical_optax.sharding import laid_out


def pick(joint: Joint, leaves: Any) -> dict[int, jax.Array]:
    """The arrays of a joint's leaves."""
    return {i: leaves[i] for i in joint}


def state_like(params: Any, values: Mapping[int, jax.Array], otherwise: Any) -> Any:
    """A tree like params with raw arrays from `values`, by leaf number.

    A leaf that has none gets `otherwise(leaf)`; its box of metadata, if any, is kept.
    """
    boxes, treedef = _trees.flatten_boxes(params)
    return treedef.unflatten(
        [
            values[i] if i in values else None if box is None else otherwise(box)
            for i, box in enumerate(boxes)
        ]
    )


def zero(box: Any) -> jax.Array:
    """What per-group state holds for a leaf without a group."""
    del box
    return jnp.zeros((), jnp.float32)


def zeros_as(fn: Callable[..., jax.Array], *args: Any) -> jax.Array:
    """Zeros of the type, sharding included, of what a function returns."""
    found = jax.eval_shape(fn, *args)
    return jnp.zeros_like(found, device=found.sharding)


def zeros_per_group(layout: Layout) -> dict[int, jax.Array]:
    """One zero per group, by leaf number, typed as the sums over the leaf's groups are."""
    return {
        i: zeros_as(lambda x, group=group: geometry.norm(x, group), layout.params[i])
        for joint in layout.joints
        for i, group in joint.items()
    }


def per_leaf(values: jax.Array, joint: Joint, like: Any) -> dict[int, jax.Array]:
    """The values of a joint's groups as each of its leaves keeps them, in own buffers."""
    kept = {
        i: laid_out(values, like[i].shape, jax.typeof(like[i]).sharding).astype(like[i].dtype)
        for i in joint
    }
    return kept if len(kept) == 1 else {i: jnp.array(value) for i, value in kept.items()}
