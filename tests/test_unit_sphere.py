"""Moments on the unit sphere: equal to the composition, and cheap by structure."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layouts import CASES, tree_of
from trajectory import run

import spherical_optax as so
from spherical_optax import _sums, geometry

PAIRS = {
    "scale_by_adamsrt": (
        lambda groups: so.scale_by_adamsrt(0.8, 0.9, 1e-3, groups=groups),
        lambda groups: so.transport_moments(
            so.scale_by_adams(0.8, 0.9, 1e-3, groups=groups), groups
        ),
    ),
    "transported_trace": (
        lambda groups: so.transported_trace(0.8, groups=groups),
        lambda groups: so.transport_moments(optax.trace(0.8), groups),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.filterwarnings("ignore:.*entry by entry")
@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_composition(name, case, x64):
    """For gradients with a radial part too, at radii that change."""
    shapes, groups = CASES[case]
    params, grads = tree_of(shapes, 0), [tree_of(shapes, seed) for seed in range(1, 6)]
    paths = [
        run(optax.chain(make(groups), optax.scale(-0.1)), params, grads) for make in PAIRS[name]
    ]
    for ours, theirs in zip(*paths, strict=True):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


# From shape and group to what the loop carries for each sum, `None` where there is none.
LARGE = {
    "layer": ((512, 160), so.per_layer(), (1, 2 * 160)),
    "blocks": ((773, 96), so.per_channel_block(4), (1, 3 * 96)),
    "wide": ((24, 5001), so.per_filter(), None),
    "wide, few rows": ((3, 40000), so.per_filter(), None),
    "short rows": ((1101, 64), so.RadialGroup((0,)), (1101, 1)),
    "stacked layers": ((3, 203, 112), so.RadialGroup((0, -1)), (3, 112)),
    "output channels first": ((64, 115, 3, 3), so.RadialGroup((0,)), (64, 1)),
    "vector": ((70001,), so.per_layer(), (1, 486)),
    "rows of a prime number": ((131, 509), so.per_filter(), (1, 509)),
}


def test_sums_in_one_pass(x64):
    """Of arrays as they are cut on a CPU: by rows and by groups, and with entries left over."""
    rng, pairs = np.random.default_rng(0), ((0, 0), (0, 1), (1, 1))
    vectors = [
        {i: jnp.asarray(rng.normal(size=shape)) for i, (shape, *_) in enumerate(LARGE.values())}
        for _ in range(2)
    ]
    groups = [group for _, group, _ in LARGE.values()]
    for n, (shape, group, carried) in enumerate(LARGE.values()):
        arrays, view = [vector[n] for vector in vectors], _sums._view(shape, group)
        leaf = _sums._Leaf(arrays, pairs, group, "float64", view, False)
        job = _sums._job(leaf)
        assert _sums._is_large(leaf)
        assert (job and [each.shape for each in job.start]) == (carried and [carried] * 3)
        rows = [_sums._most(arrays * times) for times in (1, 2, 3)]
        assert rows == [16, 12, 8]

    def wanted(vectors):
        return [_sums.Wanted(vectors, pairs, {i: group}) for i, group in enumerate(groups)]

    @jax.jit
    def sums(vectors):
        return _sums.inners(wanted(vectors))

    for n, found in enumerate(sums(vectors)):
        for (i, j), value in zip(pairs, found, strict=True):
            expected = geometry.inner(vectors[i][n], vectors[j][n], groups[n])
            np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-10)
    x, y = vectors
    grad = jax.jit(jax.grad(lambda x: sum(map(jnp.sum, jax.tree.leaves(sums([x, y]))))))
    for n, found in grad(x).items():
        np.testing.assert_allclose(found, 2 * x[n] + y[n], rtol=1e-12)

    @jax.jit
    def made_again(vectors):
        x, y = vectors
        times = lambda parts, numbers: parts[0] * numbers[0]  # noqa: E731
        # The value itself is wrong, and shall not be read.
        made = {i: _sums.Remade(0 * y[i], [y[i] / 2], [2.0], times) for i in y}
        return _sums.inners(wanted([x, made]))

    for ours, theirs in zip(made_again(vectors), sums(vectors), strict=True):
        np.testing.assert_allclose(jnp.stack(ours), jnp.stack(theirs), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize(
    ("shape", "group", "rows"),
    [
        ((3, 3, 64, 64), so.per_filter(), 31),
        ((256, 8, 16), so.per_head(-2), 29),
        ((2, 64, 128), so.RadialGroup((0, -1)), 22),
        ((300, 64), so.per_channel_block(4), 30),
        ((30011, 2), so.per_filter(), 31),
    ],
)
@pytest.mark.parametrize("reduced", [False, True])
def test_sums_in_parts(shape, group, rows, reduced, x64):
    """As a GPU adds up, here; where the compiler has one kernel for all sums there is none."""
    rng, pairs = np.random.default_rng(0), ((0, 0), (0, 1), (1, 1))
    x, y = arrays = [jnp.asarray(rng.normal(size=shape)) for _ in range(2)]
    leaf = _sums._Leaf(arrays, pairs, group, "float64", _sums._view(shape, group), reduced)
    assert _sums._rows(leaf) == rows

    def in_parts(x, y):
        return _sums._in_parts(leaf._replace(arrays=[x, y]), rows)

    for (i, j), value in zip(pairs, jax.jit(in_parts)(x, y), strict=True):
        expected = geometry.inner(arrays[i], arrays[j], group)
        np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-10)
    found = jax.grad(lambda x: sum(value.sum() for value in in_parts(x, y)))(x)
    np.testing.assert_allclose(found, 2 * x + y, rtol=1e-12)
    for other in ((27, 128), (128,), (3, 64, 4), (37 * 31, 64)):
        view = _sums._view(other, so.per_filter())
        rows_of = _sums._rows(leaf._replace(view=view, group=so.per_filter()))
        assert rows_of == (31 if other == (37 * 31, 64) else None)


@pytest.mark.parametrize(
    ("shape", "group", "rows"),
    [
        ((1026, 256), so.per_filter(), 38),
        ((1024, 128), so.per_layer(), 32),
        ((4096, 8, 16), so.per_head(-2), 64),
        ((64, 300), so.per_filter(axis=0), 300),
        ((128, 128), so.per_filter(), None),
        ((1009, 1009), so.per_filter(), None),
    ],
)
@pytest.mark.parametrize("reduced", [False, True])
def test_sums_in_blocks(shape, group, rows, reduced, x64):
    """As a GPU adds up what it does not store; where it would, there are no blocks."""
    rng, pairs = np.random.default_rng(0), ((0, 0), (0, 1), (1, 1))
    x, y = arrays = [jnp.asarray(rng.normal(size=shape)) for _ in range(2)]
    made = _sums.for_sums(_sums.Remade(y, [y / 2], [2.0], lambda parts, _: parts[0] * 2), group)
    assert made.stored == (rows is None)
    view = _sums._view(shape, group)
    leaf = _sums._Leaf([x, made], pairs, group, "float64", view, reduced)
    if rows is not None:
        assert _sums._rows(leaf) == rows
        sums = jax.jit(lambda leaf_arrays: _sums._in_parts(leaf._replace(arrays=leaf_arrays), rows))
        for (i, j), value in zip(pairs, sums([x, made]), strict=True):
            expected = geometry.inner(arrays[i], arrays[j], group)
            np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-10)


def test_each_platform_gets_its_sums():
    """A loop on CPU, parts on a GPU, and what the compiler makes of it on TPU."""
    x, group = jax.ShapeDtypeStruct((1024, 96), "float32"), so.per_filter()
    wanted = lambda x: [_sums.Wanted([{0: x}], [(0, 0)] * 2, {0: group})]  # noqa: E731
    traced = jax.jit(lambda x: _sums.inners(wanted(x))).trace(x)
    found = {}
    for platform in ("cpu", "cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        found[platform] = ["stablehlo.while" in text, "optimization_barrier" in text]
    assert found == {"cpu": [True, False], "cuda": [False, True], "tpu": [False, False]}


def test_the_gradient_of_sums_in_one_pass(x64):
    shape, group, _ = LARGE["blocks"]
    x, y = (tree_of({"w": shape}, seed)["w"] for seed in (0, 1))
    c = jnp.arange(4.0)

    def weighted(x, y):
        [[xx, xy]] = _sums.inners([_sums.Wanted([{0: x}, {0: y}], [(0, 0), (0, 1)], {0: group})])
        return (c * (xx + xy)).sum()

    found = jax.jit(jax.grad(weighted))(x, y)
    np.testing.assert_allclose(found, geometry.scale(c, 2 * x + y, group), rtol=1e-12)


def test_parts_where_single_passes_are_slow():
    """XLA's CPU compiler is slow where one sum has very many columns."""

    def compiled(shape, pairs):
        x, group = jax.ShapeDtypeStruct(shape, "float32"), so.per_filter()
        wanted = lambda x: [_sums.Wanted([{0: x}], [(0, 0)] * pairs, {0: group})]  # noqa: E731
        sums = jax.jit(lambda x: _sums.inners(wanted(x)))
        text = sums.lower(x).compile().as_text()
        return " while(" in text, re.search(r"= f32\S+ reduce\(", text) is not None

    # Whether there is a loop, and a sum on its own.
    assert compiled((16, 40000), 1) == (False, False)
    assert compiled((128, 40000), 1) == (True, False)
    assert compiled((1024, 96), 1) == (False, True)
    assert compiled((1024, 96), 2) == (True, False)


