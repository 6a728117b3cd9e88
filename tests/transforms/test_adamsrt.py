"""Fused transforms with moments on the unit sphere equal the composition, and are cheap."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compositions import PAIRS
from layouts import CASES, tree_of
from trajectory import run

import spherical_optax as so
from spherical_optax import geometry


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.filterwarnings("ignore:.*entry by entry")
@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_composition(name, case, x64):
    """The fused transform equals the composition, also for gradients with a radial part."""
    shapes, groups = CASES[case]
    params, grads = tree_of(shapes, 0), [tree_of(shapes, seed) for seed in range(1, 6)]
    paths = [
        run(optax.chain(make(groups), optax.scale(-0.1)), params, grads) for make in PAIRS[name]
    ]
    for ours, theirs in zip(*paths, strict=True):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_dtypes_may_differ(name, x64):
    """Mixed dtypes work also for arrays so large that one pass computes all sums."""
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
    """Scaling a group does not change the state: r g is the gradient with respect to direction."""
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
        r"query": so.per_head(axis=-2),
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
    """The sizes of large copies in a compiled program."""
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
    sums = {"adamsrt": 5, "sgdmrt": 4, "adams": 0}[name]  # a sum's parts are 1/16 of a leaf
    assert compiled.memory_analysis().temp_size_in_bytes <= (0.05 + sums / 16) * total


@pytest.mark.parametrize("name", ["adamsrt", "sgdmrt", "adamg", "hyperball"])
def test_what_groups_share_is_computed_once(name):
    """Values per group are not recomputed in the kernels over entries."""
    tx = {
        "adamsrt": so.adamsrt(1e-3, groups=GROUPS),
        "sgdmrt": so.sgdmrt(1e-3, groups=GROUPS),
        "adamg": so.adamg(1e-3, groups=GROUPS, other=optax.adam(1e-3)),
        "hyperball": so.adamh(1e-3, groups=GROUPS, other=optax.adam(1e-3)),
    }[name]
    text = compiled_step(tx)[0].as_text()
    kernels = re.findall(r"= f32\[3,3,64,128\]\S* fusion\(.*calls=%(\S+?)[,\s]", text)
    assert len(kernels) >= 2
    for kernel in kernels:
        body = text[text.index(f"%{kernel} (") :].split("\n}")[0]
        assert re.findall(r"= f32\[(?:1,)?128\]\S* (?:add|multiply|divide|select)\(", body) == []


def test_the_composition_copies():
    """The structural test can fail: the composition has the copies that it looks for."""
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
