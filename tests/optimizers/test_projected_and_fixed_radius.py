"""AdamP, Hyperball and the rotational variants: their formulas and conserved quantities."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from trajectory import run

import spherical_optax as so
from spherical_optax import geometry

FILTER, LAYER = so.per_filter(), so.per_layer()


def normal(seed, shape, dtype=None):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


# --- AdamP ------------------------------------------------------------------------------


def test_a_moment_of_part_of_a_joint_group_is_projected(x64):
    """A momentum that exists for one leaf only of a joint group is projected too."""
    params = {"a": normal(0, (2, 3, 4, 5)), "b": normal(1, (6, 4, 3))}
    groups = {
        "a": so.RadialGroup((0, 1, 2), joint="label"),
        "b": so.RadialGroup((0, 1), joint="label"),
    }
    inner = optax.masked(optax.trace(0.9), {"a": False, "b": True})
    tx = so.project_if_tangent(inner, groups, delta=1e3, first_moments=("trace",))
    grads = {"a": normal(2, (2, 3, 4, 5)), "b": normal(3, (6, 4, 3))}
    _, state = tx.update(grads, tx.init(params), params)
    expected = geometry.project(grads["b"], params["b"], so.RadialGroup((0, 1)))
    np.testing.assert_allclose(optax.tree.get(state, "trace")["b"], expected, rtol=1e-12)


def test_layers_stacked_by_scan_decide_each_for_itself(x64):
    """Of two stacked layers, only the one with tangent gradients is projected, as if apart."""
    layers = [normal(0, (5, 3)), normal(1, (5, 3))]
    grads = [
        [geometry.project(normal(seed, (5, 3)), layers[0], FILTER), layers[1]] for seed in (2, 3)
    ]
    make = lambda group: so.adamp(1e-3, groups=group, weight_decay=0.1)  # noqa: E731
    apart = run(make(FILTER), layers, grads)
    stacked = run(
        make(so.RadialGroup(index_axes=(0, -1))),
        jnp.stack(layers),
        [jnp.stack(pair) for pair in grads],
    )
    for a, b in zip(apart, stacked, strict=True):
        np.testing.assert_allclose(jnp.stack(a), b, rtol=1e-12)


@pytest.mark.parametrize("tangent", [True, False])
def test_projection_and_decay_follow_the_cosine(tangent, x64):
    x, v = normal(0, (30, 4)), normal(1, (30, 4))
    g = geometry.project(v, x, FILTER) if tangent else v + x
    tx = so.project_if_tangent(optax.scale(1.0), FILTER, weight_decay=0.5, wd_ratio=0.2)
    updates, _ = tx.update(g, tx.init(x), x)
    expected = g + (0.1 if tangent else 0.5) * x
    np.testing.assert_allclose(updates, expected, rtol=1e-12)


def test_whole_layer_where_single_filters_are_not_tangent(x64):
    """If only the layer's gradient as a whole is tangent, the layer is projected as a whole."""
    x = jnp.eye(6)[:, :2]
    g = jnp.stack([x[:, 0], -x[:, 1]], axis=1) + 0.01 * normal(0, (6, 2))
    p = normal(1, (6, 2))
    tx = so.project_if_tangent(optax.stateless(lambda updates, params: p), FILTER, delta=0.5)
    updates, _ = tx.update(g, tx.init(x), x)
    np.testing.assert_allclose(updates, geometry.project(p, x, LAYER), rtol=1e-12)


def test_named_moments_are_projected_with_the_update(x64):
    """Named moments are projected, also if the state has them for one joint leaf only."""
    groups = {name: so.per_layer(joint="fc") for name in ("kernel", "bias")}
    x = {"kernel": normal(0, (5, 3)), "bias": normal(1, (3,))}
    g = geometry.project({"kernel": normal(2, (5, 3)), "bias": normal(3, (3,))}, x, groups)
    inner = optax.masked(optax.trace(0.9), {"kernel": True, "bias": False})
    tx = so.project_if_tangent(inner, groups, first_moments=("trace",))
    _, state = tx.update(g, tx.init(x), x)
    kept = optax.tree.get(state, "trace")["kernel"]
    expected = geometry.project(g["kernel"], x["kernel"], LAYER)
    np.testing.assert_allclose(kept, expected, rtol=1e-12)
    assert np.abs(kept - g["kernel"]).max() > 1e-3