@pytest.mark.parametrize("name", PAIRS)
def test_dtypes_may_differ(name, x64):
    """Large enough for the sums in one pass, whose operands are of one dtype."""
    options = {
        "scale_by_adamsrt": {"mu_dtype": "float32"},
        "transported_trace": {"decay": 0.9, "accumulator_dtype": "float32"},
    }
    tx = getattr(so, name)(groups=so.per_filter(), **options[name])
    x, g = tree_of({"w": (1024, 96)}, 0)["w"], tree_of({"w": (1024, 96)}, 1, "bfloat16")["w"]
    state = tx.init(x)
    updates, after = tx.update(g, state, x)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    assert updates.dtype == x.dtype
    exact, _ = tx.update(g.astype("float64"), state, x)
    np.testing.assert_allclose(updates.astype("float64"), exact, rtol=1e-2)


def test_state_holds_the_moments_on_the_unit_sphere(x64):
    """Scaling a group leaves the state as it is: r g is the gradient of its direction."""
    x, g = tree_of({"w": (5, 3)}, 0)["w"], tree_of({"w": (5, 3)}, 1)["w"]
    tx, factors = so.scale_by_adamsrt(groups=so.per_filter()), np.array([0.1, 3.0, 50.0])
    _, state = tx.update(g, tx.init(x), x)
    _, scaled = tx.update(g / factors, tx.init(x), x * factors)
    np.testing.assert_allclose(state.mu, scaled.mu, rtol=1e-12)
    np.testing.assert_allclose(state.nu, scaled.nu, rtol=1e-12)
    np.testing.assert_allclose(geometry.inner(state.mu, x, so.per_filter()), 0, atol=1e-14)


