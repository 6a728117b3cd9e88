"""Hyperball and rotational take a direction as `inner`, and negate it themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trajectory import run

import spherical_optax as so

GROUPS = so.groups_by_path(
    {"conv": so.per_channel_block(3), r"(dense\d)/": so.per_layer(joint=r"\1")}
)
WARM_UP = optax.linear_schedule(0.0, 1e-3, 100)


def params_of(dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = {
        "conv": {"kernel": (3, 3, 2, 6)},
        "dense0": {"kernel": (5, 4), "bias": (4,)},
        "dense1": {"kernel": (4, 4), "bias": (4,)},
        "norm": {"scale": (6,), "gain": ()},
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


RATES = jax.tree.map(lambda leaf: 0.1, params_of())


def of_matrices(tree):
    return jax.tree.map(lambda leaf: "matrix" if leaf.ndim == 2 else "other", tree)


def axes(tree):
    return jax.tree.map(lambda leaf: optax.contrib.MuonDimensionNumbers(-2, -1), tree)


def muon():
    return optax.contrib.scale_by_muon(weight_dimension_numbers=axes)


def hyperball(inner):
    return so.hyperball(inner, 0.1, groups=GROUPS, other=optax.adam(0.1))


def rotational(inner):
    return so.rotational(inner, 0.1, groups=GROUPS, other=optax.adam(0.1))


WHOLE = {
    "adam": optax.adam(1e-3),
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(1e-3),
    "lion": optax.lion(1e-3),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
    "injected": optax.inject_hyperparams(optax.adam)(1e-3),
    "warm-up": optax.adam(WARM_UP),
    "injected warm-up": optax.inject_hyperparams(optax.adam)(WARM_UP),
    "adamsrt": so.adamsrt(1e-3, groups=GROUPS),
    "in part": optax.partition({"matrix": muon(), "other": optax.adam(1e-3)}, of_matrices),
    "labels of all paths": optax.partition(
        {"matrix": optax.sgd(0.1), "other": optax.trace(0.9)}, of_matrices(params_of())
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_optimizer_is_refused(name):
    message = r"hyperball: expected inner to give a direction, found that its update of \w+/\w+ poi"
    with pytest.raises(ValueError, match=message):
        hyperball(WHOLE[name]).init(params_of())


def test_wherever_init_is(dtype):
    params = params_of(dtype)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    tx = rotational(optax.adam(1e-3))
    for init in (
        lambda: tx.init(params),
        lambda: jax.jit(tx.init)(params),
        lambda: jax.vmap(tx.init)(stacked),
        lambda: jax.eval_shape(tx.init, params),
        lambda: optax.masked(tx, {**dict.fromkeys(params, True), "norm": False}).init(params),
    ):
        with pytest.raises(ValueError, match=r"rotational: expected inner to give a direction"):
            init()


DIRECTIONS = {
    "scale_by_adam": optax.scale_by_adam(),
    "trace": optax.trace(0.9, nesterov=True),
    "scale_by_lion": optax.scale_by_lion(),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam()),
    "decayed": optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1)),
    "by label": optax.partition(
        {"matrix": muon(), "other": optax.scale_by_adam()}, of_matrices(params_of())
    ),
    "scale_by_adamsrt": so.scale_by_adamsrt(groups=GROUPS),
    "transport_moments": so.transport_moments(optax.scale_by_adam(nesterov=True), GROUPS),
    "projected": optax.chain(optax.scale_by_adam(), so.project_radial(GROUPS)),
    "once against": optax.scale_by_schedule(lambda count: jnp.where(count == 1, -1.0, 1.0)),
    "zero": optax.set_to_zero(),
    "with other arguments": optax.scale_by_polyak(),
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_direction_passes(name):
    hyperball(DIRECTIONS[name]).init(params_of())


UPWARDS = {
    "scale_by_adam": optax.scale_by_adam(),
    "trace": optax.trace(0.9),
    "masked": optax.masked(optax.adam(1e-3), {**dict.fromkeys(params_of(), True), "norm": False}),
}


@pytest.mark.parametrize("make", [so.adamh, so.adamg], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", UPWARDS)
def test_another_direction_is_refused(make, name):
    """Parameters without a group would move up the loss."""
    message = (
        r"expected other to be a whole optimizer, found that its update of norm/\w+ points along"
    )
    with pytest.raises(ValueError, match=message):
        make(0.1, groups=GROUPS, other=UPWARDS[name]).init(params_of())


@pytest.mark.parametrize("name", [name for name in WHOLE if name != "labels of all paths"])
def test_another_whole_optimizer_passes(name):
    so.adamh(0.1, groups=GROUPS, other=WHOLE[name]).init(params_of())


def test_another_that_cannot_be_tried_passes():
    so.adamh(0.1, groups=GROUPS, other=needs_a_batch()).init(params_of())


def test_one_block_of_many_is_looked_at():
    """The trial runs `inner` on one small array per kind of leaf, however many layers there are."""
    seen = []

    def init(params):
        seen.append(jax.tree.map(np.shape, params, is_leaf=lambda leaf: leaf is None))
        return optax.EmptyState()

    params = {f"layer{i}": {"kernel": jnp.ones((9, 300, 8)), "bias": jnp.ones(8)} for i in range(9)}
    params["other"] = jnp.ones((4, 4))
    inner = optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
    layer = {"kernel": True, "bias": so.per_layer()}
    groups = {name: True if name == "other" else layer for name in params}
    so.hyperball(inner, 0.1, groups=groups).init(params)
    small, whole = seen
    assert small["layer0"] == {"kernel": (3, 3, 3), "bias": (3,)}
    assert small["layer1"] == small["layer8"] == {"kernel": (), "bias": ()}
    assert whole["layer8"] == {"kernel": (9, 300, 8), "bias": (8,)}


WRAPPERS = {
    "hyperball": hyperball,
    "rotational": rotational,
    "project_if_tangent": lambda inner: so.project_if_tangent(inner, GROUPS),
    "transport_moments": lambda inner: so.transport_moments(inner, GROUPS),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_inner_must_be_a_transformation(name):
    message = rf"{name}: expected a gradient transformation as inner, found "
    with pytest.raises(TypeError, match=message + r"3\. Pass one, such as optax\.trace\(0\.9\)\."):
        WRAPPERS[name](3)
    with pytest.raises(TypeError, match=message + r"<function scale_by_adam .*\. Call it\."):
        WRAPPERS[name](optax.scale_by_adam)


def test_muonh_on_a_tree_of_dictionaries():
    """Matrices take Muon's direction at their initial radius; Adam trains the other leaves."""
    params = params_of()
    groups = so.groups_by_path({r"dense\d/kernel": so.per_layer()})
    tx = so.hyperball(muon(), 0.1, groups=groups, other=optax.adam(0.01))
    _, after = run(tx, params, [params])
    kernel = params["dense0"]["kernel"]
    w, _ = muon().update(kernel, muon().init(kernel))
    radius = np.linalg.norm(kernel)
    moved = kernel - 0.1 * radius * w / np.linalg.norm(w)
    expected = radius * moved / np.linalg.norm(moved)
    np.testing.assert_allclose(after["dense0"]["kernel"], expected, rtol=1e-4)
    adam = run(optax.adam(0.01), params["norm"], [params["norm"]])
    np.testing.assert_allclose(after["norm"]["scale"], adam[-1]["scale"], rtol=1e-6)