def test_leaves_of_a_joint_label_have_equally_many_layers():
    groups = {"kernel": so.RadialGroup((0, 2), joint="a"), "bias": so.RadialGroup(joint="a")}
    params = {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones(8)}
    message = (
        r"adamp: joint label 'a': expected the same number of layers on all its leaves, found "
        r"{'bias': 1, 'kernel': 2}"
    )
    with pytest.raises(ValueError, match=message):
        so.adamp(0.1, groups=groups).init(params)


def test_bad_names_of_moments_to_project():
    with pytest.raises(TypeError, match="project_if_tangent: expected first_moments as a tuple of"):
        so.project_if_tangent(optax.trace(0.9), FILTER, first_moments="trace")
    tx = so.project_if_tangent(optax.trace(0.9), FILTER, first_moments=("mu",))
    message = r"project_if_tangent: expected a field named \['mu'\] .* found \['trace'\]"
    with pytest.raises(ValueError, match=message):
        tx.init({"kernel": jnp.ones((3, 2))})


# --- Hyperball --------------------------------------------------------------------------

INNERS = {
    "adam": optax.scale_by_adam,
    "lion": optax.scale_by_lion,
    "muon": lambda: optax.contrib.scale_by_muon(
        weight_dimension_numbers=optax.contrib.MuonDimensionNumbers()
    ),
}


@pytest.mark.parametrize("name", INNERS)
def test_hyperball_formula(name, x64):
    x, grads = normal(0, (6, 6)), normal(1, (8, 6, 6))
    schedule = optax.linear_schedule(0.1, 0.01, 8)
    path = run(so.hyperball(INNERS[name](), schedule, groups=LAYER), x, grads)
    inner = INNERS[name]()
    state, expected, radius = inner.init(x), x, np.linalg.norm(x)
    for t, g in enumerate(grads):
        w, state = inner.update(g, state, expected)
        moved = expected - schedule(t) * radius * w / np.linalg.norm(w)
        expected = radius * moved / np.linalg.norm(moved)
        np.testing.assert_allclose(path[t + 1], expected, rtol=1e-6, atol=1e-7)


def test_leaves_without_a_group_follow_other():
    params = {"a": normal(0, (4, 3), "float32"), "b": normal(1, (3,), "float32")}
    groups, grads = {"a": FILTER, "b": None}, [params] * 3
    for rate in (0.1, 0.01):
        tx = so.hyperball(optax.scale_by_adam(), 0.1, groups=groups, other=optax.adam(rate))
        plain = run(optax.adam(rate), params["b"], [g["b"] for g in grads])
        for a, b in zip(run(tx, params, grads), plain, strict=True):
            np.testing.assert_allclose(a["b"], b, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 1e-3), ("float32", 1e-6)])
