"""AdamH and MuonH against their formulas in NumPy, on trees of all kinds of leaves."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layouts import tree_of
from reference import adam, length, muon
from trajectory import run

import spherical_optax as so

SHAPES = {
    "embedding": (7, 4),
    "layers": {"up": (2, 4, 6), "norm": (2, 4)},
    "experts": (2, 3, 4, 5),
    "conv": (3, 3, 2, 4),
    "head": {"kernel": (4, 7), "bias": (7,)},
}
GROUPS = so.groups_by_path(
    {
        "layers/up": so.RadialGroup((0,)),
        "experts": so.RadialGroup((0, 1)),
        "head/kernel": so.per_filter(),
    }
)
RATE, OTHER, B1, B2, EPS, MOMENTUM = 0.1, 0.03, 0.8, 0.9, 1e-3, 0.7


def on_sphere(x, directions, axes):
    """Steps of a relative length, and back to the sphere; norms over all axes but those."""
    radius = length(x, axes)
    for w in directions:
        y = x - RATE * radius * w / length(w, axes)
        x = radius * y / length(y, axes)
    return x


def expected(name, params, grads):
    axes = {"layers/up": (0,), "experts": (0, 1), "head/kernel": (1,)}
    found = {}
    for (path, x), *steps in zip(*map(jax.tree.leaves_with_path, (params, *grads)), strict=True):
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        steps = [np.asarray(step) for _, step in steps]
        if key not in axes:
            found[key] = np.asarray(x) - OTHER * sum(adam(steps, B1, B2, EPS))
        else:
            of_adam = name == "adamh"
            directions = (
                adam(steps, B1, B2, EPS) if of_adam else muon(steps, MOMENTUM, name == "muonh")
            )
            found[key] = on_sphere(np.asarray(x), directions, axes[key])
    return found


ADAM = optax.adam(OTHER, B1, B2, EPS)
OPTIMIZERS = {
    "adamh": so.adamh(RATE, B1, B2, EPS, groups=GROUPS, other=ADAM),
    "muonh": so.muonh(RATE, MOMENTUM, groups=GROUPS, other=ADAM),
    "muonh, uncorrected": so.muonh(
        RATE, MOMENTUM, groups=GROUPS, other=ADAM, bias_correction=False
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_follows_its_formula(name, x64):
    params, grads = tree_of(SHAPES, 0), [tree_of(SHAPES, seed) for seed in range(1, 5)]
    end = run(OPTIMIZERS[name], params, grads)[-1]
    for path, leaf in jax.tree.leaves_with_path(end):
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        np.testing.assert_allclose(
            leaf, expected(name, params, grads)[key], rtol=1e-12, atol=1e-12, err_msg=key
        )


@pytest.mark.parametrize(
    ("shape", "group", "found"),
    [((3, 3, 2, 4), so.per_layer(), 4), ((4, 2, 3), so.per_layer(), 3), ((8,), so.per_layer(), 1)],
)
def test_what_muon_cannot_take_is_named(shape, group, found):
    params = {"layer": {"kernel": jnp.ones(shape)}}
    tx = so.muonh(0.1, groups={"layer": {"kernel": group}})
    message = f"muonh: layer/kernel of shape {shape}: expected a group of two axes for Muon, found "
    with pytest.raises(ValueError, match=re.escape(f"{message}{found} beside")):
        tx.init(params)


@pytest.mark.parametrize(
    ("name", "argument"), [("adamh", "b1"), ("adamh", "b2"), ("muonh", "momentum")]
)
def test_bad_numbers_are_named(name, argument):
    with pytest.raises(ValueError, match=rf"{name}: expected {argument} in \[0, 1\), found 1.0"):
        getattr(so, name)(0.1, **{argument: 1.0}, groups=None)


def test_plain_momentum_is_that_of_a_chain(x64):
    """The port of marin's MuonH: a trace with Nesterov, and Muon without momentum."""
    params = {"kernel": tree_of((4, 6), 0)}
    grads = [{"kernel": tree_of((4, 6), seed)} for seed in range(1, 5)]
    groups = so.groups_by_path({"kernel": so.per_layer()})
    direction = optax.chain(
        optax.trace(0.95, nesterov=True),
        optax.contrib.scale_by_muon(
            beta=0.0,
            nesterov=False,
            weight_dimension_numbers={"kernel": optax.contrib.MuonDimensionNumbers()},
        ),
    )
    paths = [
        run(tx, params, grads)
        for tx in (
            so.muonh(0.1, groups=groups, bias_correction=False),
            so.hyperball(direction, 0.1, groups=groups),
        )
    ]
    np.testing.assert_allclose(*(path[-1]["kernel"] for path in paths), rtol=1e-12)


@pytest.mark.parametrize("make", [so.adamh, so.muonh])
def test_stacked_layers_step_as_separate_ones(make, x64):
    stacked = {"up": (3, 4, 6), "norm": (3, 4)}
    apart = lambda tree: {f"{key}{i}": leaf[i] for key, leaf in tree.items() for i in range(3)}  # noqa: E731
    params, grads = tree_of(stacked, 0), [tree_of(stacked, seed) for seed in range(1, 5)]
    make = functools.partial(make, 0.1, other=optax.adam(0.1))
    together = make(groups=so.groups_by_path({"up": so.RadialGroup((0,))}))
    each = make(groups=so.groups_by_path({"up": so.per_layer()}))
    end = run(each, apart(params), [apart(g) for g in grads])[-1]
    for key, leaf in apart(run(together, params, grads)[-1]).items():
        np.testing.assert_allclose(leaf, end[key], rtol=1e-12, err_msg=key)


@pytest.mark.parametrize(
    "make", [so.adamh, so.muonh, functools.partial(so.hyperball, optax.trace(0.9))]
)
def test_an_angle_is_no_rate_for_leaves_without_a_group(make):
    params = {"kernel": jnp.ones((3, 4)), "norm": jnp.ones(3), "head": jnp.ones((4, 2))}
    groups = so.groups_by_path({"kernel": so.per_layer()})
    message = (
        r"expected other, the optimizer of leaves without a group, \['head', 'norm'\], found None.*"
        r"as in other=optax\.adamw\(1e-3\)"
    )
    with pytest.raises(ValueError, match=message):
        make(0.1, groups=groups).init(params)
    make(0.1, groups=groups, other=optax.adam(1e-3)).init(params)
    make(0.1, groups=groups).init({"kernel": jnp.eye(3)})


@pytest.mark.parametrize("name", ["adamh", "muonh"])
def test_decay_goes_with_the_optimizer_of_the_rest(name):
    message = rf"{name}: expected no weight_decay, found 0\.1: .*other=optax\.adamw\(learning_rate"
    with pytest.raises(TypeError, match=message):
        getattr(so, name)(0.1, groups=so.per_layer(), weight_decay=0.1)
    params = {"kernel": jnp.eye(3), "gain": jnp.ones(3), "bias": jnp.ones(3)}
    groups = so.groups_by_path({"kernel": so.per_layer()})
    mask = {"kernel": False, "gain": False, "bias": True}
    other = optax.adamw(1e-2, weight_decay=0.1, mask=mask)
    tx = getattr(so, name)(0.1, groups=groups, other=other)
    rest = {key: params[key] for key in ("gain", "bias")}
    own = optax.adamw(1e-2, weight_decay=0.1, mask={"gain": False, "bias": True})
    for end, step in ((run(tx, params, [params] * 3)[-1], run(own, rest, [rest] * 3)[-1]),):
        for key in rest:
            np.testing.assert_allclose(end[key], step[key], rtol=1e-6)
