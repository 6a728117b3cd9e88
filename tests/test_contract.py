"""Every public transformation does what Optax requires of a transformation.

A new transform or optimizer is added to `TABLE` first. Compiling takes most of the time, so tests
share compiled programs: each entry is built once, and its plain runs are cached.
"""

import functools
import inspect
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax import export

import spherical_optax as so

GROUPS = so.groups_by_path(
    {
        r"conv/kernel": so.per_filter(),
        r"dense/(kernel|bias)": so.per_layer(joint="dense"),
        r"blocks": so.per_channel_block(2),
    }
)


class Entry(NamedTuple):
    """A public transformation: its factory, and the values of its numeric hyperparameters."""

    factory: Any
    numbers: dict[str, float]


def transport(inner):
    """A factory with one number, so that hyperparameters can be injected."""

    def factory(decay, groups):
        return so.transport_moments(inner(decay), groups)

    return factory


def direction(decay, groups):
    return so.direction(so.transported_trace(decay, groups=groups))


def project_if_tangent(decay, delta, weight_decay, groups):
    inner = optax.trace(decay)
    return so.project_if_tangent(inner, groups, delta=delta, weight_decay=weight_decay)


def hyperball(decay, learning_rate, groups):
    adam = optax.scale_by_adam(decay)
    return so.hyperball(adam, learning_rate, groups=groups, other=optax.adam(0.05, decay))


def adamsw(learning_rate, weight_decay, other_learning_rate, groups):
    """AdamSW with a mask, which `inject_hyperparams` would take for a schedule as an argument."""
    return so.adamsw(
        learning_rate,
        groups=groups,
        other_learning_rate=other_learning_rate,
        weight_decay=weight_decay,
        mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree),
    )


def rotational(decay, average_angle, groups):
    other = optax.sgd(0.05, decay)
    return so.rotational(optax.trace(decay), average_angle, groups=groups, other=other)


def adamh(learning_rate, b1, groups):
    return so.adamh(learning_rate, b1, groups=groups, other=optax.adam(0.05))


def adamg(learning_rate, b1, groups):
    return so.adamg(learning_rate, b1, groups=groups, other=optax.adam(0.05))


def chain(b1, learning_rate, groups):
    """Transforms that fuse, between transformations of Optax."""
    return so.chain(
        optax.scale(2.0),
        so.scale_by_adamg(b1, groups=groups),
        so.scale_by_learning_rates(learning_rate, groups=groups, other=optax.sgd(0.05)),
        so.retract(groups),
        optax.identity(),
    )


def retract_by_function(step, groups):
    """Keeps the current radius with a function as `method`, along part of the step."""

    def end(x, v, group):
        part, radius = jax.tree.map(lambda v: step * v, v), so.geometry.norm(x, group)
        return so.geometry.retract(x, part, group, radius, "geodesic")

    return so.retract(groups, method=end)


def split_radial(decay, learning_rate, groups):
    tangent = optax.chain(optax.trace(decay), optax.scale(-0.1))
    return so.split_radial(tangent, optax.adam(learning_rate), groups)


def decay_to_initial(weight_decay, groups):
    """`add_decay_to_initial`, which takes no groups."""
    return so.add_decay_to_initial(weight_decay)


def effective(learning_rate, momentum, groups):
    return so.record_effective_learning_rate(optax.sgd(learning_rate, momentum), groups)


def muonh(learning_rate, momentum, groups):
    """MuonH on the only matrix; filters, joint leaves and blocks are not matrices."""
    groups = so.groups_by_path({"dense/kernel": so.per_filter()})
    return so.muonh(learning_rate, momentum, groups=groups, other=optax.adam(0.05))