def test_the_radius_does_not_drift(dtype, tolerance):
    tx = so.hyperball(optax.scale_by_adam(), 0.01, groups=LAYER)
    x = normal(0, (512,), dtype)
    state = tx.init(x)

    def body(carry, key):
        params, state = carry
        updates, state = tx.update(jax.random.normal(key, (512,), dtype), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(body, (x, state), jax.random.split(jax.random.key(0), 2000))
    assert geometry.angle(x, params, LAYER) > 0.1
    np.testing.assert_allclose(
        geometry.norm(params, LAYER), geometry.norm(x, LAYER), rtol=tolerance
    )


# --- rotational -------------------------------------------------------------------------


@pytest.mark.parametrize("center", [False, True])
def test_rotational_formula(center, x64):
    """Updates agree with the paper's algorithm in NumPy, one vector per group."""
    x, grads = normal(0, (9, 2)), normal(1, (12, 9, 2))
    x = geometry.center(x, FILTER) if center else x
    tx = so.rotational(optax.trace(0.5), 0.05, groups=FILTER, decay=0.8, eps=1e-8, center=center)
    path = run(tx, x, grads)
    for column in range(2):
        p = np.asarray(x)[:, column]
        radius, m, square = np.linalg.norm(p), 0.0, 0.0
        for t, g in enumerate(np.asarray(grads)[:, :, column], start=1):
            m = 0.5 * m + g
            d = m - m.mean() if center else m
            d = d - p * (d @ p) / radius**2
            square = 0.2 * (d @ d) + 0.8 * square
            p = p - 0.05 * radius * d / (np.sqrt(square / (1 - 0.8**t)) + 1e-8)
            p = p * radius / np.linalg.norm(p)
            np.testing.assert_allclose(path[t][:, column], p, rtol=1e-10)
            if center:
                assert abs(path[t][:, column].mean()) < 1e-12


@pytest.mark.parametrize(
    ("make", "angle"),
    [
        (lambda **k: so.rotational_adamw(0.01, b1=0.8, **k), math.sqrt(2e-3 * 0.2 / 1.8)),
        (lambda **k: so.rotational_sgdm(0.01, momentum=0.8, **k), math.sqrt(2e-3 / 1.8)),
        (
            lambda **k: so.rotational_lion(0.01, b1=0.8, b2=0.9, **k),
            math.sqrt(math.pi / 2) * math.sqrt(2e-3) * math.sqrt(0.04 + 0.64 * 0.1 / 1.9),
        ),
    ],
    ids=["adamw", "sgdm", "lion"],
)
def test_average_angle(make, angle, x64):
    """Groups rotate by the predicted angle on average, and keep their radius."""
    x, grads = normal(0, (200, 3)), normal(1, (100, 200, 3))
    path = run(make(groups=FILTER, weight_decay=0.1), x, grads)
    turned = [geometry.angle(a, b, FILTER) for a, b in itertools.pairwise(path)]
    assert np.mean(turned[50:]) == pytest.approx(angle, rel=0.02)
    np.testing.assert_allclose(
        geometry.norm(path[-1], FILTER), geometry.norm(x, FILTER), rtol=1e-12
    )


def test_rotational_schedule_and_leaves_without_a_group(x64):
    """The angle follows the square root of the schedule; AdamW trains the other leaves."""
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    params = {"a": normal(0, (50, 3)), "b": normal(1, (4,))}
    grads = [{"a": normal(s, (50, 3)), "b": normal(s, (4,))} for s in range(6)]
    tx = so.rotational_adamw(schedule, groups={"a": FILTER, "b": None}, weight_decay=0.1)
    path = run(tx, params, grads)
    adamw = run(optax.adamw(schedule, weight_decay=0.1), params["b"], [g["b"] for g in grads])
    for a, b in zip(path, adamw, strict=True):
        np.testing.assert_allclose(a["b"], b, rtol=1e-12)
    first = geometry.angle(path[0]["a"], path[1]["a"], FILTER)
    # At the first step the running mean is the norm of this update, so the angle is exact.
    np.testing.assert_allclose(jnp.tan(first), math.sqrt(2 * 0.01 * 0.1 / 1.9), rtol=1e-6)


def test_rotational_sgdm_decays_other_leaves_before_the_momentum(x64):
    """Other leaves get coupled decay, because the angle is the equilibrium of coupled decay."""
    x, grads = normal(0, (5,)), normal(1, (30, 5))
    params = {"a": normal(2, (4, 2)), "b": x}
    tx = so.rotational_sgdm(0.1, 0.8, groups={"a": FILTER, "b": None}, weight_decay=0.05)
    path = run(tx, params, [{"a": params["a"], "b": g} for g in grads])
    expected, momentum = np.asarray(x), np.zeros(5)
    for step, g in zip(path[1:], np.asarray(grads), strict=True):
        momentum = 0.8 * momentum + g + 0.05 * expected
        expected = expected - 0.1 * momentum
        np.testing.assert_allclose(step["b"], expected, rtol=1e-12)


ROTATIONAL = {
    "adamw": so.rotational_adamw,
    "sgdm": so.rotational_sgdm,
    "lion": so.rotational_lion,
}


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize("name", ROTATIONAL)
def test_a_schedule_that_ends_at_zero_stays_finite(name, injected):
    """When compiled, this schedule ends at -3e-10, which has no square root."""
    schedule = optax.linear_schedule(0.02, 0.0, 20)
    assert jax.jit(schedule)(20) < 0
    make = optax.inject_hyperparams(ROTATIONAL[name]) if injected else ROTATIONAL[name]
    x = normal(0, (4, 3), "float32")
    *_, before, end = run(make(schedule, groups=FILTER, weight_decay=0.1), x, [x + 1] * 21)
    np.testing.assert_allclose(end, before, rtol=1e-6)


# --- centred weights --------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_center_params_keeps_lengths(offset, dtype):
    """Centering keeps lengths, even if the mean is far longer than the centered weights."""
    groups = {"kernel": FILTER, "fc": so.per_layer(joint="fc"), "bias": None}
    params = {
        "kernel": normal(0, (20, 3)) + offset,
        "fc": {"w": normal(1, (6, 5)) + offset, "b": normal(2, (5,)) + offset},
        "bias": jnp.ones(3),
    }
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    centered = so.center_params(params, groups)
    assert jax.tree.map(jnp.result_type, centered) == jax.tree.map(jnp.result_type, params)
    assert centered["bias"] is params["bias"]
    tolerance = {"bfloat16": 1e-2, "float32": 1e-5, "float64": 1e-13}[dtype]
    for part, group in (("kernel", FILTER), ("fc", groups["fc"])):
        x, y = params[part], centered[part]
        group = jax.tree.map(lambda _, group=group: group, x)
        length = geometry.norm(x, group)
        np.testing.assert_allclose(geometry.norm(y, group), length, rtol=tolerance)
        mean = geometry.inner(y, jax.tree.map(jnp.ones_like, y), group)
        assert np.all(np.abs(mean) < tolerance * length)
        moved = jax.tree.map(geometry.wide, y)
        turned = geometry.angle(
            geometry.center(jax.tree.map(geometry.wide, x), group), moved, group
        )
        assert np.all(turned < 2 * tolerance)
    again = so.center_params(centered, groups)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(centered), strict=True):
        np.testing.assert_allclose(a, b, rtol=4 * tolerance, atol=tolerance)


