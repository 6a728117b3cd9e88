"""Sharding of optimizer state on a mesh of devices: state is sharded like its parameters.

A moment has the sharding of its parameter. Per-group values have the sharding of the parameter on
the axes that index the groups. If the axes of the mesh are explicit, the arrays have these
shardings in their types from `init` on. If they are automatic, pass the result of `state_sharding`
to the compiler. Inside `jax.shard_map` an array is only one device's shard, and a sum over a group
would be incomplete: sharded parameters raise an error there.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, reshard

from spherical_optax import _trees


def _explicit(sharding: Any) -> bool:
    return AxisType.Explicit in sharding.mesh.axis_types


def index_sharding(
    x: jax.Array, axes: tuple[int, ...], *, split_last: bool = False
) -> NamedSharding:
    """The sharding of x on some of its axes, for an array that has only these axes.

    With `split_last`, the last of these axes is split into blocks, and the blocks are not sharded.
    """
    sharding = jax.typeof(x).sharding
    spec = [sharding.spec[axis] for axis in axes]
    if split_last:
        spec[-1] = None
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def laid_out(values: jax.Array, shape: tuple[int, ...], sharding: Any) -> jax.Array:
    """Reshapes per-group values and shards the result."""
    now = jax.typeof(values)
    if not (_explicit(sharding) or _explicit(now.sharding)):
        return values.reshape(shape)
    if now.shape != shape:
        spec = PartitionSpec(*(None for _ in now.shape))
        values = reshard(values, NamedSharding(now.sharding.mesh, spec)).reshape(shape)
    mesh = sharding.mesh if _explicit(sharding) else now.sharding.mesh
    spec = PartitionSpec(*sharding.spec, *(None for _ in shape[len(sharding.spec) :]))
    return reshard(values, NamedSharding(mesh, spec))


def manual_axes() -> tuple[str, ...]:
    """The axes of the mesh that are manual here, inside `jax.shard_map`."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def on_one_device() -> bool:
    """Whether all arrays are known to lie whole on one device."""
    return jax.device_count() == 1 and not manual_axes()


def varying(x: jax.Array) -> frozenset[str]:
    """The manual axes over which an array differs, if `jax.shard_map` keeps track of them."""
    kind = jax.typeof(x)
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma


def check_whole(who: str, params: Any, numbers: Iterable[int]) -> None:
    """Raises if `jax.shard_map` has split one of the numbered leaves, over which sums are taken.

    It warns if `jax.shard_map` does not keep track of the arrays that it has split.
    """
    axes, numbers = manual_axes(), list(numbers)
    if not axes or not numbers:
        return
    if not all(varying(jax.lax.axis_index(axis)) for axis in axes):
        warnings.warn(
            f"Sums over the groups are per shard on the axes {list(axes)}, inside jax.shard_map "
            "with check_vma=False, or jax.pmap. This is correct only if the parameters are "
            "replicated, and JAX does not say here whether they are. For sharded parameters, call "
            "update outside of it, under jax.jit.",
            stacklevel=2,
        )
        return
    leaves = _trees.visible_leaves(params)
    for leaf in (leaves[i] for i in numbers):
        if found := varying(leaf.value):
            raise ValueError(
                f"{who}: {leaf.path} of shape {leaf.value.shape}: expected a whole parameter, "
                f"found one that differs over the manual axes {sorted(found)} of jax.shard_map. "
                "The sum over a group would be per shard. Call init and update outside of it, "
                "under jax.jit, where arrays keep their global shapes."
            )


def state_sharding(tx: optax.GradientTransformation, params: Any, sharding: Any) -> Any:
    """The sharding of every array in an optimizer's state.

    A moment gets the sharding of its parameter. Per-group values get the sharding of the parameter
    on the axes that index the groups. Counters are replicated. The shardings are those that `init`
    gives for parameters with explicit shardings, so this also works for Optax's transformations.

    Args:
      tx: The optimizer, any gradient transformation.
      params: The parameters, arrays or `jax.ShapeDtypeStruct`.
      sharding: A tree like params, of `jax.sharding.NamedSharding`, all on one mesh.

    Returns:
      A tree like `tx.init(params)`, of `NamedSharding`. Pass it to `jax.device_put`, pass it as
      `out_shardings` to `jax.jit(tx.init)`, or restore a checkpoint to arrays that have it.

    Raises:
      TypeError: If a sharding is not a `NamedSharding`. The message names the parameter.
      ValueError: If the two trees have different paths, if there are no parameters, or if the
        shardings are on several meshes.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import spherical_optax as so
      >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec
      >>> auto = (AxisType.Auto, AxisType.Auto)
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=auto)
      >>> params = {"kernel": jnp.ones((3, 3, 8, 16))}
      >>> sharding = {"kernel": NamedSharding(mesh, PartitionSpec(None, None, "data", "model"))}
      >>> tx = so.scale_by_adamsrt(groups=so.per_filter())
      >>> where = so.state_sharding(tx, params, sharding)
      >>> print(tuple(where.mu["kernel"].spec), tuple(where.nu["kernel"].spec))
      (None, None, 'data', 'model') ('model',)
      >>> state = jax.jit(tx.init, out_shardings=where)(params)
    """
    leaves, treedef = jax.tree.flatten(params)
    paths, others = (
        [leaf.path for leaf in _trees.visible_leaves(tree) if leaf.value is not None]
        for tree in (params, sharding)
    )
    if paths != others or not paths:
        raise ValueError(
            "state_sharding: expected a tree like the parameters, with one sharding for each, "
            f"found no sharding for {[path for path in paths if path not in others]}, and "
            f"shardings for other paths, {[path for path in others if path not in paths]}. There "
            f"are {len(paths)} parameters."
        )
    found = jax.tree.leaves(sharding)
    for path, each in zip(paths, found, strict=True):
        if not isinstance(each, NamedSharding):
            raise TypeError(
                f"state_sharding: {path}: expected a NamedSharding, found {each!r} of type "
                f"{type(each).__name__}. Write NamedSharding(mesh, spec)."
            )
        if each.mesh != found[0].mesh:
            raise ValueError(
                f"state_sharding: {path}: expected the mesh of {paths[0]}, {found[0].mesh}, found "
                f"{each.mesh}. Put all shardings on one mesh."
            )
    mesh = found[0].mesh
    names = mesh.axis_names
    explicit = AbstractMesh(mesh.axis_sizes, names, axis_types=(AxisType.Explicit,) * len(names))
    typed = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(explicit, each.spec))
        for x, each in zip(leaves, found, strict=True)
    ]
    with jax.sharding.use_abstract_mesh(explicit):
        state = jax.eval_shape(tx.init, jax.tree.unflatten(treedef, typed))

    def on_mesh(leaf: Any) -> NamedSharding:
        spec = leaf.sharding.spec if leaf.sharding is not None else PartitionSpec()
        return NamedSharding(mesh, spec)

    return jax.tree.map(on_mesh, state)