TABLE = {
    "chain": Entry(chain, {"b1": 0.8, "learning_rate": 0.1}),
    "scale_by_learning_rates": Entry(so.scale_by_learning_rates, {"learning_rate": 0.1}),
    "scale_by_adamg": Entry(so.scale_by_adamg, {"b1": 0.8, "b2": 0.9, "eps": 1e-6}),
    "project_radial": Entry(so.project_radial, {}),
    "scale_by_adams": Entry(so.scale_by_adams, {"b1": 0.8, "b2": 0.9, "eps": 1e-6}),
    "scale_by_adamsrt": Entry(so.scale_by_adamsrt, {"b1": 0.8, "b2": 0.9, "eps": 1e-6}),
    "transported_trace": Entry(so.transported_trace, {"decay": 0.8}),
    "direction": Entry(direction, {"decay": 0.8}),
    "transport_moments(trace)": Entry(transport(optax.trace), {"decay": 0.8}),
    "transport_moments(scale_by_adam)": Entry(transport(optax.scale_by_adam), {"decay": 0.8}),
    "transport_moments(chain)": Entry(
        transport(lambda decay: optax.chain(optax.scale(2.0), optax.trace(decay, nesterov=True))),
        {"decay": 0.8},
    ),
    "transport_moments(inject_hyperparams)": Entry(
        transport(
            lambda decay: optax.inject_hyperparams(
                optax.scale_by_adam,
                static_args=("b2", "eps"),  # bfloat16 rounds 0.999 to 1
            )(b1=decay)
        ),
        {"decay": 0.8},
    ),
    "retract": Entry(so.retract, {"radius": 2.0}),
    "retract(initial)": Entry(so.retract, {}),
    "retract(geodesic)": Entry(functools.partial(so.retract, method="geodesic"), {}),
    "retract(rules)": Entry(functools.partial(so.retract, radius={"conv": 2.0, "": "sqrt(d)"}), {}),
    "retract(keep)": Entry(so.retract, {"keep": 0.5}),
    "retract(function)": Entry(retract_by_function, {"step": 0.5}),
    "split_radial": Entry(split_radial, {"decay": 0.8, "learning_rate": 0.01}),
    "record_sphere": Entry(so.record_sphere, {}),
    "record_gradient": Entry(so.record_gradient, {}),
    "record_effective_learning_rate": Entry(effective, {"learning_rate": 0.1, "momentum": 0.8}),
    "adams": Entry(so.adams, {"learning_rate": 0.1, "b1": 0.8, "weight_decay": 0.01}),
    "adamsrt": Entry(so.adamsrt, {"learning_rate": 0.1, "b1": 0.8, "weight_decay": 0.01}),
    "adamsw": Entry(
        adamsw, {"learning_rate": 0.1, "weight_decay": 0.01, "other_learning_rate": 0.2}
    ),
    "adamsrtw": Entry(so.adamsrtw, {"learning_rate": 0.1, "b1": 0.8, "weight_decay": 0.01}),
    "sgdmrt": Entry(so.sgdmrt, {"learning_rate": 0.1, "momentum": 0.8, "dampening": 0.1}),
    "adamg": Entry(adamg, {"learning_rate": 0.1, "b1": 0.8}),
    "adamg_star": Entry(so.adamg_star, {"learning_rate": 0.1, "weight_decay": 0.1}),
    "scale_by_adamg_star": Entry(
        so.scale_by_adamg_star, {"learning_rate": 0.1, "weight_decay": 0.1}
    ),
    "normalize_updates": Entry(so.normalize_updates, {}),
    "normalize_updates(decay)": Entry(so.normalize_updates, {"decay": 0.8, "eps": 1e-6}),
    "center_updates": Entry(so.center_updates, {}),
    "add_decay_to_initial": Entry(decay_to_initial, {"weight_decay": 0.1}),
    "project_if_tangent": Entry(
        project_if_tangent,
        {"decay": 0.8, "delta": 1.0, "weight_decay": 0.1},
    ),
    "adamp": Entry(so.adamp, {"learning_rate": 0.1, "b1": 0.8, "weight_decay": 0.1, "delta": 1.0}),
    "adamp(nesterov)": Entry(
        functools.partial(so.adamp, nesterov=True), {"learning_rate": 0.1, "b1": 0.8}
    ),
    "sgdp": Entry(so.sgdp, {"learning_rate": 0.1, "momentum": 0.8, "weight_decay": 0.1}),
    "hyperball": Entry(
        hyperball,
        {"decay": 0.8, "learning_rate": 0.1},
    ),
    "adamh": Entry(adamh, {"learning_rate": 0.1, "b1": 0.8}),
    "muonh": Entry(muonh, {"learning_rate": 0.1, "momentum": 0.8}),
    "rotational": Entry(
        rotational,
        {"decay": 0.8, "average_angle": 0.1},
    ),
    "rotational_adamw": Entry(so.rotational_adamw, {"learning_rate": 0.1, "weight_decay": 0.1}),
    "rotational_sgdm": Entry(so.rotational_sgdm, {"learning_rate": 0.1, "weight_decay": 0.1}),
    "rotational_lion": Entry(so.rotational_lion, {"learning_rate": 0.1, "weight_decay": 0.1}),
}


