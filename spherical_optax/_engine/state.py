"""State per group: created at `init`, in the layout in which leaves keep it."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from spherical_optax import _trees, geometry
from spherical_optax._engine.layout import Layout
from spherical_optax.groups import Joint
from spherical_optax.sharding import laid_out


def pick(joint: Joint, leaves: Any) -> dict[int, jax.Array]:
    """The arrays of a joint's leaves, by leaf number."""
    return {i: leaves[i] for i in joint}


def state_like(params: Any, values: Mapping[int, jax.Array], otherwise: Any) -> Any:
    """A tree like params with the raw arrays in `values`, by leaf number.

    Any other leaf becomes `otherwise(leaf)`, where the leaf is in its box of metadata, if any.
    """
    boxes, treedef = _trees.flatten_boxes(params)
    return treedef.unflatten(
        [
            values[i] if i in values else None if box is None else otherwise(box)
            for i, box in enumerate(boxes)
        ]
    )


def zero(box: Any) -> jax.Array:
    """The placeholder that per-group state holds for a leaf without a group."""
    del box
    return jnp.zeros((), jnp.float32)


def zeros_as(fn: Callable[..., jax.Array], *args: Any) -> jax.Array:
    """Zeros with the shape, dtype and sharding of the result of `fn(*args)`."""
    found = jax.eval_shape(fn, *args)
    return jnp.zeros_like(found, device=found.sharding)


def zeros_per_group(layout: Layout) -> dict[int, jax.Array]:
    """One zero per group, by leaf number, with the type of sums over the leaf's groups."""
    return {
        i: zeros_as(lambda x, group=group: geometry.norm(x, group), layout.params[i])
        for joint in layout.joints
        for i, group in joint.items()
    }


def per_leaf(values: jax.Array, joint: Joint, like: Any) -> dict[int, jax.Array]:
    """The values of a joint's groups in the layout of each leaf, each in a buffer of its own."""
    kept = {
        i: laid_out(values, like[i].shape, jax.typeof(like[i]).sharding).astype(like[i].dtype)
        for i in joint
    }
    return kept if len(kept) == 1 else {i: jnp.array(value) for i, value in kept.items()}