@pytest.mark.parametrize("name", PAIRS)
def test_zero_groups_become_ordinary_once_they_move(name):
    make, _ = PAIRS[name]
    tx, params = make(so.per_filter()), jnp.array([[0.0, 1.0], [0.0, 2.0]])
    g = jnp.array([[3.0, 1.0], [4.0, 0.0]])
    updates, state = tx.update(g, tx.init(params), params)
    cosine = updates[:, 0] @ g[:, 0] / jnp.linalg.norm(updates[:, 0]) / 5
    assert cosine == pytest.approx(1)
    params = params - 0.1 * updates
    updates, state = tx.update(jnp.array([[4.0, 0.0], [-3.0, 1.0]]), state, params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state)))
    assert 0.1 < jnp.linalg.norm(updates[:, 0]) < 10


@pytest.mark.parametrize("make", PAIRS["transported_trace"])
def test_the_derivative_at_a_moment_of_zero_is_the_projection(make, x64):
    tx, (x, m) = make(so.per_filter()), (tree_of({"w": (4, 3)}, seed)["w"] for seed in (0, 1))
    _, state = tx.update(jnp.zeros_like(x), tx.init(x), x)  # so that there is a radius before

    def update(trace):
        return tx.update(jnp.zeros_like(x), optax.tree.set(state, trace=trace), x)[0]

    _, found = jax.jvp(update, (jnp.zeros_like(x),), (m,))
    scale = 1 if hasattr(state, "radius") else 1 / geometry.norm(x, so.per_filter())
    expected = 0.8 * scale * geometry.project(m, x, so.per_filter())
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_moments_of_a_group_turned_by_90_degrees_are_lost():
    tx = so.transported_trace(0.9, groups=so.per_layer())
    x, g = jnp.array([1.0, 0.0, 0.0]), jnp.array([0.0, 0.3, 0.1])
    _, state = tx.update(g, tx.init(x), x)
    updates, _ = tx.update(jnp.zeros(3), state, g)
    np.testing.assert_array_equal(updates, 0)