def test_constant_groups_cannot_be_centred():
    params = {"kernel": normal(0, (4, 3)).at[:, 1].set(0.1), "zero": jnp.zeros((2, 2))}
    message = "center_params: kernel: expected groups that vary, found 1 of 3 constant"
    with pytest.raises(ValueError, match=message):
        so.center_params(params, FILTER)
    traced = jax.jit(lambda params: so.center_params(params, FILTER))(params)
    np.testing.assert_array_equal(traced["kernel"][:, 1], params["kernel"][:, 1])
    np.testing.assert_array_equal(traced["zero"], params["zero"])


def test_center_params_keeps_boxes():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    centered = so.center_params(state, so.groups_by_path({"kernel": FILTER}))
    assert jax.tree.structure(centered) == jax.tree.structure(state)
    np.testing.assert_allclose(centered["kernel"][...].sum(0), 0, atol=1e-6)


def test_rotational_asks_for_centred_weights():
    params = {"kernel": normal(0, (30, 4)), "bias": jnp.ones(4)}
    groups = {"kernel": FILTER, "bias": None}
    for tx in (
        so.rotational(optax.trace(0.9), 0.1, groups=groups, other=optax.sgd(0.1), center=True),
        so.rotational_lion(0.1, groups=groups, center=True),
    ):
        message = r"rotational\w*: kernel: expected groups with mean 0.* 4 of 4 .*center_params"
        with pytest.raises(ValueError, match=message):
            tx.init(params)
        jax.jit(tx.init)(params)
        for dtype in ("bfloat16", "float32"):
            wide = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
            tx.init(so.center_params(wide, groups))


# --- AdamG* -----------------------------------------------------------------------------


def radially_invariant_grads(x):
    """The gradient of a smooth random loss of the direction."""
    matrix, vector = normal(7, (10, 10)), normal(8, (10,))

    def loss(x):
        u = x / jnp.linalg.norm(x)
        return u @ matrix @ u + jnp.sin(u @ vector)

    return jax.grad(loss)(x)


