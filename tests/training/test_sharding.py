"""Training over eight devices equals training on one, with small collectives and stable types.

The checks run in a second pytest process on this file, which has eight devices.
"""

import functools
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import precision
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import spherical_optax as so

DEVICES = 8
NEW_FLAX = jax.__version_info__ >= (0, 10)
FLAG = f"--xla_force_host_platform_device_count={DEVICES}"
here = pytest.mark.skipif(jax.device_count() != DEVICES, reason="runs in the second session")


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() == DEVICES, reason="is the second session")
def test_in_a_session_with_eight_devices():
    command = [sys.executable, "-m", "pytest", "-q", str(pathlib.Path(__file__))]
    environment = os.environ | {"XLA_FLAGS": FLAG, "PYTEST_ADDOPTS": "-p no:cacheprovider"}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        environment.pop(name, None)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    skipped = 2 if NEW_FLAX else 4
    expected = rf"^\d\d+ passed, {skipped} skipped"
    assert re.search(expected, result.stdout, re.MULTILINE), result.stdout


GROUPS = so.groups_by_path(
    {
        r"conv/kernel": so.per_filter(),
        r"dense/(kernel|bias)": so.per_layer(joint="dense"),
        r"blocks/kernel": so.per_channel_block(4),
        r"query/kernel": so.per_head(axis=-2),
        r"gn/(kernel|bias)": so.per_channel_block(2, joint="gn"),
        r"stacked/kernel": so.RadialGroup((0, -1)),
    }
)
SHAPES = {
    "conv": {"kernel": (3, 3, 8, 16)},
    "dense": {"kernel": (8, 16), "bias": (16,)},
    "blocks": {"kernel": (16, 8)},
    "query": {"kernel": (16, 4, 8)},
    "gn": {"kernel": (8, 8), "bias": (8,)},
    "stacked": {"kernel": (4, 8, 6)},
    "head": {"kernel": (16, 4)},
}


def layout(conv, dense, bias, blocks, query, gn, gn_bias, stacked):
    given = {
        "conv": {"kernel": conv},
        "dense": {"kernel": dense, "bias": bias},
        "blocks": {"kernel": blocks},
        "query": {"kernel": query},
        "gn": {"kernel": gn, "bias": gn_bias},
        "stacked": {"kernel": stacked},
        "head": {"kernel": ()},
    }
    is_spec = lambda node: isinstance(node, tuple)  # noqa: E731
    return jax.tree.map(lambda spec: PartitionSpec(*spec), given, is_leaf=is_spec)


N, D, M = None, "data", "model"
LAYOUTS = {
    "replicated": layout((), (), (), (), (), (), (), ()),
    "index axes": layout((N, N, N, M), (), (M,), (N, M), (N, M), (N, M), (M,), (D, N, M)),
    "summed axes": layout((N, N, D), (D, M), (M,), (D,), (D, N, M), (D,), (), (N, D)),
    "both": layout((N, N, D, M), (D, M), (), (D, M), (D, M), (D, M), (M,), (D, N, M)),
    "all devices": layout(
        (N, N, (D, M)), ((D, M),), (), ((D, M),), ((D, M),), ((D, M),), (), (N, (D, M))
    ),
    "tensor parallel": layout((N, N, N, M), (N, M), (M,), (N, M), (N, M), (M,), (M,), (N, M)),
}
OPTIMIZERS = {
    "adams": lambda: so.adams(0.1, groups=GROUPS),
    "adamsrt": lambda: so.adamsrt(0.1, groups=GROUPS, weight_decay=0.1),
    "composed": lambda: optax.chain(
        so.transport_moments(so.scale_by_adams(groups=GROUPS), GROUPS), optax.scale(-0.1)
    ),
    "sgdmrt": lambda: so.sgdmrt(0.1, groups=GROUPS),
    "adamg": lambda: so.adamg(0.1, groups=GROUPS, other=optax.adam(0.1)),
    "adamg_star": lambda: so.adamg_star(0.1, 0.1, groups=GROUPS),
    "adamp": lambda: so.adamp(0.1, groups=GROUPS, weight_decay=0.1),
    "sgdp": lambda: so.sgdp(0.1, groups=GROUPS),
    "hyperball": lambda: so.adamh(0.1, groups=GROUPS, other=optax.adam(0.1)),
    "rotational": lambda: so.rotational_adamw(0.1, groups=GROUPS),
    "split": lambda: so.split_radial(optax.sgd(0.1, 0.9), optax.adam(0.1), GROUPS),
    "recorded": lambda: optax.chain(
        so.record_gradient(GROUPS), so.project_radial(GROUPS), so.record_sphere(GROUPS)
    ),
}