def needs_a_batch():
    def update(updates, state, params=None, *, batch):
        return jax.tree.map(lambda u: u / len(batch), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


WITH_ARGUMENTS = {
    "polyak_sgd": optax.polyak_sgd(),
    "momo": optax.contrib.momo(),
    "adam and reduce_on_plateau": optax.chain(optax.adam(1e-3), optax.contrib.reduce_on_plateau()),
    "dog": optax.contrib.dog(1e-3),
    "prodigy": optax.contrib.prodigy(),
    "sam": optax.contrib.sam(
        optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.5)), opaque_mode=True
    ),
}


@pytest.mark.parametrize("name", WITH_ARGUMENTS)
def test_a_whole_optimizer_is_refused_whatever_it_asks_for(name):
    with pytest.raises(ValueError, match="points against the gradient"):
        hyperball(WITH_ARGUMENTS[name]).init(params_of())


def test_what_cannot_be_tried_is_said_and_can_be_stated():
    message = r"hyperball: .* fails on small arrays: TypeError: .*'batch'.*so\.direction\(inner\)"
    with pytest.raises(ValueError, match=message):
        hyperball(needs_a_batch()).init(params_of())
    params = params_of()
    tx = hyperball(so.direction(needs_a_batch()))
    updates, _ = tx.update(params, tx.init(params), params, batch=[1, 2])
    same, _ = hyperball(optax.identity()).update(params, tx.init(params), params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        updates["conv"],
        same["conv"],
    )
    with pytest.raises(TypeError, match="direction: expected a gradient transformation as tx"):
        so.direction(optax.scale_by_adam)