# Entries that only `make test-slow` tests: variants of other entries, and optimizers that chain
# other entries. One optimizer of each family is always tested.
VARIANTS = (
    "adams",
    "adamsw",
    "adamsrtw",
    "adamg",
    "adamg_star",
    "sgdp",
    "hyperball",
    "rotational_adamw",
    "rotational_sgdm",
    "rotational_lion",
    "transport_moments(scale_by_adam)",
    "transport_moments(chain)",
    "transport_moments(inject_hyperparams)",
    "retract",
    "retract(geodesic)",
    "retract(rules)",
    "retract(keep)",
    "retract(function)",
    "normalize_updates(decay)",
    "adamp(nesterov)",
)


@pytest.fixture(params=[pytest.param(n, marks=[pytest.mark.slow] * (n in VARIANTS)) for n in TABLE])
def name(request):
    return request.param


@functools.cache
def build(name, tree=False):
    entry = TABLE[name]
    return entry.factory(groups=TREE if tree else GROUPS, **entry.numbers)


@functools.cache
def compiled(name):
    return jax.jit(build(name).update)


@functools.cache
def plain(name, dtype):
    """The parameters and state after three compiled steps of an entry."""
    return run(build(name), params_of(dtype), gradients(dtype), update=compiled(name))


def params_of(dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "conv": {"kernel": (3, 3, 2, 4)},
        "dense": {"kernel": (4, 5), "bias": (5,)},
        "blocks": {"kernel": (3, 6)},
        "head": {"kernel": (5, 3), "bias": (3,)},
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def gradients(dtype="float32", steps=3):
    return [params_of(dtype, seed) for seed in range(1, steps + 1)]


def run(tx, params, grads, state=None, *, update=None):
    """The parameters and state after a step for each gradient.

    Without a compiled `update`, operations run one by one: each is compiled once for all entries.
    """
    state = tx.init(params) if state is None else state
    update = update or tx.update
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def equal(a, b, rtol=0.0):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert x.dtype == y.dtype, name
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol, err_msg=name)


def without_head(tree):
    return {key: tree[key] for key in ("conv", "dense", "blocks")}


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def finite(tree):
    assert all(np.isfinite(np.asarray(x, np.float64)).all() for x in jax.tree.leaves(tree))


def test_donated_steps_are_traced_once_and_ignore_extra_arguments(name, x64):
    tx, traces = build(name), 0
    assert isinstance(tx, optax.GradientTransformationExtraArgs)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, g):
        nonlocal traces
        traces += 1
        updates, state = tx.update(g, state, params, value=1.0, unknown="x")
        return optax.apply_updates(params, updates), state

    params = params_of("float64")
    state = tx.init(params)
    for g in gradients("float64"):
        old = params
        params, state = step(params, state, g)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert traces == 1
    equal((params, state), plain(name, "float64"), rtol=1e-10)


def test_updates_and_state_keep_structure_shapes_and_dtypes(name, dtype):
    tx, params, (g, *_) = build(name), params_of(dtype), gradients(dtype)
    state = tx.init(params)
    updates, new_state = jax.eval_shape(tx.update, g, state, params)
    assert types(updates) == types(g)
    assert types(new_state) == types(state)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)


RECORDERS = ("record_sphere", "record_gradient")
"""Recorders that return their updates unchanged."""


@pytest.mark.parametrize(
    ("params_dtype", "grads_dtype"),
    [
        ("bfloat16", "float32"),
        ("float32", "bfloat16"),
        ("float16", "bfloat16"),
        ("float32", "float16"),
    ],
)
def test_updates_are_of_the_parameters_dtype(name, params_dtype, grads_dtype):
    tx, params, grads = build(name), params_of(params_dtype), gradients(grads_dtype, 2)
    state = tx.init(params)
    for g in grads:
        updates, after = jax.eval_shape(tx.update, g, state, params)
        if name != "record_effective_learning_rate":
            assert types(updates) == types(g if name in RECORDERS else params)
        assert types(after) == types(state)
        state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), after)