def mesh_of(axis_type):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


def values(seed, dtype="float32"):
    rng = np.random.default_rng(seed)
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    return jax.tree.map(lambda s: rng.normal(size=s).astype(dtype), SHAPES, is_leaf=is_shape)


def shardings(mesh, name):
    is_spec = lambda node: isinstance(node, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), LAYOUTS[name], is_leaf=is_spec)


def make_step(tx, **options):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, **options)


def run(step, params, state, place, dtype, steps=3):
    for seed in range(1, steps + 1):
        params, state = step(params, state, place(values(seed, dtype)))
    return params, state


@functools.cache
def on_one_device(optimizer, dtype):
    tx = OPTIMIZERS[optimizer]()
    place = lambda tree: jax.device_put(tree, jax.devices()[0])  # noqa: E731
    params = place(values(0, dtype))
    return run(make_step(tx), params, tx.init(params), place, dtype)


def assert_close(found, expected, dtype):
    tolerance = 2e-5 if dtype == "float32" else 1e-12
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = max(1.0, np.abs(np.asarray(b)).max())
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale)


def collectives(text):
    """The bytes of each result of a collective operation in a compiled program."""
    widths = {"f64": 8, "f32": 4, "s32": 4, "bf16": 2, "pred": 1}
    operations = r"(?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
    for results in re.findall(rf"= (\S.*?) {operations}(?:-start)?\(", text):
        for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", results):
            yield widths[kind] * math.prod(int(n) for n in shape.split(",") if n)


# Every optimizer runs in one layout. These two, which sum over groups in different ways, run in
# all layouts.
FIRST = ("adamsrt", "composed")


@here
@pytest.mark.parametrize(
    ("optimizer", "name", "dtype"),
    [
        *((optimizer, name, "float32") for optimizer in FIRST for name in LAYOUTS),
        *((optimizer, "both", "float64") for optimizer in OPTIMIZERS),
    ],
)
def test_automatic_axes(optimizer, name, dtype):
    with precision(dtype):
        tx, sharding = OPTIMIZERS[optimizer](), shardings(mesh_of(AxisType.Auto), name)
        place = lambda tree: jax.device_put(tree, sharding)  # noqa: E731
        params = place(values(0, dtype))
        where = so.state_sharding(tx, params, sharding)
        state = jax.jit(tx.init, out_shardings=where)(params)
        step = make_step(tx, out_shardings=(sharding, where))
        compiled = step.lower(params, state, params).compile()
        # Only sums of groups, several at once, which are far smaller than the kernels.
        assert max(collectives(compiled.as_text()), default=0) <= 5 * 24 * 8
        found = run(compiled, params, state, place, dtype)
        for leaf, expected in zip(jax.tree.leaves(found[1]), jax.tree.leaves(where), strict=True):
            assert leaf.sharding.is_equivalent_to(expected, leaf.ndim)
        assert_close(found, on_one_device(optimizer, dtype), dtype)


@here
@pytest.mark.parametrize(
    ("optimizer", "name"),
    [
        *(("adamsrt", name) for name in LAYOUTS if name != "both"),
        *((optimizer, "both") for optimizer in OPTIMIZERS),
    ],
)
def test_explicit_axes(optimizer, name):
    tx, mesh = OPTIMIZERS[optimizer](), mesh_of(AxisType.Explicit)
    expected = on_one_device(optimizer, "float32")
    with jax.set_mesh(mesh):
        sharding = shardings(mesh, name)
        place = lambda tree: jax.device_put(tree, sharding)  # noqa: E731
        params = place(values(0))
        state = tx.init(params)
        found = run(make_step(tx), params, state, place, "float32")
        for before, after in zip(*map(jax.tree.leaves, ((params, state), found)), strict=True):
            assert jax.typeof(before) == jax.typeof(after)
        assert_close(found, expected, "float32")


@here
def test_state_follows_the_parameters():
    params, mesh = values(0), mesh_of(AxisType.Auto)
    where = so.state_sharding(so.scale_by_adamsrt(groups=GROUPS), params, shardings(mesh, "both"))
    for leaf, found, expected in zip(
        *map(jax.tree.leaves, (params, where.mu, shardings(mesh, "both"))), strict=True
    ):
        assert found.is_equivalent_to(expected, leaf.ndim)
    specs = jax.tree.map(lambda each: tuple(each.spec), where.nu)
    assert specs["conv"]["kernel"] == ("model",)
    assert specs["stacked"]["kernel"] == ("data", "model")
    assert specs["dense"]["kernel"] == specs["dense"]["bias"] == ()
    assert specs["query"]["kernel"] == ("model",)
    assert tuple(where.count.spec) == ()


