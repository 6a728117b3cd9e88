"""The trees of an update are paired by path, for every kind of dictionary, and checked."""

import collections

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import spherical_optax as so
from spherical_optax._engine.layout import Layout, per_group
from spherical_optax._engine.lift import lift
from spherical_optax._engine.step import stateless

PARAMS = {"a": jnp.zeros((3, 2)), "b": {"c": jnp.zeros((3, 2)), "d": None}}
GRADS = {"a": 1.0 + PARAMS["a"], "b": {"c": 2.0 + PARAMS["a"], "d": None}}
GROUPS = so.groups_by_path({"c": so.per_filter()})


def in_other_order(tree):
    pairs = reversed(list(tree.items()))
    return collections.OrderedDict(
        (key, in_other_order(value) if isinstance(value, dict) else value) for key, value in pairs
    )


@pytest.mark.parametrize(
    "other",
    [
        in_other_order,
        flax.core.freeze,
        lambda tree: nnx.State({"a": nnx.Param(tree["a"]), "b": tree["b"]}),
    ],
    ids=["ordered", "frozen", "nnx"],
)
def test_leaves_are_paired_by_path(other):
    """Leaves may come in another order; the result keeps the order of the updates."""
    grads, radius = other(GRADS), {"a": 3.0, "b": {"c": 4.0 + jnp.zeros(2), "d": None}}
    for params, updates in ((PARAMS, grads), (other(PARAMS), GRADS)):
        layout = Layout.read("f", GROUPS, params, updates, (radius, per_group))
        g, [r] = layout.updates, layout.fields
        [number] = [i for joint in layout.joints for i in joint]
        assert [np.min(g[number]), np.min(r[number])] == [2, 4]
        assert layout.params[number].shape == (3, 2)
        back, kept = layout.trees(g, r)
        assert jax.tree.structure(back) == jax.tree.structure(updates)
        jax.tree.map(np.testing.assert_array_equal, back, updates)
        assert kept == radius


def test_updates_keep_their_kind_of_dictionary():
    tx = so.scale_by_adamsrt(groups={"a": so.per_filter(), "b": None})
    params = {"a": jnp.eye(2), "b": jnp.ones((2, 2))}
    grads = {"a": jnp.ones((2, 2)), "b": jnp.full((2, 2), -1.0)}
    state = tx.init(params)
    expected, _ = tx.update(grads, state, params)
    updates, after = tx.update(in_other_order(grads), state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert list(updates) == ["b", "a"]
    jax.tree.map(np.testing.assert_array_equal, dict(updates), expected)


def test_a_missing_gradient_is_none_but_a_missing_parameter_has_no_gradient():
    grads = {"a": None, "b": {"c": None, "d": None}}
    layout = Layout.read("f", GROUPS, PARAMS, grads)
    assert layout.updates == [None] * 3
    assert layout.present() == []
    message = r"f: b/d of shape None: expected updates of shape None, found \(3, 2\)"
    with pytest.raises(ValueError, match=message):
        Layout.read("f", GROUPS, PARAMS, {"a": None, "b": {"c": None, "d": jnp.zeros((3, 2))}})


def test_state_of_another_transformation_is_refused():
    """The state of another transformation is refused, even if its fields have the same names."""
    params = jnp.ones((3, 2))
    makers = {
        "scale_by_adams": lambda: so.scale_by_adams(groups=True),
        "scale_by_adamsrt": lambda: so.scale_by_adamsrt(groups=True),
        "transported_trace": lambda: so.transported_trace(0.9, groups=True),
        "transport_moments": lambda: so.transport_moments(optax.trace(0.9), True),
        "retract": lambda: so.retract(True),
        "project_radial": lambda: so.project_radial(True),
        "normalize_updates": lambda: so.normalize_updates(True, decay=0.9),
        "center_updates": lambda: so.center_updates(True),
        "project_if_tangent": lambda: so.project_if_tangent(optax.identity(), True),
        "scale_by_adamg_star": lambda: so.scale_by_adamg_star(0.1, 0.1, groups=True),
        "record_sphere": lambda: so.record_sphere(True),
        "record_gradient": lambda: so.record_gradient(True),
    }
    state = optax.scale_by_adam().init(params)
    for name, make in makers.items():
        message = f"^{name}: expected a state of type {type(make().init(params)).__name__}, found "
        with pytest.raises(TypeError, match=message + "one of type ScaleByAdamState, made by"):
            make().update(params, state, params)


@pytest.mark.filterwarnings("ignore:.*expected groups of length above 0")
@pytest.mark.parametrize("make", [so.scale_by_adamsrt, so.retract, so.record_sphere])
def test_state_keeps_its_type_on_its_ways(make):
    """A state keeps its type through tree maps, checkpoints and abstract evaluation."""
    tx, params = optax.masked(make(groups=GROUPS), {"a": False, "b": True}), PARAMS
    state = tx.init(params)
    stored = flax.serialization.to_state_dict(state)
    for same in (
        jax.tree.map(jnp.copy, state),
        flax.serialization.from_state_dict(state, stored),
        jax.eval_shape(lambda: state),
    ):
        _, after = jax.eval_shape(tx.update, GRADS, same, params)
        assert jax.tree.structure(after) == jax.tree.structure(state)


def test_a_step_asks_for_the_same_products_in_both_runs():
    runs = []

    def on_group(v, x, state):
        runs.append(None)
        return v * (v.inner(x) if len(runs) == 1 else x.square()), state

    params = {"w": jnp.ones((2, 3))}
    tx = lift(stateless("mine", so.per_layer(), on_group))
    with pytest.raises(
        TypeError, match=r"the same inner products in both runs, found \('point', 'p"
    ):
        tx.update(params, tx.init(params), params)