@pytest.mark.parametrize("name", sorted(set(TABLE) - set(RECORDERS)))
def test_narrow_gradients_are_widened_before_anything_is_computed(name):
    """bfloat16 gradients are widened first, before Optax multiplies them by 1 - b1."""
    tx, params, [g] = build(name), params_of(), gradients("bfloat16", 1)
    wide = jax.tree.map(lambda x: x.astype("float32"), g)
    ends = [tx.update(each, tx.init(params), params) for each in (g, wide)]
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_weights_replaced_after_init(name):
    """Weights loaded after `init` train as if they had been there at `init`."""
    loaded = jax.tree.map(lambda x: 6 * x, params_of(seed=7))
    tx = build(name)
    late = run(tx, loaded, gradients(steps=2), tx.init(params_of()))
    equal(late, run(tx, loaded, gradients(steps=2)))


def test_leaves_without_entries(name):
    tx, params, [g] = build(name), params_of(), gradients(steps=1)
    expected, _ = tx.update(g, tx.init(params), params)
    for tree in (params, g):
        tree["memory"] = {"conv": {"kernel": jnp.ones((0, 3))}}
    state = tx.init(params)
    updates, after = tx.update(g, state, params)
    assert types(updates["memory"]) == types(params["memory"])
    assert types(after) == types(state)
    equal({key: updates[key] for key in expected}, expected)


def test_a_state_of_other_shapes_is_refused(name):
    """A state that does not fit the shapes of the parameters is refused, with the leaf's path."""
    tx = build(name)
    state = tx.init(params_of())
    for path in (("conv", "kernel"), ("dense", "kernel"), ("head", "kernel")):
        params, [g] = params_of(), gradients(steps=1)
        for tree in (params, g):
            inner = tree[path[0]]
            inner[path[1]] = jnp.concatenate([inner[path[1]]] * 2, axis=-2)
        if types(jax.eval_shape(tx.init, params)) == types(state):
            jax.eval_shape(tx.update, g, state, params)
            continue
        shape = re.escape(str(params[path[0]][path[1]].shape))
        message = rf"{'/'.join(path)} of shape {shape}: expected state of shape \(.*\), found \("
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(tx.update, g, state, params)


def test_abstract_init(name):
    tx, params = build(name), params_of()
    state = tx.init(params)
    shapes = jax.eval_shape(lambda: params)
    optax_refuses = name == "transport_moments(inject_hyperparams)"
    for init in (lambda x: jax.eval_shape(tx.init, x), *([] if optax_refuses else [tx.init])):
        abstract = init(shapes)
        assert types(abstract) == types(state)
        assert types(jax.eval_shape(tx.update, shapes, abstract, shapes)[1]) == types(state)
    assert all(leaf.size > 0 for leaf in jax.tree.leaves(state))


def test_vmap_of_scan_of_cond(name, x64):
    """Updates work under vmap, scan and cond: two models, three steps, and a skipped step."""
    tx, grads = build(name), gradients("float64")

    def step(carry, inputs):
        params, state = carry
        g, taken = inputs
        skip = lambda: (jax.tree.map(jnp.zeros_like, g), state)  # noqa: E731
        updates, state = jax.lax.cond(taken, lambda: tx.update(g, state, params), skip)
        return (optax.apply_updates(params, updates), state), None

    many = [params_of("float64", seed=seed) for seed in (0, 10)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *many)
    inputs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads, grads[0])
    taken = jnp.array([True, True, True, False])
    loop = lambda params, state: jax.lax.scan(step, (params, state), (inputs, taken))[0]  # noqa: E731
    results = jax.jit(jax.vmap(loop))(stacked, jax.vmap(tx.init)(stacked))
    other = run(tx, many[1], grads, update=compiled(name))
    for i, expected in enumerate((plain(name, "float64"), other)):
        equal(jax.tree.map(lambda x, i=i: x[i], results), expected, rtol=1e-10)


def test_multi_steps_is_the_averaged_step(name, x64):
    """`optax.MultiSteps` over two gradients takes the step of their mean."""
    tx, grads = build(name), gradients("float64")
    apart = params_of("float64", seed=7)
    pairs = [jax.tree.map(lambda g, d, s=s: g + s * d, g, apart) for g in grads for s in (1, -1)]
    newer = "accumulator_dtype" in inspect.signature(optax.MultiSteps).parameters
    wide = {"accumulator_dtype": "float64"} if newer else {}  # older Optax has no choice
    multi = optax.MultiSteps(tx, every_k_schedule=2, **wide)
    params, state = run(multi, params_of("float64"), pairs, update=jax.jit(multi.update))
    equal((params, state.inner_opt_state), plain(name, "float64"), rtol=1e-10)


