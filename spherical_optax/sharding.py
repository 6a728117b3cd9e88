"""Where state lives on a mesh of devices: with its parameters.

Moments are sharded as their parameters are, and one value per group as the parameter is on
the axes that index the groups. Where the axes of the mesh are explicit, types say so from
`init` on; where they are automatic, `state_sharding` tells it to the compiler.
Inside `jax.shard_map` an array is one device's part, and so would sums be: refused.
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
    """The sharding of x on some of its axes, for an array of these axes.

    With `split_last` the last of them is split into blocks, which are not sharded.
    """
    sharding = jax.typeof(x).sharding
    spec = [sharding.spec[axis] for axis in axes]
    if split_last:
        spec[-1] = None
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def laid_out(values: jax.Array, shape: tuple[int, ...], sharding: Any) -> jax.Array:
    """Reshapes per-group values, and shards the result."""
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
    """The axes of the mesh that `jax.shard_map` has made manual here."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def on_one_device() -> bool:
    """Whether arrays are known to lie on one device, whole."""
    return jax.device_count() == 1 and not manual_axes()


def varying(x: jax.Array) -> frozenset[str]:
    """The manual axes over which an array differs, where `jax.shard_map` keeps track of it."""
    kind = jax.typeof(x)
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma


def check_whole(who: str, params: Any, numbers: Iterable[int]) -> None:
    """Raises if `jax.shard_map` has cut one of some leaves, by number, whose sums are taken.

    It warns where `jax.shard_map` does not keep track of what it has cut.
    """
    axes, numbers = manual_axes(), list(numbers)
    if not axes or not numbers:
        return
    if not all(varying(jax.lax.axis_index(axis)) for axis in axes):
        warnings.warn(
            f"Sums over the groups are per shard on the axes {list(axes)}, inside jax.shard_map "
            "with check_vma=False, or jax.pmap: right for parameters that are replicated, which "
            "JAX does not tell here. For others call update outside of it, under jax.jit.",
            stacklevel=2,
        )
        return
    leaves = _trees.visible_leaves(params)
    for leaf in (leaves[i] for i in numbers):
        if found := varying(leaf.value):
            raise ValueError(
                f"{who}: {leaf.path} of shape {leaf.value.shape}: expected a whole parameter, "
                f"found one that differs over the manual axes {sorted(found)} of jax.shard_map: a "
                "group's sum would be per shard. Call init and update outside of it, under "
                "jax.jit, where arrays keep their global shapes."
            )


def state_sharding(tx: optax.GradientTransformation, params: Any, sharding: Any) -> Any:
    """The sharding of every array in an optimizer's state.

    Moments get that of their parameter, values per group that of the parameter on the axes
    that index the groups, and counters are replicated. It is what `init` says of typed
    parameters, so it holds for chains of Optax's transformations as well.

    Args:
      tx: The optimizer, any gradient transformation.
      params: The parameters, arrays or `jax.ShapeDtypeStruct`.
      sharding: A tree like params of `jax.sharding.NamedSharding`, all on one mesh.

    Returns:
      A tree like `tx.init(params)` of `NamedSharding`: for `jax.device_put`, for the
      `out_shardings` of `jax.jit(tx.init)`, or for the arrays to restore a checkpoint to.

    Raises:
      TypeError: If a sharding is no `NamedSharding`; the message names the parameter.
      ValueError: If the trees' paths differ, there are none, or the shardings are on several
        meshes.

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
            "state_sharding: expected a tree like the parameters, with a sharding for each, found "
            f"none for {[path for path in paths if path not in others]}, and some for "
            f"{[path for path in others if path not in paths]}, of {len(paths)} parameters."
        )
    found = jax.tree.leaves(sharding)
    for path, each in zip(paths, found, strict=True):
        if not isinstance(each, NamedSharding):
            raise TypeError(
                f"state_sharding: {path}: expected a NamedSharding, found {each!r} of type "
                f"{type(each).__name__}."
            )
        if each.mesh != found[0].mesh:
            raise ValueError(
                f"state_sharding: {path}: expected the mesh of {paths[0]}, {found[0].mesh}, found "
                f"{each.mesh}."
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
