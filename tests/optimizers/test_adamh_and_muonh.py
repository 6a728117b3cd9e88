"""AdamH and MuonH against their formulas in NumPy, on trees with all kinds of leaves."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layouts import tree_of
from reference import adam, along_sphere, length, muon
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
    """Takes steps of relative length RATE on the sphere; `axes` index the groups."""
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


NUMBERS = optax.contrib.MuonDimensionNumbers
# Shape, groups, the dimension numbers that are given, and the right axes (rows, columns).
MATRICES = {
    "convolution": ((3, 3, 2, 4), so.per_layer(), None, ((0, 1, 2), (3,))),
    "filters": ((3, 3, 2, 4), so.per_filter(), None, ((0, 1, 2), (3,))),
    "stacked convolutions": ((2, 3, 3, 2, 4), so.RadialGroup((0,)), None, ((1, 2, 3), (4,))),
    "window of a volume": ((2, 2, 2, 3, 5), so.per_layer(), None, ((0, 1, 2, 3), (4,))),
    "queries": ((6, 2, 3), so.per_layer(), NUMBERS(0, (1, 2)), ((0,), (1, 2))),
    "back": ((2, 3, 6), so.per_layer(), NUMBERS((0, 1), 2), ((0, 1), (2,))),
    "stacked queries": ((4, 6, 2, 3), so.RadialGroup((0,)), NUMBERS(1, (2, 3)), ((1,), (2, 3))),
    "stacked columns": ((3, 4, 5), so.per_filter(ndim=2), None, ((1,), (2,))),
    "queries of a head": ((6, 2, 3), so.per_head(axis=-2), None, ((0,), (2,))),
    "(out, in, h, w)": ((4, 2, 3, 3), so.per_layer(), NUMBERS((1, 2, 3), 0), ((1, 2, 3), (0,))),
    "counted from the end": ((4, 5, 6), so.RadialGroup((0,)), NUMBERS(-2, -1), ((1,), (2,))),
}


def as_matrices(x, rows, columns):
    """The array as (batch, rows, columns), and a function that undoes this."""
    batch = [axis for axis in range(x.ndim) if axis not in (*rows, *columns)]
    order = (*batch, *rows, *columns)
    sizes = [math.prod(x.shape[axis] for axis in axes) for axes in (batch, rows, columns)]
    shape = [x.shape[axis] for axis in order]
    back = lambda y: y.reshape(shape).transpose(np.argsort(order))  # noqa: E731
    return x.transpose(order).reshape(sizes), back


@pytest.mark.parametrize("case", MATRICES)
def test_muonh_takes_any_axes_as_a_matrix(case, x64):
    shape, group, numbers, (rows, columns) = MATRICES[case]
    x, *grads = (tree_of(shape, seed) for seed in range(5))
    tree = {"layer": {"kernel": x}}
    tx = so.muonh(
        RATE,
        MOMENTUM,
        groups=so.groups_by_path({"kernel": group}),
        weight_dimension_numbers=numbers and {"layer": {"kernel": numbers}},
    )
    end = run(tx, tree, [{"layer": {"kernel": grad}} for grad in grads])[-1]
    _, back = as_matrices(np.asarray(x), rows, columns)
    flat = [as_matrices(np.asarray(grad), rows, columns)[0] for grad in grads]
    directions = [back(each) for each in muon(flat, MOMENTUM)]
    expected = on_sphere(np.asarray(x), directions, group.axes(len(shape)))
    np.testing.assert_allclose(end["layer"]["kernel"], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", ["filters", "back", "stacked queries", "(out, in, h, w)"])
def test_before_the_sphere_it_is_muon(case, x64):
    """A small first step is that of `optax.contrib.muon`, scaled and projected to the sphere."""
    shape, group, numbers, axes = MATRICES[case]
    params, grads = {"kernel": tree_of(shape, 0)}, {"kernel": tree_of(shape, 1)}
    tx = so.muonh(1e-9, groups={"kernel": group}, weight_dimension_numbers=numbers)
    own, _ = tx.update(grads, tx.init(params), params)
    tx = optax.contrib.muon(1e-9, muon_weight_dimension_numbers={"kernel": NUMBERS(*axes)})
    update, _ = tx.update(grads, tx.init(params), params)
    index, x = group.axes(len(shape)), np.asarray(params["kernel"])
    theirs = np.asarray(update["kernel"])
    expected = along_sphere(theirs / length(theirs, index), x, index) * length(x, index)
    np.testing.assert_allclose(own["kernel"] / 1e-9, expected, atol=1e-6)


def test_functions_and_trees_of_matrices():
    """Dimension numbers may be a tree, part of a tree or a function, as in `optax.contrib.muon`."""
    params = {
        "q": {"kernel": jnp.ones((4, 2, 3)) + jnp.arange(3)},
        "up": jnp.eye(4),
        "b": jnp.ones(3),
    }
    groups = so.groups_by_path({"q/kernel|up": so.per_layer()})
    forms = [
        {"q": {"kernel": NUMBERS(0, (1, 2))}, "up": None, "b": None},
        {"q": NUMBERS(0, (1, 2))},
        lambda tree: jax.tree.map(lambda x: NUMBERS(0, (1, 2)) if x.ndim == 3 else None, tree),
    ]
    ends = []
    for form in forms:
        tx = so.muonh(0.1, groups=groups, other=optax.sgd(0.1), weight_dimension_numbers=form)
        ends.append(run(tx, params, [params] * 2)[-1])
    for end in ends[1:]:
        jax.tree.map(np.testing.assert_array_equal, end, ends[0])


@pytest.mark.parametrize(
    ("shape", "group", "found"),
    [((4, 2, 3), so.per_layer(), 3), ((8, 2, 3, 3), so.per_layer(), 4)],
)
def test_what_muon_cannot_take_is_named(shape, group, found):
    params = {"layer": {"kernel": jnp.ones(shape)}}
    tx = so.muonh(0.1, groups={"layer": {"kernel": group}})
    message = f"muonh: layer/kernel of shape {shape}: expected a group of two axes for Muon, or a "
    with pytest.raises(ValueError, match=f"{re.escape(message)}.*found {found} axes beside"):
        tx.init(params)


def test_muon_refuses_the_bias_of_a_joint_group():
    params = {"layer": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}
    tx = so.muonh(0.1, groups={"layer": so.per_layer(joint="layer")})
    message = r"muonh: layer/bias of shape \(8,\): expected a matrix, found a vector\. .*use_bias"
    with pytest.raises(ValueError, match=message):
        tx.init(params)


def test_matrices_of_no_parameter_are_named():
    params = {"layer": {"kernel": jnp.ones((3, 3, 2, 4))}}
    given = {"layr": {"kernel": NUMBERS((0, 1), (2, 3))}}
    tx = so.muonh(0.1, groups=so.per_layer(), weight_dimension_numbers=given)
    message = r"muonh: .*found \['layr/kernel'\], which no parameter has. .*'layer/kernel'"
    with pytest.raises(ValueError, match=message):
        tx.init(params)


@pytest.mark.parametrize("numbers", [NUMBERS(0, (0, 2)), NUMBERS(0, 3), NUMBERS((), 1), "rows"])
def test_matrices_that_do_not_fit_are_named(numbers):
    params = {"layer": {"kernel": jnp.ones((4, 2, 3))}}
    given = {"layer": {"kernel": numbers}}
    tx = so.muonh(0.1, groups=so.per_layer(), weight_dimension_numbers=given)
    message = (
        r"muonh: layer/kernel of shape \(4, 2, 3\): expected weight_dimension_numbers .* found "
    )
    with pytest.raises(ValueError, match=message + re.escape(repr(numbers))):
        tx.init(params)


@pytest.mark.parametrize(
    ("name", "argument"), [("adamh", "b1"), ("adamh", "b2"), ("muonh", "momentum")]
)
def test_bad_numbers_are_named(name, argument):
    with pytest.raises(ValueError, match=rf"{name}: expected {argument} in \[0, 1\), found 1.0"):
        getattr(so, name)(0.1, **{argument: 1.0}, groups=None)


def test_plain_momentum_is_that_of_a_chain(x64):
    """Without bias correction, MuonH is marin's: a Nesterov trace, then Muon without momentum."""
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
        r"expected other, an optimizer for the parameters without a group, \['head', 'norm'\], "
        r"found None.*as in other=optax\.adamw\(1e-3\)"
    )
    with pytest.raises(ValueError, match=message):
        make(0.1, groups=groups).init(params)
    make(0.1, groups=groups, other=optax.adam(1e-3)).init(params)
    make(0.1, groups=groups).init({"kernel": jnp.eye(3)})


@pytest.mark.parametrize("name", ["adamh", "muonh"])
def test_decay_goes_with_the_optimizer_of_the_rest(name):
    message = rf"{name}: expected no weight_decay, found 0\.1\. .*other=optax\.adamw\(learning_rate"
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
