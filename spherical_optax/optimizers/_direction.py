"""Whether a transformation gives a direction, or a whole step, whose sign is turned already."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spherical_optax import _trees
from spherical_optax.groups import RadialGroup
from spherical_optax.transforms._units import Unit

STEPS = 3  # the first of a warm-up has length 0


def check_direction(
    who: str, inner: optax.GradientTransformation, params: Any, units: list[Unit]
) -> None:
    """Raises a `ValueError` if the updates of a transformation point against the gradients.

    It is run for a few steps on small arrays with the parameters' paths and numbers of axes. One
    that does not run on them, as it needs other arguments or these very shapes, passes.
    """
    leaves = _trees.visible_leaves(params)
    groups = {i: group for unit in units for i, group in unit.items()}
    for numbers in (_one_of_each_kind(leaves, groups), range(len(leaves))):
        try:
            opposed = _opposed(
                inner, params, {i: _small(leaves[i], groups.get(i)) for i in numbers}
            )
        except Exception:
            continue
        if opposed is not None:
            raise ValueError(
                f"{who}: expected inner to give a direction, found that its update of "
                f"{leaves[opposed].path or 'the parameters'} points against the gradient, as that "
                f"of a whole optimizer: groups would climb. Pass the scale_by_* that it is made "
                f"of, optax.scale_by_adam() for optax.adam(...); {who} has the learning rate."
            )
        return


def _one_of_each_kind(leaves: list[_trees.Leaf], groups: dict[int, RadialGroup]) -> list[int]:
    """Of paths that differ in their digits only, as repeated layers' do, the first."""
    kinds: dict[Any, int] = {}
    for i, leaf in enumerate(leaves):
        group = groups.get(i)
        how = group and (group.index_axes, group.num_blocks)
        kinds.setdefault((re.sub(r"\d+", "", leaf.path), np.ndim(leaf.value), how), i)
    return list(kinds.values())


def _small(leaf: _trees.Leaf, group: RadialGroup | None) -> jax.ShapeDtypeStruct | None:
    """The leaf with two entries along each axis, and two in each block."""
    if not jnp.issubdtype(getattr(leaf.value, "dtype", object), jnp.inexact):
        return None
    shape = [min(2, size) for size in leaf.value.shape]
    if group is not None and group.num_blocks is not None:
        axis = group.axes(len(shape))[-1]
        shape[axis] = min(2 * group.num_blocks, leaf.value.shape[axis])
    return jax.ShapeDtypeStruct(tuple(shape), leaf.value.dtype)


def _opposed(inner: optax.GradientTransformation, params: Any, small: dict[int, Any]) -> int | None:
    """The number of a leaf whose updates point against its gradient, if there is one."""
    boxes, treedef = _trees.flatten_boxes(params)
    rng = np.random.default_rng(0)

    def random(scale: float) -> Any:
        return treedef.unflatten(
            [
                jnp.asarray(scale * rng.normal(size=small[i].shape), small[i].dtype)
                if small.get(i) is not None
                else None
                for i in range(len(boxes))
            ]
        )

    cosines = []
    # The values are known where init is traced too.
    with jax.ensure_compile_time_eval(), jax.default_device(_cpu()):
        x, g = random(0.01), random(1.0)
        state = jax.jit(inner.init)(x)
        update = jax.jit(optax.with_extra_args_support(inner).update)
        for _ in range(STEPS):
            updates, state = update(g, state, x)
            pairs = zip(_trees.flatten(updates)[0], _trees.flatten(g)[0], strict=True)
            cosines.append([0.0 if b is None else _cosine(a, b) for a, b in pairs])
    each = np.array(cosines)
    against = (each.min(0) < -0.1) & (each.max(0) <= 0)
    return int(against.argmax()) if against.any() else None


def _cosine(a: Any, b: Any) -> float:
    a, b = (np.asarray(each, np.complex128).ravel() for each in (a, b))
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.vdot(a, b).real) / length if 0 < length < np.inf else 0.0


def _cpu() -> jax.Device | None:
    """Where small programs compile quickly; `None`, the default device, if there is none."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
