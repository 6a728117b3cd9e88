"""Equinox models: trees of groups that are callable, and kernels with their outputs first."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spherical_optax as so
from spherical_optax.groups import joints_of

RULES = so.groups_by_path({r"conv/weight": so.per_filter(axis=0)})


class Network(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(2, 4, 3, use_bias=False, key=keys[0])
        self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")
        self.head = eqx.nn.Linear(4, 3, key=keys[1])

    def __call__(self, x, state):
        x, state = self.norm(self.conv(x), state)
        return self.head(jax.nn.relu(x).mean(axis=(1, 2))), state


@pytest.fixture(scope="module")
def problem():
    """The parameters, the forward pass as a function of them, and a batch."""
    model, state = eqx.nn.make_with_state(Network)(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def fn(params, x):
        model = eqx.combine(params, static)
        mapped = jax.vmap(model, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
        return mapped(x, state)[0]

    return params, fn, jax.random.normal(jax.random.key(1), (4, 2, 5, 5))


def trained(params, fn, x, groups):
    """The parameters after two steps."""
    tx = so.adamsrt(1e-2, groups=groups, weight_decay=1e-3)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda params: jnp.sum(jnp.tanh(fn(params, x))))(params)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(params, updates), state

    for _ in range(2):
        params, state = step(params, state)
    return params


def test_trees_of_groups_train_as_rules_do(problem):
    params, fn, x = problem
    found = so.find_radial_groups(fn, params, x, explain=True)
    none = jax.tree.map(lambda leaf: None, params)
    by_hand = eqx.tree_at(
        lambda tree: tree.conv.weight, none, so.per_filter(axis=0), is_leaf=lambda x: x is None
    )
    for groups in (found.groups, by_hand):
        assert callable(groups)
        assert joints_of(groups, params) == [{0: so.per_filter(axis=0)}]
    assert "invariant" in so.describe_groups(params, found).splitlines()[1]
    expected = trained(*problem, RULES)
    assert np.abs(expected.conv.weight - params.conv.weight).max() > 1e-3
    jax.tree.map(np.testing.assert_array_equal, trained(*problem, found.groups), expected)
