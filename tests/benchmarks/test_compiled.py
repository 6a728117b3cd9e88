"""Bytes, kernels and temporary memory of steps that XLA compiles for an H100.

Needs the packages of the extra `accelerators`, which `make test-accelerators` installs.
"""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

sys.path.append(str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import compiled
import measure
import targets
import trees

import spherical_optax as so

PROGRAM = """
%fused (a.1: f32[8], b.1: f32[4]) -> f32[20] {
  %b.1 = f32[4]{0} parameter(1)
  %a.1 = f32[8]{0} parameter(0)
  %twice = f32[8]{0} add(%a.1, %a.1)
  ROOT %joined = f32[20]{0} concatenate(%twice, %a.1, %b.1), dimensions={0}
}

ENTRY %main (a: f32[8], b: f32[4]) -> f32[20] {
  %a = f32[8]{0} parameter(0)
  %b = f32[4]{0} parameter(1)
  %start = (f32[4]{0:S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%a)
  %done = f32[4]{0:S(1)} copy-done(%start)
  %near = f32[4]{0:S(1)} negate(%done)
  ROOT %out = f32[20]{0} fusion(%a, %b), kind=kLoop, calls=%fused
}
"""


def test_bytes_of_a_program():
    """An array that is concatenated twice is read twice; only bytes in the main memory count."""
    moved, kernels, copies = compiled.traffic(PROGRAM)
    assert moved == 4 * (2 * 8 + 4) + 4 * 20 + 4 * 4
    assert (kernels, copies) == (2, 0)


def test_a_target_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(targets.TARGETS, "h100", ("jax_plugins.of_no_kind", None))
    message = "--target h100: expected the package jax_plugins.of_no_kind, found none; run `make "
    with pytest.raises(SystemExit, match=message):
        targets.devices("compiled.py", "h100")


@pytest.fixture(scope="module")
def device():
    try:
        [device] = targets.devices("compiled.py", "h100")
    except SystemExit as missing:
        pytest.skip(str(missing))
    return device


@pytest.fixture(scope="module")
def resnet18(device):
    tree = trees.TREES["resnet18"]()

    def describe(name):
        tx = measure.OPTIMIZERS[name](tree.groups)
        return compiled.describe(tx, tree.shapes, "float32", device)

    return describe


# Upper bounds: bytes per parameter, kernels, and bytes of temporary memory per parameter.
MOST = {
    "optax.adam": (28.1, 64, 0.1),
    "adams": (25, 110, 0.1),
    "adamsrt": (34, 130, 0.2),
    "sgdmrt": (34, 130, 0.2),
    "adamg": (34.5, 132, 0.2),
    "hyperball": (45.5, 149, 1),
    "rotational_adamw": (45.5, 150, 1),
    "adamp": (52, 149, 1),
}


@pytest.mark.parametrize("name", MOST)
def test_bytes_kernels_and_memory_of_a_step(resnet18, name):
    """Bytes, kernels and temporary memory stay below the bounds.

    Reading moment, gradient and parameter twice, and writing moment and parameter once, makes 32
    bytes per parameter.
    """
    found, (moved, kernels, memory) = resnet18(name), MOST[name]
    assert found["bytes per parameter"] <= moved
    assert found["kernels"] <= kernels
    assert found["copies"] == 0
    assert found["temporary bytes per parameter"] <= memory


@pytest.mark.parametrize(("name", "most"), [("adamsrt", 6), ("hyperball", 6), ("adamp", 8)])
def test_kernels_where_a_group_is_a_matrix(device, name, most):
    """One kernel makes all sums in parts, and the kernel that uses them adds up the parts."""
    shapes = {f"layer{n}": (1024, 1024) for n in range(12)}
    tx = measure.OPTIMIZERS[name](so.groups_by_path({".*": so.per_layer()}))
    found = compiled.describe(tx, shapes, "float32", device)
    assert found["kernels"] <= most * 12
    assert found["bytes per parameter"] <= MOST[name][0]


SHAPES = {
    "a convolution": ((3, 3, 1024, 512), so.per_filter()),
    "rows": ((50304, 768), so.per_filter(axis=0)),
    "a prime number of rows": ((1009, 512), so.per_filter()),
    "a large prime number of rows": ((50257, 512), so.per_filter()),
    "blocks": ((3, 3, 256, 512), so.per_channel_block(32)),
    "one group": ((1024, 4096), so.per_layer()),
}


@pytest.mark.parametrize("name", ["adamsrt", "adamg", "hyperball"])
@pytest.mark.parametrize("case", SHAPES)
def test_a_step_of_one_leaf(device, name, case):
    """A step has few kernels for any number of rows; only Hyperball stores a direction."""
    shape, group = SHAPES[case]
    tx = measure.OPTIMIZERS[name](so.groups_by_path({".*": group}))
    found = compiled.describe(tx, {"w": shape}, "float32", device)
    assert found["bytes per parameter"] <= (46 if name == "hyperball" else 42)
    assert found["kernels"] <= (10 if name == "hyperball" else 8)
    assert found["temporary bytes per parameter"] <= (5 if name == "hyperball" else 1)


@pytest.mark.parametrize("name", MOST)
def test_temporary_memory_beside_gradients(device, name):
    """A stored direction reuses the memory of its gradient, which the program has computed.

    AdamP needs direction and gradient of a layer at once. A layer is an eighth of this network.
    """
    shapes = {f"layer{i}": (2304, 256) for i in range(8)}
    where = jax.sharding.SingleDeviceSharding(device)

    def place(tree):
        like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
        return jax.tree.map(like, tree)

    def temporary(name):
        tx = measure.OPTIMIZERS[name](so.groups_by_path({".*": so.per_filter()}))

        def step(params, state, left, right):
            updates, state = tx.update(jax.tree.map(jnp.matmul, left, right), state, params)
            return optax.apply_updates(params, updates), state

        params = place(trees.abstract(shapes))
        left, right = (
            place(trees.abstract(dict.fromkeys(shapes, shape))) for shape in ((2304, 8), (8, 256))
        )
        state = place(jax.eval_shape(tx.init, params))
        traced = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, left, right)
        return traced.compile().memory_analysis().temp_size_in_bytes

    of_all = 4 * trees.count(shapes)
    allowed = 0.15 if name == "adamp" else 0.05
    assert temporary(name) <= temporary("optax.adam") + allowed * of_all


def test_a_sharded_step_communicates_the_sums(device, tmp_path):
    """A sharded step communicates only sums. It is compiled in a separate process."""
    del device
    program = pathlib.Path(__file__).parents[2] / "benchmarks" / "sharded.py"
    size = ["--layers", "2", "--width", "1024", "--tokens", "256"]
    target = ["--target", "256 h100", "--out", str(tmp_path)]
    subprocess.run([sys.executable, program, *size, *target], check=True, timeout=240)
    results = json.loads((tmp_path / "sharded.json").read_text())["results"]
    assert list(results) == ["256 h100, fsdp", "256 h100, fsdp x tensor"]
    for rows in results.values():
        for row in rows:
            assert row["bytes"] == row["bytes by the formula"]
            # The smallest matrix has 4 MB. A sum may be merged with Adam's small collectives.
            assert row["largest, bytes"] <= 8192
            assert (row["bytes"] > 0) == (row["optimizer"] != "optax.adam")
