"""Steps under JAX's stricter settings, and a very long run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import precision

import spherical_optax as so
from spherical_optax import geometry

GROUPS = so.groups_by_path(
    {
        r"conv/kernel": so.per_filter(),
        r"dense/(kernel|bias)": so.per_layer(joint="dense"),
        r"blocks": so.per_channel_block(2),
    }
)

pytestmark = pytest.mark.filterwarnings("ignore:.*expected groups of length above 0")

SHAPES = {
    "conv": {"kernel": (3, 3, 2, 4)},
    "dense": {"kernel": (4, 5), "bias": (5,)},
    "blocks": {"kernel": (3, 6)},
    "head": {"kernel": (5, 3), "bias": (3,)},
}


def tree_of(seed, dtype="float32"):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


OPTIMIZERS = {
    "adams": lambda: so.adams(0.1, groups=GROUPS, weight_decay=0.01),
    "adamsrt": lambda: so.adamsrt(0.1, groups=GROUPS, weight_decay=0.01),
    "sgdmrt": lambda: so.sgdmrt(0.1, groups=GROUPS, weight_decay=0.01),
    "adamp": lambda: so.adamp(0.1, groups=GROUPS, weight_decay=0.01),
    "hyperball": lambda: so.adamh(0.1, groups=GROUPS, other=optax.adam(0.1)),
}
FLAGS = {
    "enable_x64": lambda: precision("float64"),
    "numpy_rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "debug_nans": lambda: jax.debug_nans(True),
    "check_tracer_leaks": lambda: jax.check_tracer_leaks(True),
}


def two_steps(tx, dtype="float32"):
    params = tree_of(0, dtype)
    params["conv"]["kernel"] = params["conv"]["kernel"].at[..., 0].set(0)
    state = jax.jit(tx.init)(params)
    types = jax.tree.map(jnp.result_type, (params, state))

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for seed in (1, 2):
        params, state = step(params, state, tree_of(seed, dtype))
    assert jax.tree.map(jnp.result_type, (params, state)) == types
    assert all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(params))
    return params


SLOW = pytest.param("check_tracer_leaks", marks=pytest.mark.slow)


@pytest.mark.parametrize("flag", [*(flag for flag in FLAGS if flag not in SLOW.values), SLOW])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_under_a_flag(name, flag):
    expected = two_steps(OPTIMIZERS[name]())
    with FLAGS[flag]():
        found = two_steps(OPTIMIZERS[name]())
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# Strict promotion refuses Optax's Adam, which raises a float to the power of an integer count. So
# optimizers that contain it (AdamP, and Hyperball around Adam) are left out here.
STRICT = {
    "adams": lambda groups: so.adams(0.1, groups=groups, weight_decay=0.01),
    "adamsrt": lambda groups: so.adamsrt(0.1, groups=groups, weight_decay=0.01),
    "sgdmrt": lambda groups: so.sgdmrt(0.1, groups=groups, weight_decay=0.01),
    "adamg": lambda groups: so.adamg(0.1, groups=groups, other=optax.sgd(0.1)),
    "adamg_star": lambda groups: so.adamg_star(0.1, 0.1, groups=groups),
    "sgdp": lambda groups: so.sgdp(0.1, groups=groups, weight_decay=0.01),
    "hyperball(trace)": lambda groups: so.hyperball(
        optax.trace(0.9), 0.1, groups=groups, other=optax.sgd(0.1, 0.9)
    ),
    "rotational_sgdm": lambda groups: so.rotational_sgdm(0.1, weight_decay=0.1, groups=groups),
    "transport_moments(trace)": lambda groups: so.transport_moments(optax.trace(0.9), groups),
    "project_radial": lambda groups: so.project_radial(groups),
    "center_updates": lambda groups: so.center_updates(groups),
    "normalize_updates(decay)": lambda groups: so.normalize_updates(groups, 0.9, 1e-6),
    "retract(geodesic)": lambda groups: so.retract(groups, method="geodesic"),
    "retract(radius)": lambda groups: so.retract(groups, radius=2.0),
    "record_sphere": lambda groups: so.record_sphere(groups),
    "record_gradient": lambda groups: so.record_gradient(groups),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", STRICT)
def test_strict_promotion(name, dtype):
    with jax.numpy_dtype_promotion("strict"):
        two_steps(STRICT[name](GROUPS), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_geometry_under_strict_promotion_and_rank(dtype):
    x, v = (jnp.asarray(np.random.default_rng(seed).normal(size=(3, 4)), dtype) for seed in (0, 1))
    functions = {
        "transport": geometry.transport,
        "project": geometry.project,
        "geodesic": functools.partial(geometry.retract, method="geodesic"),
        "normalize": geometry.retract,
    }
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for function in functions.values():
            assert function(x, v, so.per_filter()).dtype == dtype
        assert geometry.angle(x, v, so.per_channel_block(2)).dtype == "float32"


@pytest.mark.parametrize(
    "make", [lambda: optax.scale_by_adam(), OPTIMIZERS["adamp"], OPTIMIZERS["hyperball"]]
)
def test_optax_refuses_strict_promotion(make):
    """Optax's Adam fails under strict promotion.

    If this test fails, every optimizer passes: remove this test and `STRICT`.
    """
    message = "no available implicit dtype promotion path"
    with (
        jax.numpy_dtype_promotion("strict"),
        pytest.raises(ValueError, match=message),
    ):
        two_steps(make())


# --- a long run -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_hundred_thousand_steps():
    """A long run is traced once, stays finite and tangent, and leaks no buffers."""
    rng = np.random.default_rng(0)
    targets = jnp.asarray(rng.normal(size=(7, 5, 3)), jnp.float32)
    group = so.per_filter()
    tx = so.adamsrt(1e-2, groups=group, weight_decay=1e-2)
    traces = 0

    def loss(params, target):
        cosine = geometry.inner(params, target, group) / geometry.norm(params, group)
        return -jnp.sum(cosine)

    def step(carry, number):
        params, state, worst = carry
        grads = jax.grad(loss)(params, targets[number % 7])
        updates, state = tx.update(grads, state, params)
        mu = optax.tree.get(state, "mu")
        size = geometry.norm(mu, group) * geometry.norm(params, group)
        radial = jnp.abs(geometry.inner(mu, params, group)) / jnp.where(size > 0, size, 1)
        return (optax.apply_updates(params, updates), state, jnp.maximum(worst, radial.max())), None

    @functools.partial(jax.jit, donate_argnums=0)
    def chunk(carry, start):
        nonlocal traces
        traces += 1
        return jax.lax.scan(step, carry, start + jnp.arange(10_000))[0]

    params = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    carry, live = (params, tx.init(params), jnp.zeros(())), []
    for number in range(10):
        carry = jax.block_until_ready(chunk(carry, 10_000 * number))
        live.append(len(jax.live_arrays()))
    params, state, worst = carry
    assert traces == 1
    assert len(set(live[1:])) == 1, live
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(carry))
    assert worst < 1e-4
    assert np.all(geometry.norm(params, group) < 100)
    assert optax.tree.get(state, "count") == 100_000