# --- structure of the compiled step -----------------------------------------------------

SHAPES = {
    "conv": {"kernel": (3, 3, 64, 128)},
    "down": {"kernel": (1, 1, 512, 160)},
    "fc": {"kernel": (512, 256), "bias": (256,)},
    "query": {"kernel": (256, 8, 32)},
    "norm": {"kernel": (64, 96), "scale": (96,)},
    "head": {"kernel": (128, 10)},
}
GROUPS = so.groups_by_path(
    {
        r"(conv|down)/kernel": so.per_filter(),
        r"fc": so.per_layer(joint="fc"),
        r"query": so.per_head(-2),
        r"norm/kernel": so.per_channel_block(4),
    }
)


def compiled_step(tx):
    params = tree_of(SHAPES, 0, "float32")
    state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step.lower(params, state, params).compile(), params


def big_copies(compiled, entries=4096):
    """The copies of arrays of a parameter's size in a compiled program."""
    sizes = []
    for shape in re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", compiled.as_text()):
        sizes.append(math.prod(int(n) for n in shape.split(",") if n))
    return [size for size in sizes if size >= entries]


@pytest.mark.parametrize("name", ["adamsrt", "sgdmrt", "adams"])
def test_compiled_step_is_in_place(name):
    compiled, _ = compiled_step(getattr(so, name)(1e-3, groups=GROUPS))
    assert big_copies(compiled) == []


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2),
    reason="before JAX 0.10.2 XLA allocates more for the same step",
)
@pytest.mark.parametrize("name", ["adamsrt", "sgdmrt", "adams"])
def test_compiled_step_needs_little_memory(name):
    compiled, params = compiled_step(getattr(so, name)(1e-3, groups=GROUPS))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert compiled.memory_analysis().temp_size_in_bytes <= 0.05 * total


@pytest.mark.parametrize("name", ["adamsrt", "sgdmrt", "adamg", "hyperball"])
def test_what_groups_share_is_computed_once(name):
    """Not for each of their entries again: the kernels of entries know of groups what they use."""
    tx = {
        "adamsrt": so.adamsrt(1e-3, groups=GROUPS),
        "sgdmrt": so.sgdmrt(1e-3, groups=GROUPS),
        "adamg": so.adamg(1e-3, groups=GROUPS),
        "hyperball": so.adamh(1e-3, groups=GROUPS, other_learning_rate=1e-3),
    }[name]
    text = compiled_step(tx)[0].as_text()
    kernels = re.findall(r"= f32\[3,3,64,128\]\S* fusion\(.*calls=%(\S+?)[,\s]", text)
    assert len(kernels) >= 2
    for kernel in kernels:
        body = text[text.index(f"%{kernel} (") :].split("\n}")[0]
        assert re.findall(r"= f32\[(?:1,)?128\]\S* (?:add|multiply|divide|select)\(", body) == []


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_values_computed_once_are_the_same(dtype, x64):
    values = jnp.array([1.1, -0.0, 0.0, jnp.inf, -jnp.inf, jnp.nan, 1e-37, -3e38], dtype)
    arrays = [values, -values]
    for found in (_sums.each_once(arrays), jax.jit(_sums.each_once)(arrays)):
        for mine, other in zip(found, arrays, strict=True):
            assert mine.dtype == other.dtype
            mine, other = (np.asarray(each.astype("float64")) for each in (mine, other))
            np.testing.assert_array_equal(mine, other)
            np.testing.assert_array_equal(np.signbit(mine[:5]), np.signbit(other[:5]))


def test_the_composition_copies():
    """The structural test can fail: this is what it guards against."""
    compiled, _ = compiled_step(so.transport_moments(optax.trace(0.9), GROUPS))
    assert big_copies(compiled) != []


def test_one_trace_per_run():
    traces = []
    params = tree_of(SHAPES, 0, "float32")
    tx = so.adamsrt(1e-3, groups=GROUPS)
    state = tx.init(params)

    @jax.jit
    def step(params, state, grads):
        traces.append(None)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state, params)
    assert len(traces) == 1
