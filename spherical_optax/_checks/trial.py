"""Tries a transformation on small arrays before it is used."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spherical_optax import _trees
from spherical_optax.groups import Joint, RadialGroup

AFFORDABLE = 1_000_000  # parameters with at most this many entries are tried in their own shapes


class Trial(NamedTuple):
    """One step on small arrays, as trees like the parameters; a leaf that is left out is `None`."""

    params: Any
    gradients: Any
    updates: Any
    state: Any


def trials(
    tx: optax.GradientTransformation, params: Any, joints: list[Joint], steps: int, *, same: bool
) -> Iterator[list[Trial]]:
    """Runs of a few steps on small arrays with the parameters' paths and numbers of axes.

    There are up to three runs. The first has one leaf of each kind: leaves of repeated layers,
    whose paths differ only in digits, are of one kind. The second has all leaves. The third has all
    leaves in their own shapes, if they have at most `AFFORDABLE` entries together. A run that fails
    is skipped. If all runs fail, the error of the last one is raised.

    Only paths, shapes and dtypes of the parameters are read. The gradients are random, and the loss
    is the linear function that has them. With `same`, all steps have the gradients of the first.
    """
    leaves = _trees.visible_leaves(params)
    groups = {i: group for joint in joints for i, group in joint.items()}
    everything = list(range(len(leaves)))
    shapes = [(_one_of_each_kind(leaves, groups), _small), (everything, _small)]
    if sum(np.size(leaf.value) for leaf in leaves if leaf.value is not None) <= AFFORDABLE:
        shapes.append((everything, _as_it_is))
    succeeded = False
    for n, (numbers, shape) in enumerate(shapes):
        arrays = {i: shape(leaves[i], groups.get(i)) for i in numbers}
        try:
            found = _run(tx, params, arrays, steps, same)
        except Exception:
            if n == len(shapes) - 1 and not succeeded:
                raise
            continue
        succeeded = True
        yield found


def _run(
    tx: optax.GradientTransformation, params: Any, small: dict[int, Any], steps: int, same: bool
) -> list[Trial]:
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

    found = []
    # Values are concrete here even if `init` is traced, and do not depend on the current mesh.
    no_mesh = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))
    with jax.ensure_compile_time_eval(), jax.default_device(_cpu()), no_mesh:
        x, g = random(0.01), random(1.0)
        state = jax.jit(tx.init)(x)

        def loss(gradients: Any) -> Any:
            # The loss stays above 0, because some optimizers assume that 0 is its minimum.
            def value_fn(params: Any) -> jax.Array:
                x = {leaf.keys: leaf.value for leaf in _trees.visible_leaves(params)}
                terms = [
                    jnp.vdot(leaf.value, x[leaf.keys]).real
                    for leaf in _trees.visible_leaves(gradients)
                    if leaf.value is not None and x.get(leaf.keys) is not None  # skips masked
                ]
                return jnp.asarray(1e3 + sum(terms))

            return value_fn

        @jax.jit
        def update(g: Any, state: Any, x: Any) -> Any:
            value, value_fn = loss(g)(x), loss(g)
            searched = {"value": value, "grad": g, "value_fn": value_fn}  # for line searches
            others = {"loss": value, "obj_fn": value_fn, "key": jax.random.key(0)}
            gradients = {"grad_fn": lambda *args: g}
            for more in (searched, searched | others | gradients, gradients, {}):
                try:
                    return optax.with_extra_args_support(tx).update(g, state, x, **more)
                except TypeError as error:
                    last = error
            raise last

        for step in range(steps):
            g = g if same or step == 0 else random(1.0)
            updates, state = update(g, state, x)
            found.append(Trial(x, g, updates, state))
    return found


def _one_of_each_kind(leaves: list[_trees.Leaf], groups: dict[int, RadialGroup]) -> list[int]:
    """The numbers of the first leaves of each kind: equal paths without digits, axes and group."""
    kinds: dict[Any, int] = {}
    for i, leaf in enumerate(leaves):
        group = groups.get(i)
        how = group and (group.index_axes, group.num_blocks, group.ndim)
        kinds.setdefault((re.sub(r"\d+", "", leaf.path), np.ndim(leaf.value), how), i)
    return list(kinds.values())


def _small(leaf: _trees.Leaf, group: RadialGroup | None) -> jax.ShapeDtypeStruct | None:
    """The leaf with at most three entries along each axis, and in each block.

    With two entries per group, all tangent vectors would lie on one line.
    """
    whole = _as_it_is(leaf, group)
    if whole is None:
        return None
    shape = [min(3, size) for size in whole.shape]
    if group is not None and group.num_blocks is not None:
        axis = group.axes(len(shape))[-1]
        shape[axis] = min(3 * group.num_blocks, whole.shape[axis])
    return jax.ShapeDtypeStruct(tuple(shape), whole.dtype)


def _as_it_is(leaf: _trees.Leaf, group: RadialGroup | None) -> jax.ShapeDtypeStruct | None:
    del group
    if not jnp.issubdtype(getattr(leaf.value, "dtype", object), jnp.inexact):
        return None
    return jax.ShapeDtypeStruct(tuple(leaf.value.shape), leaf.value.dtype)


def _cpu() -> jax.Device | None:
    """The CPU, where small programs compile fast, or `None` (the default device) without one."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
