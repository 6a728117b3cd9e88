"""The recorded effective learning rate agrees with the one predicted from the state."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layouts import CASES, tree_of

import spherical_optax as so
from spherical_optax.groups import joints_of

LR, B1, B2, EPS = 0.05, 0.8, 0.9, 1e-3


def record(tx, groups, **numbers):
    return so.record_effective_learning_rate(tx, groups, **numbers)


ADAM = {"b1": B1, "b2": B2, "eps": EPS}
OPTIMIZERS = {
    "sgd": lambda groups: record(optax.sgd(LR), groups),
    "momentum": lambda groups: record(optax.sgd(LR, 0.9), groups),
    "adam": lambda groups: record(optax.adam(LR, B1, B2, EPS), groups, **ADAM),
    "adams": lambda groups: record(so.adams(LR, B1, B2, EPS, groups=groups), groups, b1=B1),
    "adamsrt": lambda groups: record(so.adamsrt(LR, B1, B2, EPS, groups=groups), groups, b1=B1),
    "sgdmrt": lambda groups: record(so.sgdmrt(LR, 0.9, groups=groups), groups),
    "adamh": lambda groups: record(so.adamh(LR, B1, B2, EPS, groups=groups), groups, **ADAM),
}


def quotient(name, state, g, x, unit):
    """Numerator and denominator of a step, as documented for the prediction."""
    field = lambda name: dict(enumerate(jax.tree.leaves(optax.tree.get(state, name))))  # noqa: E731
    r = so.geometry.norm(x, unit)
    radial = so.geometry.scale(so.geometry.inner(g, x, unit) / r**2, x, unit)
    if name == "sgd":
        return g, 1.0
    if name == "momentum":
        return field("trace"), 1.0
    if name == "sgdmrt":
        m = so.geometry.scale(1 / r, field("trace"), unit)
        return {i: m[i] + radial[i] for i in m}, 1.0
    count = int(optax.tree.get_all_with_path(state, "count")[0][1])
    first, second, mu, nu = 1 - B1**count, 1 - B2**count, field("mu"), field("nu")
    if name in ("adam", "adamh"):
        m = {i: each / first for i, each in mu.items()}
        b = {i: np.sqrt(v / second) + EPS for i, v in nu.items()}
        if name == "adamh":
            w = {i: m[i] / b[i] for i in m}
            b = so.geometry.scale(so.geometry.norm(w, unit) / r, b, unit)
        return m, b
    v, size = nu[0] / second, sum(leaf.size for leaf in x.values()) // r.size
    if name == "adams":
        return {i: each / first for i, each in mu.items()}, (np.sqrt(v) + EPS) / math.sqrt(size)
    m = so.geometry.scale(1 / r, mu, unit)
    m = {i: (m[i] + (1 - B1) * radial[i]) / first for i in m}
    return m, (np.sqrt(v / r.reshape(v.shape) ** 2) + EPS) / math.sqrt(size)


@pytest.mark.parametrize(
    "case", ["filters", pytest.param("heads", marks=pytest.mark.slow), "joint blocks"]
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_is_that_of_the_state(name, case, x64):
    shapes, groups = CASES[case]
    params, tx = tree_of(shapes, 0), OPTIMIZERS[name](groups)
    (unit,) = joints_of(groups, params)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for seed in range(1, 4):
        grads = tree_of(shapes, seed)
        updates, state = update(grads, state, params)
        x, g = (dict(enumerate(jax.tree.leaves(tree))) for tree in (params, grads))
        a, b = quotient(name, state.inner_state, g, x, unit)
        expected = so.effective_learning_rate(x, a, b, LR, unit)
        found = jax.tree.leaves(state.effective_learning_rate)
        np.testing.assert_allclose(
            found[0].ravel(), np.ravel(expected.learning_rate), rtol=1e-9, err_msg=str(seed)
        )
        params = optax.apply_updates(params, updates)


def test_schedules_decay_and_accumulation_are_seen(x64):
    """The recorded rate includes schedules, decay, injection and accumulation."""
    params, groups = jnp.array([2.0, 0.0]), so.per_layer()
    g = jnp.array([0.0, 1.0])
    schedule = optax.linear_schedule(0.4, 0.0, 2)
    tx = record(optax.chain(optax.add_decayed_weights(0.5), optax.sgd(schedule)), groups)
    state = tx.init(params)
    for rate in (0.4, 0.2):
        _, state = tx.update(g, state, params)
        expected = rate / (4 * (1 - rate * 0.5))  # the closed form of SGD with L2
        np.testing.assert_allclose(state.effective_learning_rate, expected, rtol=1e-7)
    injected = optax.inject_hyperparams(
        lambda learning_rate: record(optax.sgd(learning_rate), groups)
    )(learning_rate=0.4)
    steps = optax.MultiSteps(injected, 2)
    state = steps.init(params)
    for expected in (0.0, 0.1):
        _, state = steps.update(g, state, params)
        found = optax.tree.get(state, "effective_learning_rate")
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_updates_are_those_of_the_optimizer(x64):
    params, g = tree_of({"w": (4, 3)}, 0), tree_of({"w": (4, 3)}, 1)
    tx = optax.adam(LR, B1, B2, EPS)
    recorded = record(tx, {"w": so.per_filter()}, **ADAM)
    updates, state = recorded.update(g, recorded.init(params), params)
    expected, inner_state = tx.update(g, tx.init(params), params)
    jax.tree.map(
        np.testing.assert_array_equal, (updates, state.inner_state), (expected, inner_state)
    )


def test_numbers_that_are_traced(x64):
    params, groups = jnp.array([2.0, 1.0, 0.0]), so.per_layer()

    @jax.jit
    def start(b1, eps):
        tx = optax.adam(LR, b1, B2, eps)
        return record(tx, groups, b1=b1, b2=B2, eps=eps).init(params)

    assert start(B1, EPS).effective_learning_rate == 0


def test_what_it_cannot_know_is_named():
    params, groups = {"w": jnp.ones((4, 3))}, {"w": so.per_filter()}
    for tx, numbers, message in (
        (optax.adam(0.1), {}, r"w: expected b1 and b2 and eps of the optimizer, .* Pass b1=\.\.\."),
        (
            so.adams(0.1, groups=groups),
            {},
            "w: expected b1 of the optimizer, found none: ScaleByAdam",
        ),
        (optax.lion(0.1), {}, r"w: expected moments in one of .*, found \['ScaleByLionState'\]"),
        (optax.adam(0.1, nesterov=True), ADAM, "w: expected steps along the quotient .* a cosine"),
        (optax.rmsprop(0.1), {}, "w: expected steps along the quotient of the moments"),
        (optax.sgd(0.1), {"b1": 1.0}, r"expected b1 in \[0, 1\), found 1.0"),
    ):
        with pytest.raises(ValueError, match=f"record_effective_learning_rate: {message}"):
            record(tx, groups, **numbers).init(params)
    with pytest.raises(TypeError, match="expected a gradient transformation as tx"):
        record(None, groups)
