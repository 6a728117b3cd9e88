"""Transformations tried on small arrays, before they are used."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spherical_optax import _trees
from spherical_optax.groups import Joint, RadialGroup

AFFORDABLE = 1_000_000  # entries of parameters that are tried in their own shapes


class Trial(NamedTuple):
    """A step on small arrays: trees like the parameters, with `None` where leaves are left out."""

    params: Any
    gradients: Any
    updates: Any
    state: Any


def trials(
    tx: optax.GradientTransformation, params: Any, joints: list[Joint], steps: int, *, same: bool
) -> Iterator[list[Trial]]:
    """Runs of a few steps on small arrays with the parameters' paths and numbers of axes.

    The first run has of paths that differ in digits only, as repeated layers' do, one leaf; the
    second has all leaves, and the third all leaves of the parameters' shapes, if these are small.
    One that fails, as the transformation needs other arguments, is left out; if all do, the last
    one's error is raised. The loss is linear in the parameters, of which only paths, shapes and
    dtypes are read, with the gradients of the step: with `same`, those of the first.
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
    # The values are known where init is traced too, and whatever mesh is there.
    no_mesh = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))
    with jax.ensure_compile_time_eval(), jax.default_device(_cpu()), no_mesh:
        x, g = random(0.01), random(1.0)
        state = jax.jit(tx.init)(x)

        def loss(gradients: Any) -> Any:
            # Above 0, which some take for the least value there is.
            def value_fn(params: Any) -> jax.Array:
                x = {leaf.keys: leaf.value for leaf in _trees.visible_leaves(params)}
                terms = [
                    jnp.vdot(leaf.value, x[leaf.keys]).real
                    for leaf in _trees.visible_leaves(gradients)
                    if leaf.value is not None and x.get(leaf.keys) is not None  # masked, else
                ]
                return jnp.asarray(1e3 + sum(terms))

            return value_fn

        @jax.jit
        def update(g: Any, state: Any, x: Any) -> Any:
            value, value_fn = loss(g)(x), loss(g)
            searched = {"value": value, "grad": g, "value_fn": value_fn}  # as line searches ask
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
    """Of paths that differ in their digits only, as repeated layers' do, the first."""
    kinds: dict[Any, int] = {}
    for i, leaf in enumerate(leaves):
        group = groups.get(i)
        how = group and (group.index_axes, group.num_blocks, group.ndim)
        kinds.setdefault((re.sub(r"\d+", "", leaf.path), np.ndim(leaf.value), how), i)
    return list(kinds.values())


def _small(leaf: _trees.Leaf, group: RadialGroup | None) -> jax.ShapeDtypeStruct | None:
    """The leaf with three entries along each axis, and in each block: two have one direction."""
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
    """Where small programs compile quickly; `None`, the default device, if there is none."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