def test_apply_if_finite_leaves_everything_as_it_was(name):
    params, grads = params_of(), gradients()
    guarded = optax.apply_if_finite(build(name), max_consecutive_errors=5)
    update = jax.jit(guarded.update)
    before = run(guarded, params, grads[:2], update=update)
    expected = run(guarded, before[0], grads[2:], before[1], update=update)
    for bad in (np.nan, np.inf):
        poisoned = jax.tree.map(lambda g, bad=bad: g.at[(0,) * g.ndim].set(bad), grads[2])
        after, state = run(guarded, before[0], [poisoned], before[1], update=update)
        assert state.notfinite_count == 1
        equal((after, state.inner_state), (before[0], before[1].inner_state))
        again = run(guarded, after, grads[2:], state, update=update)
        equal((again[0], again[1].inner_state), (expected[0], expected[1].inner_state))


def test_inject_hyperparams_with_a_schedule(name, x64):
    """An injected schedule of the first number acts like that number at each step."""
    entry, params, grads = TABLE[name], params_of("float64"), gradients("float64")
    number, first = next(iter(entry.numbers.items()), (None, None))
    second = entry.numbers | ({} if number is None else {number: first / 2})
    schedule = {number: optax.piecewise_constant_schedule(first, {2: 0.5})} if number else {}
    tx = optax.inject_hyperparams(entry.factory)(groups=GROUPS, **(entry.numbers | schedule))
    result, state = run(tx, params, grads)
    assert set(state.hyperparams) >= set(entry.numbers)
    assert all(state.hyperparams[key] == value for key, value in second.items())
    expected = run(build(name), params, grads[:2])
    last = build(name) if number is None else entry.factory(groups=GROUPS, **second)
    equal(result, run(last, expected[0], grads[2:], expected[1])[0], rtol=1e-10)


def test_masked(name, x64):
    params, grads = params_of("float64"), gradients("float64")
    mask = {"conv": True, "dense": True, "blocks": {"kernel": True}, "head": False}
    result, _ = run(optax.masked(build(name), mask), params, grads)
    equal(without_head(result), without_head(plain(name, "float64")[0]), rtol=1e-10)
    steps = jax.tree.map(lambda p, *g: p + sum(g), params["head"], *(g["head"] for g in grads))
    equal(result["head"], steps, rtol=1e-10)


TREE = {
    "conv": True,
    "dense": so.per_layer(joint="dense"),
    "blocks": {"kernel": so.per_channel_block(2)},
    "head": None,
}


def test_partition_with_a_tree_of_groups(name, x64):
    params, grads = params_of("float64"), gradients("float64")
    labels = {"conv": "sphere", "dense": "sphere", "blocks": "sphere", "head": "plane"}
    parts = {"sphere": build(name, tree=True), "plane": optax.sgd(0.5)}
    result, _ = run(optax.partition(parts, labels), params, grads)
    equal(without_head(result), without_head(plain(name, "float64")[0]), rtol=1e-10)
    steps = jax.tree.map(
        lambda p, *g: p - 0.5 * sum(g), params["head"], *(g["head"] for g in grads)
    )
    equal(result["head"], steps, rtol=1e-10)


