"""Sums over groups equal those of the geometry on every platform, in few passes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import tree_of

import spherical_optax as so
from spherical_optax import geometry
from spherical_optax._xla import Request, _cpu, _gpu, compute_once, inner_products
from spherical_optax._xla._leaf import Leaf

PAIRS = ((0, 0), (1, 0), (1, 1), (0, 1))
# Shape, group, and whether sums are computed in parts on a CPU and on a GPU.
LARGE = {
    "layer": ((512, 160), so.per_layer(), True, True),
    "blocks": ((768, 96), so.per_channel_block(4), True, True),
    "blocks, rows of a prime number": ((773, 96), so.per_channel_block(4), False, True),
    "few rows": ((3, 40000), so.per_filter(), False, False),
    "short rows": ((1101, 64), so.RadialGroup((0,)), True, False),
    "stacked layers": ((3, 210, 112), so.RadialGroup((0, -1)), True, True),
    "stacked blocks": ((3, 224, 112), so.RadialGroup((0, -1), num_blocks=4), True, True),
    "output channels first": ((64, 128, 3, 3), so.RadialGroup((0,)), True, False),
    "heads": ((512, 4, 64), so.per_head(axis=-2), True, True),
    "two axes apart": ((5, 128, 3, 64), so.RadialGroup((0, 2)), True, True),
    "vector": ((65536,), so.per_layer(), True, False),
}


def leaf_of(shape, group, pairs=PAIRS):
    x, y = (tree_of({"w": shape}, seed)["w"] for seed in (0, 1))
    return Leaf([x, y], pairs, group, "float64")


@pytest.fixture(autouse=True)
def _small_is_large(monkeypatch):
    monkeypatch.setattr(_cpu, "CPU_FEW", 1 << 16)


REST = ("two axes apart", "output channels first", "vector")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case in REST)) for case in LARGE]
)
def test_equal_to_the_geometry(case, x64):
    shape, group, on_cpu, on_gpu = LARGE[case]
    leaf = leaf_of(shape, group)
    assert (_cpu.parts_pay(leaf), _gpu.parts_pay(leaf)) == (on_cpu, on_gpu)
    expected = [geometry.inner(leaf.arrays[i], leaf.arrays[j], group) for i, j in PAIRS]
    vectors = [{0: x} for x in leaf.arrays]
    ways = [lambda: inner_products(Request(vectors, PAIRS, {0: group}))]
    ways += [lambda: _cpu.in_parts(leaf)] * on_cpu + [lambda: _gpu.in_parts(leaf)] * on_gpu
    for way in ways:
        for found, value in zip(jax.jit(way)(), expected, strict=True):
            assert found.shape == group.shape(shape)
            np.testing.assert_allclose(found, value, rtol=1e-11)


def test_small_leaves_and_single_sums_are_left_to_the_compiler(x64):
    for shape, pairs in (((16, 64), PAIRS), ((512, 160), PAIRS[:1])):
        leaf = leaf_of(shape, so.per_filter(), pairs)
        assert not _cpu.parts_pay(leaf)
        assert not _gpu.parts_pay(leaf)


def test_joint_leaves_are_added(x64):
    shapes, joint = {"a": (512, 128), "b": (128,)}, so.RadialGroup((-1,), joint="j")
    x, y = (dict(enumerate(tree_of(shapes, seed).values())) for seed in (0, 1))
    groups = {0: joint, 1: joint}
    found = inner_products(Request([x, y], PAIRS, groups))
    for (i, j), value in zip(PAIRS, found, strict=True):
        np.testing.assert_allclose(value, geometry.inner((x, y)[i], (x, y)[j], groups), rtol=1e-11)


def test_fewer_passes_on_a_cpu():
    """On a CPU, one kernel reads the arrays for all sums."""
    shape = (1024, 96)

    def sums(x, y):
        return inner_products(Request([{0: x}, {0: y}], PAIRS, {0: so.per_filter()}))

    x = jax.ShapeDtypeStruct(shape, "float32")
    text = jax.jit(sums).lower(x, x).compile().as_text()
    entry = text[text.index("ENTRY") :]
    large = re.findall(r"fusion\(([^)]*)\)", entry)
    assert sum("%x" in operands or "%Arg" in operands for operands in large) == 1


def test_each_platform_gets_its_sums():
    x, group = jax.ShapeDtypeStruct((1024, 96), "float32"), so.per_filter()
    request = lambda x: Request([{0: x}, {0: 2 * x}], PAIRS, {0: group})  # noqa: E731
    traced = jax.jit(lambda x: inner_products(request(x))).trace(x)
    text = {
        each: traced.lower(lowering_platforms=(each,)).as_text() for each in ("cpu", "cuda", "tpu")
    }
    assert ["optimization_barrier" in text[each] for each in text] == [False, True, False]
    # On a TPU each product is summed separately, over all rows.
    assert ["1x16x6144xf" in text[each] for each in text] == [True, False, False]


def test_the_gradient_of_sums_in_parts(x64):
    shape, group, *_ = LARGE["blocks"]
    x, y = (tree_of({"w": shape}, seed)["w"] for seed in (0, 1))
    c = jnp.arange(4.0)

    def weighted(x, y):
        pairs = ((0, 0), (0, 1), (1, 1), (1, 0))
        xx, xy, *_ = inner_products(Request([{0: x}, {0: y}], pairs, {0: group}))
        return (c * (xx + xy)).sum()

    found = jax.jit(jax.grad(weighted))(x, y)
    np.testing.assert_allclose(found, geometry.scale(c, 2 * x + y, group), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_computed_once_are_the_same(dtype, x64):
    """Values keep their bits, including signed zeros and infinities; NaN stays NaN."""
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-37, -3.5]
    arrays = [jnp.asarray(special[n:] + special[:n], dtype) for n in range(3)]
    for found in (compute_once(arrays), jax.jit(compute_once)(arrays)):
        for ours, value in zip(found, arrays, strict=True):
            bits = f"uint{8 * ours.dtype.itemsize}"
            finite = ~np.isnan(value)
            np.testing.assert_array_equal(np.isnan(ours), np.isnan(value))
            np.testing.assert_array_equal(
                np.asarray(ours)[finite].view(bits), np.asarray(value)[finite].view(bits)
            )