@here
def test_state_sharding_refuses():
    params, mesh = {"a": jnp.ones((4, 2)), "b": jnp.ones(2)}, mesh_of(AxisType.Auto)
    tx, fine = so.adams(0.1, groups=True), NamedSharding(mesh, PartitionSpec())
    with pytest.raises(TypeError, match="state_sharding: b: expected a NamedSharding, found P"):
        so.state_sharding(tx, params, {"a": fine, "b": PartitionSpec()})
    with pytest.raises(ValueError, match="state_sharding: expected a tree like the parameters"):
        so.state_sharding(tx, params, fine)
    with pytest.raises(
        ValueError, match=r"no sharding for \['b'\], and .* other paths, \[\]\. There"
    ):
        so.state_sharding(tx, params, {"a": fine})
    with pytest.raises(ValueError, match=r"no sharding for \['b'\], and .* other paths, \['c'\]"):
        so.state_sharding(tx, params, {"a": fine, "c": fine})
    with pytest.raises(ValueError, match="There are 0 parameters"):
        so.state_sharding(tx, {}, {})
    other = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    other = NamedSharding(other, PartitionSpec())
    with pytest.raises(ValueError, match="state_sharding: b: expected the mesh of a"):
        so.state_sharding(tx, params, {"a": fine, "b": other})


@here
def test_restored_onto_another_mesh(tmp_path):
    """A state saved in one layout over eight devices is restored in another."""
    tx = OPTIMIZERS["adamsrt"]()
    expected = on_one_device("adamsrt", "float32")
    trees = {}
    for name, shape in (("both", (4, 2)), ("summed axes", (2, 4))):
        mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        sharding = shardings(mesh, name)
        where = so.state_sharding(tx, values(0), sharding)
        trees[name] = (sharding, where)
    saved = jax.device_put(expected, trees["both"])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", saved)
        checkpointer.wait_until_finished()
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            expected,
            trees["summed axes"],
        )
        restored = checkpointer.restore(tmp_path / "step", target)
    for a, b, s in zip(
        *map(jax.tree.leaves, (restored, expected, trees["summed axes"])), strict=True
    ):
        np.testing.assert_array_equal(a, b)
        assert a.sharding.is_equivalent_to(s, a.ndim)


@here
def test_nnx_optimizer_on_kernels_with_sharding_metadata():
    mesh = mesh_of(AxisType.Auto)
    groups = so.groups_by_path({"kernel": so.per_filter()})
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", "model"))
    with jax.set_mesh(mesh):
        model = nnx.Linear(8, 4, kernel_init=init, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, so.adamsrt(0.1, groups=groups), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, x):
            grads = nnx.grad(lambda model: (model(x) ** 2).sum())(model)
            optimizer.update(model, grads)

        before = np.asarray(model.kernel[...])
        step(model, optimizer, jnp.ones((2, 8)))
    assert np.abs(model.kernel[...] - before).max() > 0
    state = nnx.to_pure_dict(optax.tree.get(optimizer.opt_state, "nu"))
    assert state["kernel"].shape == (4,)


@here
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.skipif(not NEW_FLAX, reason="Flax of then refuses explicit axes")
def test_state_sharding_of_an_nnx_state(axis_type):
    """Shardings may be given as Flax's state or as a dictionary with the same keys."""
    mesh = mesh_of(axis_type)
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", "model"))
    with jax.set_mesh(mesh):
        params = nnx.state(nnx.Linear(8, 4, kernel_init=init, rngs=nnx.Rngs(0)), nnx.Param)
        tx = so.scale_by_adamsrt(groups=so.groups_by_path({"kernel": so.per_filter()}))
        given = nnx.get_named_sharding(params, mesh)
        where = so.state_sharding(tx, params, given)
        state = jax.jit(tx.init, out_shardings=where)(params)
        for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
            assert leaf.sharding.is_equivalent_to(expected, leaf.ndim)
        same = so.state_sharding(tx, params, nnx.to_pure_dict(given))
    specs = [tuple(each.spec) for each in jax.tree.leaves((where.mu, where.nu))]
    assert ("data", "model") in specs
    assert tuple(nnx.to_pure_dict(where.nu)["kernel"].spec) == ("model",)
    assert jax.tree.leaves(same) == jax.tree.leaves(where)