def test_tree_map_params(name):
    tx, params = build(name), params_of()
    state = tx.init(params)
    if "MaskedState" in str(jax.tree.structure(state)):
        # As with any optax.masked, the state of a part contains only some of the parameters.
        mapped = optax.tree_map_params(tx, lambda leaf: leaf + 1, state)
        assert jax.tree.structure(mapped) == jax.tree.structure(state)
        return
    names = jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path), params)
    recorded = name.startswith("record")

    def other(node):
        """Recorded values are not parameters; they come as one node."""
        return jax.tree.map(lambda leaf: "" if recorded or leaf.ndim == 0 else "missed", node)

    mapped = optax.tree_map_params(
        tx,
        lambda leaf, name: name,
        state,
        names,
        transform_non_params=other,
    )
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    found = [name for name in jax.tree.leaves(mapped) if name]
    expected = jax.tree.leaves(names)
    assert found == expected * (len(found) // len(expected))


def test_none_leaves(name):
    params, grads = params_of(), gradients()
    expected, _ = run(build(name), params, grads)
    params, *grads = ({**tree, "frozen": None} for tree in (params, *grads))
    params["conv"]["bias"] = None
    for g in grads:
        g["conv"]["bias"] = None
    result, _ = run(build(name), params, grads)
    assert result.pop("frozen") is None
    assert result["conv"].pop("bias") is None
    equal(result, expected)


@pytest.mark.parametrize(
    "name",
    [
        "project_radial",
        "scale_by_adams",
        "transport_moments(trace)",
        "retract(initial)",
        "record_sphere",
        "record_gradient",
    ],
)
def test_a_missing_gradient_leaves_its_parameter_alone(name):
    tx, params, (g, *_) = build(name), params_of(), gradients()
    g["conv"]["kernel"] = None
    updates, state = jax.jit(tx.update)(g, tx.init(params), params)
    assert updates["conv"]["kernel"] is None
    finite((updates, state))


@pytest.mark.parametrize(
    "name",
    ["project_radial", "scale_by_adams", "retract(initial)", "record_sphere", "record_gradient"],
)
def test_integer_leaf_without_a_group_passes_through(name):
    # The other entries contain Optax transforms, which refuse integer leaves.
    tx, params, (g, *_) = build(name), params_of(), gradients()
    expected, _ = tx.update(g, tx.init(params), params)
    table = np.zeros(3, jax.dtypes.float0)
    params, g = {**params, "table": jnp.arange(3)}, {**g, "table": table}
    updates, _ = tx.update(g, tx.init(params), params)
    assert updates["table"] is table
    equal({key: updates[key] for key in expected}, expected)


# These keep a length, and their steps are relative to it, so a group of length 0 stays 0.
RELATIVE = ("retract(initial)", "retract(geodesic)", "retract(keep)", "normalize_updates")
RELATIVE += ("chain", "hyperball", "adamh", "muonh", "rotational")


@pytest.mark.filterwarnings("ignore:.*expected groups of length above 0")
@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=pytest.mark.slow), "float32"])
def test_zero_norm_groups_and_zero_gradients_stay_finite(name, dtype):
    params, grads = params_of(dtype), gradients(dtype)
    params = {**params, "conv": {"kernel": params["conv"]["kernel"].at[..., 0].set(0)}}
    params["dense"] = jax.tree.map(jnp.zeros_like, params["dense"])
    zeros = [jax.tree.map(jnp.zeros_like, params)] * 2
    # `init` is traced, because Hyperball and the rotational variants refuse such groups if they
    # know the values.
    state = jax.jit(build(name).init)(params)
    still, state = run(build(name), params, zeros, state)
    finite((still, state))
    moved, state = run(build(name), still, grads, state)
    finite((moved, state))
    largest = np.abs(np.asarray(moved["dense"]["kernel"], np.float64)).max()
    assert (largest == 0) == name.startswith(RELATIVE)


# Transformations around Optax's Adam are left out: if its second moment is 0, gradients through it
# are not finite.
DIFFERENTIABLE = [
    "project_radial",
    "scale_by_adams",
    "scale_by_adamsrt",
    "transported_trace",
    "transport_moments(trace)",
    "retract(initial)",
    "retract(geodesic)",
    "record_sphere",
    "record_gradient",
    "scale_by_adamg_star",
    "normalize_updates",
    "normalize_updates(decay)",
    "center_updates",
    "project_if_tangent",
    "adamsrt",  # with L2: its gradient is radial, so only rounding error is left in the moment
]


@pytest.mark.filterwarnings("ignore:.*expected groups of length above 0")
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_through_two_updates_are_finite(name):
    """Gradients through updates are finite for zero weights, zero gradients and zero moments."""
    tx = TABLE[name].factory(groups=so.per_filter(), **TABLE[name].numbers)
    weights, g = (jnp.asarray(np.random.default_rng(i).normal(size=(3, 4)), "f4") for i in (0, 1))
    weights, g = weights.at[:, :2].set(0), g.at[:, 1:3].set(0)
    leaves, treedef = jax.tree.flatten(tx.init(weights))
    floating = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradient(values, g, params):
        kept = dict(enumerate(leaves)) | dict(zip(floating, values, strict=True))
        state = treedef.unflatten(kept.values())
        for _ in range(2):
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
        return sum(leaf.astype("f4").sum() for leaf in jax.tree.leaves((updates, state)))

    finite(jax.jit(gradient)([leaves[i] for i in floating], g, weights))