def directions(tx, steps):
    x = normal(9, (10,))

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(radially_invariant_grads(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params / jnp.linalg.norm(params)

    return jax.lax.scan(body, (x, tx.init(x)), length=steps)[1]


def test_adamg_star_traces_the_directions_of_sgd_with_l2(x64):
    """For the same training time, the difference falls as a power of the learning rate."""
    errors = []
    for rate in (0.04, 0.02, 0.01):
        steps = int(8 / rate)
        sgd = optax.chain(optax.add_decayed_weights(0.05), optax.sgd(rate))
        expected = directions(sgd, steps)
        path = directions(so.adamg_star(rate, 0.05, groups=LAYER), steps)
        assert geometry.angle(expected[0], expected[-1], LAYER) > 0.5
        errors.append(float(jnp.linalg.norm(path - expected, axis=1).max()))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert min(orders) > 1.9
    assert errors[-1] < 1e-3


# --- momentum transport around other optimizers -----------------------------------------

AROUND = {
    "adam": (optax.scale_by_adam, {}),
    "lion": (optax.scale_by_lion, {}),
    "yogi": (lambda: optax.scale_by_yogi(eps=0.0, initial_accumulator_value=0.0), {}),
    "nesterov": (lambda: optax.trace(0.9, nesterov=True), {}),
    "adan": (
        lambda: optax.scale_by_adan(eps=1e-30),
        {"first_moments": ("m", "v", "g"), "second_moments": ("n",)},
    ),
}


@pytest.mark.parametrize("name", AROUND)
def test_transported_moments_of_any_optimizer_are_tangent(name, x64):
    make, names = AROUND[name]
    tx = so.transport_moments(make(), LAYER, **names)
    x = normal(9, (10,))
    state = tx.init(x)
    for _ in range(10):
        start = x
        updates, state = tx.update(radially_invariant_grads(x) + 0.1 * x, state, x)
        x = x - 0.02 * updates
        for field in set(names.get("first_moments", ("mu", "trace"))):
            moment = optax.tree.get(state.inner_state, field)
            if moment is not None:
                radial = jnp.vdot(moment, start) / jnp.linalg.norm(start)
                assert abs(radial) <= 1e-12 * jnp.linalg.norm(moment)


@pytest.mark.parametrize("name", AROUND)
def test_rescaled_initial_weights_trace_the_same_directions(name, x64):
    """Weights scaled by c trace the same directions at a learning rate scaled by a power of c.

    The power is 1 minus the degree of the update in the radius.
    """
    make, names = AROUND[name]
    power = 2 if name == "nesterov" else 1
    tx = so.transport_moments(make(), LAYER, **names)
    paths = []
    for c in (1.0, 3.0):
        x, path = c * normal(9, (10,)), []
        state = tx.init(x)
        for _ in range(15):
            updates, state = tx.update(radially_invariant_grads(x), state, x)
            x = x - 0.01 * c**power * updates
            path.append(x / jnp.linalg.norm(x))
        paths.append(jnp.stack(path))
    moved = geometry.angle(paths[0][0], paths[0][-1], LAYER)
    assert moved > 0.03
    # optax.scale_by_adam's epsilon, 1e-8, is not scaled.
    np.testing.assert_allclose(*paths, atol=1e-6)


# --- bad input --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: so.adamp(0.1, groups=FILTER, delta=-1.0), r"delta in \[0, inf\), found -1\.0"),
        (lambda: so.adamp(0.1, groups=FILTER, wd_ratio=1.5), r"wd_ratio in \[0, 1\], found 1\.5"),
        (lambda: so.sgdp(0.1, 1.0, groups=FILTER), r"sgdp: expected momentum in \[0, 1\)"),
        (
            lambda: so.hyperball(optax.trace(0.9), -0.1, groups=FILTER),
            r"hyperball: expected learning_rate in \[0, inf\), found -0\.1",
        ),
        (
            lambda: so.rotational(optax.trace(0.9), -1.0, groups=FILTER),
            r"rotational: expected average_angle in \[0, inf\)",
        ),
        (lambda: so.rotational_lion(0.1, b2=2.0, groups=FILTER), r"b2 in \[0, 1\), found 2\.0"),
        (lambda: so.adamg_star(0.0, groups=FILTER), r"learning_rate in \(0, inf\), found 0\.0"),
        (lambda: so.adamg_star(0.5, 2.0, groups=FILTER), r"weight_decay in \[0, 2\.0\)"),
        (lambda: so.normalize_updates(FILTER, decay=1.0), r"decay in \[0, 1\), found 1\.0"),
    ],
)
def test_numbers_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "tx",
    [
        so.hyperball(optax.trace(0.9), 0.1, groups={"a": None, "b": None}),
        so.rotational_adamw(0.1, groups={"a": None, "b": False}),
    ],
    ids=["hyperball", "rotational"],
)
def test_no_leaf_with_a_group(tx):
    message = r"a group for at least one parameter, found none among \['a', 'b'\]"
    with pytest.raises(ValueError, match=message):
        tx.init({"a": jnp.ones((2, 2)), "b": jnp.ones(2)})