def test_hyperparameters_may_be_traced():
    """Traced hyperparameters, as in a vmapped search that calls `init`, act like numbers."""

    def moved(b1):
        params = params_of()
        tx = so.adamh(0.1, b1, groups=GROUPS, other=optax.adam(0.1, b1))
        updates, _ = tx.update(params, tx.init(params), params)
        return updates["norm"]["scale"]

    found = jax.vmap(moved)(jnp.array([0.5, 0.9]))
    np.testing.assert_allclose(found[1], moved(0.9), rtol=1e-4)


# --- learning rates by path -------------------------------------------------------------


def angles(tx, params, steps=1):
    before, state = params, tx.init(params)
    for _ in range(steps):
        before = params
        g = tree_like(params, 3)
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    groups = so.sphere_metrics(before, params, GROUPS)
    chord = {path: np.tan(np.asarray(each.step_angle)) for path, each in groups.items()}
    return chord, params


def tree_like(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)


RATED = {
    "hyperball": lambda rate: so.hyperball(
        so.project_radial(GROUPS), rate, groups=GROUPS, other=optax.sgd(0.5)
    ),
    "adamh": lambda rate: so.adamh(rate, groups=GROUPS, other=optax.adam(0.5)),
}


@pytest.mark.parametrize("name", RATED)
def test_rates_by_path(name):
    rules = {"conv": 0.01, "dense0": optax.linear_schedule(0.2, 0.0, 4), ".*": 0.1}
    params, make = params_of(), RATED[name]
    apart = {path: angles(make(rate), params)[1] for path, rate in rules.items() if path != ".*"}
    both, end = angles(make(rules), params)
    rest = angles(make(0.1), params)[1]
    for module, one in (("conv", apart["conv"]), ("dense0", apart["dense0"]), ("dense1", rest)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), end[module], one[module]
        )
    jax.tree.map(np.testing.assert_array_equal, end["norm"], rest["norm"])
    if name == "hyperball":  # for tangent directions the rate is the tangent of the angle
        np.testing.assert_allclose(both["conv/kernel"], 0.01, rtol=1e-3)
        np.testing.assert_allclose(both["dense0/kernel"], 0.2, rtol=1e-3)
        later, _ = angles(make(rules), params, steps=3)
        np.testing.assert_allclose(later["dense0/kernel"], 0.1, rtol=1e-3)


def test_rates_that_do_not_fit_are_named():
    params = params_of()
    for rules, message in (
        ({}, "adamh: expected at least one rule for learning_rate"),
        ({"[": 0.1}, "adamh: expected regular expressions as keys of learning_rate"),
        ({"": -0.1}, r"adamh: expected learning_rate in \[0, inf\), found -0.1"),
        ({"conv": 0.1}, "adamh: expected a rule for the learning_rate of dense0/bias, found none"),
        ({"": 0.1, "conv": 0.2}, r"adamh: expected each rule for learning_rate .* \['conv'\]"),
        ({"kernel": 0.1, "": 0.2}, "one learning_rate for the joint label 'dense0', found 0.2"),
    ):
        with pytest.raises(ValueError, match=message):
            so.adamh(rules, groups=GROUPS, other=optax.adam(0.1)).init(params)