@pytest.fixture(scope="module")
def restored(tmp_path_factory):
    """The parameters and state of every entry after a step, before and after a checkpoint."""
    path, saved = tmp_path_factory.mktemp("orbax") / "step", {}
    for name in TABLE:
        saved[name] = run(build(name), params_of("bfloat16"), gradients("bfloat16", 1))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, saved)
        checkpointer.wait_until_finished()
        return saved, checkpointer.restore(path, jax.eval_shape(lambda: saved))


def test_orbax_restores_bit_for_bit(name, restored):
    (params, state), found = (each[name] for each in restored)
    assert types(found) == types((params, state))
    like = jax.eval_shape(build(name).init, params)
    assert jax.tree.structure(found[1]) == jax.tree.structure(like)
    equal(found, (params, state))


def test_exports_to_cuda_and_tpu(name):
    tx, params, (g, *_) = build(name), params_of(), gradients()
    state = tx.init(params)
    exported = export.export(jax.jit(tx.update), platforms=["cuda", "tpu"])(g, state, params)
    assert exported.platforms == ("cuda", "tpu")


@pytest.mark.parametrize(
    "name",
    [
        "project_radial",
        "scale_by_adams",
        "scale_by_adamsrt",
        "transported_trace",
        "transport_moments(trace)",
        "retract(initial)",
        "record_sphere",
        "record_gradient",
        "normalize_updates(decay)",
        "center_updates",
        "project_if_tangent",
        "scale_by_adamg_star",
    ],
)
def test_updates_of_other_paths_or_shapes_are_refused(name):
    """Updates with other paths or shapes than the parameters are refused, not paired by number."""
    who, tx, params, (g, *_) = name.split("(")[0], build(name), params_of(), gradients()
    state = tx.init(params)
    less, more = {**g, "head": {"kernel": g["head"]["kernel"]}}, {**g, "late": jnp.ones(3)}
    turned = {**g, "head": {"kernel": g["head"]["kernel"].T, "bias": g["head"]["bias"]}}
    paths = f"^{who}: expected updates with the paths of the parameters, found missing paths "
    with pytest.raises(ValueError, match=paths + r"\['head/bias'\] and unknown paths \[\]"):
        tx.update(less, state, params)
    with pytest.raises(ValueError, match=paths + r"\[\] and unknown paths \['late'\]"):
        tx.update(more, state, params)
    shapes = r"head/kernel of shape \(5, 3\): expected updates of shape \(5, 3\), found \(3, 5\)"
    with pytest.raises(ValueError, match=f"^{who}: {shapes}"):
        tx.update(turned, state, params)


OPTIMIZERS = ["adamsrt", "adamsrtw", "adamsw", "sgdmrt", "adamg", "adamg_star", "adamp", "sgdp"]
OPTIMIZERS += ["hyperball", "adamh", "muonh", "rotational"]
OPTIMIZERS += ["rotational_adamw", "rotational_sgdm", "rotational_lion"]


@pytest.mark.parametrize(
    ("name", "transform"),
    [
        ("project_radial", "project_radial"),
        ("transport_moments(trace)", "transport_moments"),
        ("retract", "retract"),
        ("record_sphere", "record_sphere"),
        ("record_gradient", "record_gradient"),
        ("add_decay_to_initial", "add_decay_to_initial"),
        *((name, name.partition("(")[0]) for name in OPTIMIZERS),
    ],
)
def test_update_without_params_names_the_transform(name, transform):
    entry, params, (g, *_) = TABLE[name], params_of(), gradients()
    needed = inspect.signature(entry.factory).parameters
    numbers = {
        key: value
        for key, value in entry.numbers.items()
        if key != "weight_decay" or needed[key].default is inspect.Parameter.empty
    }
    tx = entry.factory(groups=GROUPS, **numbers)
    message = rf"^{transform} requires the current value of the parameters, but `params` was not"
    with pytest.raises(ValueError, match=message):
        tx.update(g, tx.init(params))


def test_every_public_transformation_is_in_the_table():
    text = " ".join(TABLE)
    for name in so.__all__:
        hints = getattr(getattr(so, name), "__annotations__", {})
        if hints.get("return") is optax.GradientTransformationExtraArgs:
            assert name in text, f"{name} is not in the conformance table"