@pytest.mark.parametrize("name", ROTATIONAL)
def test_rotational_variants_need_decay_to_turn(name):
    message = (
        rf"rotational_{name}: expected weight_decay above 0, found 0.*average_angle.*hyperball"
    )
    for zero in (0, 0.0, jnp.zeros([])):
        with pytest.raises(ValueError, match=message):
            ROTATIONAL[name](0.1, groups=FILTER, weight_decay=zero)
    jax.jit(lambda decay: ROTATIONAL[name](0.1, groups=FILTER, weight_decay=decay) and None)(0.0)


FIXED = {
    "hyperball": lambda groups: so.hyperball(optax.trace(0.9), 0.1, groups=groups),
    "rotational": lambda groups: so.rotational(optax.trace(0.9), 0.1, groups=groups),
    "rotational_adamw": lambda groups: so.rotational_adamw(0.1, groups=groups),
}


def finish(init, params):
    """The state, after all host callbacks of `init` have run."""
    state = init(params)
    jax.effects_barrier()
    return state


@pytest.mark.parametrize("name", FIXED)
def test_groups_without_a_direction_are_refused(name):
    """`init` refuses groups of norm 0 if it knows their values, and groups of one entry always."""
    tx = FIXED[name](so.groups_by_path({"kernel": FILTER, "fc": so.per_layer(joint="fc")}))
    kernel, fc = normal(0, (3, 4)), {"w": normal(1, (3, 2)), "b": jnp.zeros(2)}
    tx.init({"kernel": kernel, "fc": fc})

    zero = {"kernel": kernel.at[:, 1:3].set(0), "fc": fc}
    message = rf"{name}: kernel: expected groups of norm above 0, found 2 of 4 of norm 0\. Init"
    with pytest.raises(ValueError, match=message):
        tx.init(zero)
    with pytest.raises(ValueError, match=r"fc/b, fc/w: expected .* found 1 of 1 of norm 0\."):
        tx.init({"kernel": kernel, "fc": jax.tree.map(jnp.zeros_like, fc)})
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), zero)
    for init, given in ((jax.jit(tx.init), zero), (jax.vmap(tx.init), twice)):
        with pytest.warns(UserWarning, match=r"found 0 in kernel \(2 of 4\)\. .* never move"):
            finish(init, given)

    message = rf"{name}: kernel: expected groups of at least 2 entries, found 1\."
    for init in (tx.init, jax.jit(tx.init)):
        with pytest.raises(ValueError, match=message):
            init({"kernel": kernel[:1], "fc": fc})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_radius_that_is_not_finite_is_refused(bad):
    params = {"kernel": normal(0, (3, 4)).at[0, 1].set(bad), "bias": jnp.full(4, bad)}
    tx = so.retract({"kernel": FILTER, "bias": None})
    message = "retract: kernel: expected groups of finite norm, found 1 of 4 of norm NaN or inf"
    with pytest.raises(ValueError, match=message):
        tx.init(params)
    jax.jit(tx.init)(params)
    so.retract({"kernel": FILTER, "bias": None}, radius=1.0).init(params)