# --- inside shard_map -------------------------------------------------------------------

WHOLE = {"kernel": jnp.ones((16, 6)), "head": jnp.ones((16, 2))}
ROWS = so.groups_by_path({"kernel": so.per_filter()})
TRANSFORMS = {
    "scale_by_adams": lambda: so.scale_by_adams(groups=ROWS),
    "scale_by_adamsrt": lambda: so.scale_by_adamsrt(groups=ROWS),
    "transport_moments": lambda: so.transport_moments(optax.trace(0.9), ROWS),
    "project_radial": lambda: so.project_radial(ROWS),
    "center_updates": lambda: so.center_updates(ROWS),
    "retract": lambda: so.retract(ROWS),
    "project_if_tangent": lambda: so.project_if_tangent(optax.identity(), ROWS),
    "record_sphere": lambda: so.record_sphere(ROWS),
}


def in_shards(fn, *specs, **options):
    mesh = mesh_of(AxisType.Auto)
    return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=specs[0], **options)


@here
@pytest.mark.parametrize("name", TRANSFORMS)
def test_parameters_that_shard_map_cuts_are_refused(name):
    """Parameters that shard_map cuts are refused, because a sum would cover one shard only."""
    tx = TRANSFORMS[name]()
    cut = {"kernel": PartitionSpec("data"), "head": PartitionSpec()}
    message = (
        rf"^{name}: kernel of shape \(4, 6\): expected a whole parameter, found one that differs "
        r"over the manual axes \['data'\] of jax.shard_map.* under jax.jit"
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(in_shards(lambda p: tx.update(p, tx.init(p), p)[0], cut), WHOLE)
    if name != "center_updates":
        state = jax.eval_shape(tx.init, WHOLE)
        state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(
                in_shards(lambda p, s: tx.update(p, s, p)[0], cut, PartitionSpec()), WHOLE, state
            )


@here
def test_parameters_that_shard_map_replicates_are_right():
    """Data-parallel training works under shard_map, and a leaf without a group may be cut."""
    tx, whole = so.adamsrt(0.1, groups=ROWS), PartitionSpec()
    params, state = WHOLE, tx.init(WHOLE)
    data = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), "float32")

    def gradient(params, x):
        return jax.grad(lambda p: ((x @ p["kernel"]) ** 2).mean() + (x @ p["head"]).mean())(params)

    def step(params, state, x):
        grads = gradient(params, x)  # summed over the shards, because the parameters are replicated
        return tx.update(jax.tree.map(lambda g: g / DEVICES, grads), state, params)[0]

    shards = PartitionSpec(("data", "model"))
    found = jax.jit(in_shards(step, whole, whole, shards))(params, state, data)
    expected, _ = tx.update(gradient(params, data), state, params)
    assert_close(found, expected, "float32")

    cut = {"kernel": whole, "head": PartitionSpec("data")}
    like = jax.eval_shape(in_shards(lambda p: tx.update(p, tx.init(p), p)[0], cut), WHOLE)
    assert like["head"].shape == (16, 2)


@pytest.mark.skipif(jax.device_count() > 1, reason="there sums take no loop")
def test_a_shard_map_over_one_device_adds_large_arrays_up():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    tx, whole, shards = so.scale_by_adamsrt(groups=True), PartitionSpec(), PartitionSpec("data")

    def step(params, state, grads):
        return tx.update(grads[0], state, params)[0][None]

    specs = {"in_specs": (whole, whole, shards), "out_specs": shards}
    params = jnp.ones((512, 160))
    like = jax.eval_shape(
        jax.shard_map(step, mesh=mesh, **specs), params, tx.init(params), params[None]
    )
    assert like.shape == (1, 512, 160)


@here
def test_a_shard_map_that_keeps_no_track_warns():
    tx, whole = so.project_radial(ROWS), PartitionSpec()
    step = lambda p: tx.update(p, tx.init(p), p)[0]  # noqa: E731
    with pytest.warns(UserWarning, match=r"per shard on the axes \['data', 'model'\]"):
        jax.eval_shape(in_shards(step, whole, check_vma=False), WHOLE)
    jax.eval_shape(in_shards(lambda p: p, whole, check_vma=False), WHOLE)
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        jax.eval_shape(jax.jit(step), WHOLE)
