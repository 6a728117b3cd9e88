"""Reports of recorded values as flat names and numbers, wherever the recorder is in a state."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from layouts import tree_of

import spherical_optax as so

SHAPES = {"conv": {"kernel": (3, 4)}, "fc": {"kernel": (4, 5), "bias": (5,)}, "gain": (3,)}
GROUPS = so.groups_by_path(
    {"conv/kernel": so.per_filter(), "fc/(kernel|bias)": so.per_layer(joint="fc")}
)
NAMES = ["radius_mean", "radius_min", "radius_max", "angle_mean", "angle_max", "radial_mean"]
NAMES += ["gradient_cosine_max", "effective_learning_rate_mean", "effective_learning_rate_max"]
PATHS = ["conv/kernel", "fc/bias", "fc/kernel"]


def recorded(learning_rate=0.1):
    tx = so.record_effective_learning_rate(optax.sgd(learning_rate), GROUPS)
    return optax.chain(so.record_gradient(GROUPS), tx, so.record_sphere(GROUPS))


WRAPPED = {
    "chain": recorded,
    "inject_hyperparams": lambda: optax.inject_hyperparams(recorded)(learning_rate=0.1),
    "MultiSteps": lambda: optax.MultiSteps(recorded(), 1),
    "apply_if_finite": lambda: optax.apply_if_finite(recorded(), 3),
    "masked": lambda: optax.masked(recorded(), {"conv": True, "fc": True, "gain": True}),
    "partition": lambda: optax.partition(
        {"all": recorded()}, jax.tree.map(lambda _: "all", tree_of(SHAPES, 0, "float32"))
    ),
    "around": lambda: so.record_effective_learning_rate(
        optax.chain(so.record_gradient(GROUPS), optax.sgd(0.1), so.record_sphere(GROUPS)), GROUPS
    ),
}


def step(tx):
    params, g = tree_of(SHAPES, 0, "float32"), tree_of(SHAPES, 1, "float32")
    updates, state = tx.update(g, tx.init(params), params)
    return state, params, optax.apply_updates(params, updates), g


@pytest.mark.parametrize("name", WRAPPED)
def test_found_in_any_state(name, monkeypatch):
    state, before, after, g = step(WRAPPED[name]())
    transfers, get = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: transfers.append(1) or get(tree))
    report = so.sphere_report(state, after, GROUPS)
    assert len(transfers) == 1
    assert list(report) == [f"sphere/{path}/{name}" for path in PATHS for name in NAMES]
    assert all(type(value) is float for value in report.values())
    metrics = so.sphere_metrics(before, after, GROUPS)["conv/kernel"]
    x, gradient = before["conv"]["kernel"], g["conv"]["kernel"]
    cosine = (x * gradient).sum(0) / jnp.linalg.norm(x, axis=0) / jnp.linalg.norm(gradient, axis=0)
    u_x = jnp.linalg.norm(x, axis=0)
    rate = 0.1 / (u_x**2 * (1 - 0.1 * (x * gradient).sum(0) / u_x**2))
    for key, value in (
        ("radius_mean", metrics.radius_after.mean()),
        ("radius_min", metrics.radius_after.min()),
        ("radius_max", metrics.radius_after.max()),
        ("angle_mean", metrics.step_angle.mean()),
        ("angle_max", metrics.step_angle.max()),
        ("radial_mean", (metrics.step_radial / metrics.radius_before).mean()),
        ("gradient_cosine_max", jnp.abs(cosine).max()),
        ("effective_learning_rate_mean", rate.mean()),
        ("effective_learning_rate_max", rate.max()),
    ):
        np.testing.assert_allclose(report[f"sphere/conv/kernel/{key}"], value, rtol=1e-4)


def test_names_are_there_from_the_start():
    tx, params = recorded(), tree_of(SHAPES, 0, "float32")
    first = so.sphere_report(tx.init(params), params, GROUPS)
    assert list(first) == list(so.sphere_report(step(tx)[0], params, GROUPS))
    assert set(first.values()) == {0.0}


def test_snapshots():
    _, before, after, _ = step(recorded())
    metrics = so.sphere_metrics(before, after, GROUPS)
    report = so.sphere_report(metrics, after, GROUPS)
    assert list(report) == [f"sphere/{path}/{name}" for path in PATHS for name in NAMES[:6]]
    np.testing.assert_allclose(
        report["sphere/fc/kernel/angle_mean"], metrics["fc/kernel"].step_angle, rtol=1e-6
    )


def test_linen_train_state():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.LayerNorm()(nn.Dense(4, name="fc")(x))

    groups = so.groups_by_path({"fc/(kernel|bias)": so.per_layer(joint="fc")})
    model, x = Model(), jnp.ones((2, 3))
    params = model.init(jax.random.key(0), x)["params"]
    tx = optax.chain(optax.sgd(0.1), so.record_sphere(groups))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, params))
    report = so.sphere_report(state, state.params, groups)
    assert report["sphere/fc/kernel/angle_mean"] == report["sphere/fc/bias/angle_mean"] > 0


def test_nnx_optimizer():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    groups = so.groups_by_path({"kernel": so.per_filter()})
    tx = optax.chain(optax.sgd(0.1), so.record_sphere(groups))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda model: model(jnp.ones((2, 3))).sum())(model)
    optimizer.update(model, grads)
    for state in (optimizer.opt_state, optimizer):
        report = so.sphere_report(state, nnx.state(model, nnx.Param), groups)
        assert report["sphere/kernel/angle_mean"] > 0


def test_what_is_missing_is_named():
    params = tree_of(SHAPES, 0, "float32")
    with pytest.raises(ValueError, match=r"found none\. Put record_sphere\(groups\) last"):
        so.sphere_report(optax.sgd(0.1).init(params), params, GROUPS)
    twice = optax.chain(so.record_sphere(GROUPS), so.record_sphere(GROUPS))
    with pytest.raises(ValueError, match="expected one RecordSphereState, found several"):
        so.sphere_report(twice.init(params), params, GROUPS)
    other = so.groups_by_path({"conv/kernel": so.per_filter()})
    with pytest.raises(ValueError, match=r"sphere of \['conv/kernel'\], the parameters with"):
        so.sphere_report(so.record_sphere(GROUPS).init(params), params, other)
