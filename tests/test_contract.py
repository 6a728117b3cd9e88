"""What Optax asks of a transformation, asked of every public one.

A new transform or optimizer is added to `TABLE` first.
"""

import functools
import inspect
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
    """A public transformation: its factory, and the numbers given to it."""

    factory: Any
    numbers: dict[str, float]


def transport(inner):
    """A factory of one number, so that hyperparameters can be injected."""

    def factory(decay, groups):
        return so.transport_moments(inner(decay), groups)

    return factory


def project_if_tangent(decay, delta, weight_decay, groups):
    inner = optax.trace(decay)
    return so.project_if_tangent(inner, groups, delta=delta, weight_decay=weight_decay)


def hyperball(decay, learning_rate, groups):
    return so.hyperball(optax.scale_by_adam(decay), learning_rate, groups=groups)


def rotational(decay, learning_rate, average_angle, groups):
    return so.rotational(optax.trace(decay), learning_rate, average_angle, groups=groups)


TABLE = {
    "project_radial": Entry(so.project_radial, {}),
    "scale_by_adams": Entry(so.scale_by_adams, {"b1": 0.8, "b2": 0.9, "eps": 1e-6}),
    "scale_by_adamsrt": Entry(so.scale_by_adamsrt, {"b1": 0.8, "b2": 0.9, "eps": 1e-6}),
    "transported_trace": Entry(so.transported_trace, {"decay": 0.8}),
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
    "record_sphere": Entry(so.record_sphere, {}),
    "record_gradient": Entry(so.record_gradient, {}),
    "adams": Entry(so.adams, {"learning_rate": 0.1, "b1": 0.8, "weight_decay": 0.01}),
    "adamsrt": Entry(so.adamsrt, {"learning_rate": 0.1, "b1": 0.8, "weight_decay": 0.01}),
    "sgdmrt": Entry(so.sgdmrt, {"learning_rate": 0.1, "momentum": 0.8, "dampening": 0.1}),
    "adamg": Entry(so.adamg, {"learning_rate": 0.1, "b1": 0.8}),
    "adamg_star": Entry(so.adamg_star, {"learning_rate": 0.1, "weight_decay": 0.1}),
    "scale_by_adamg_star": Entry(
        so.scale_by_adamg_star, {"learning_rate": 0.1, "weight_decay": 0.1}
    ),
    "normalize_updates": Entry(so.normalize_updates, {}),
    "normalize_updates(decay)": Entry(so.normalize_updates, {"decay": 0.8, "eps": 1e-6}),
    "center_updates": Entry(so.center_updates, {}),
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
    "rotational": Entry(
        rotational,
        {"decay": 0.8, "learning_rate": 0.1, "average_angle": 0.1},
    ),
    "rotational_adamw": Entry(so.rotational_adamw, {"learning_rate": 0.1, "weight_decay": 0.1}),
    "rotational_sgdm": Entry(so.rotational_sgdm, {"learning_rate": 0.1, "weight_decay": 0.1}),
    "rotational_lion": Entry(so.rotational_lion, {"learning_rate": 0.1, "weight_decay": 0.1}),
}


@pytest.fixture(params=TABLE)
def entry(request):
    return TABLE[request.param]


def build(entry, groups=GROUPS):
    return entry.factory(groups=groups, **entry.numbers)


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


def run(tx, params, grads, state=None):
    """Parameters and state after a step for each gradient."""
    state = tx.init(params) if state is None else state
    update = jax.jit(tx.update)
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


def test_extra_args_are_ignored(entry):
    tx, params, (g, *_) = build(entry), params_of(), gradients()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    state = tx.init(params)
    expected = tx.update(g, state, params)
    equal(tx.update(g, state, params, value=1.0, unknown="x"), expected)


def test_one_trace_in_three_steps(entry):
    tx, params = build(entry), params_of()
    traces = 0

    @jax.jit
    def step(g, state, params):
        nonlocal traces
        traces += 1
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for g in gradients():
        params, state = step(g, state, params)
    assert traces == 1


def test_updates_and_state_keep_structure_shapes_and_dtypes(entry, dtype):
    tx, params = build(entry), params_of(dtype)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for g in gradients(dtype):
        updates, new_state = update(g, state, params)
        assert types(updates) == types(g)
        assert types(new_state) == types(state)
        params, state = optax.apply_updates(params, updates), new_state
    finite(state)


@pytest.mark.parametrize(
    "name", ["scale_by_adams", "scale_by_adamsrt", "transported_trace", "adams", "adamsrt", "adamg"]
)
@pytest.mark.parametrize(
    ("params_dtype", "grads_dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_mixed_precision_keeps_the_types_of_state_and_updates(name, params_dtype, grads_dtype):
    tx, params, (g, *_) = build(TABLE[name]), params_of(params_dtype), gradients(grads_dtype)
    state = tx.init(params)
    updates, new_state = jax.jit(tx.update)(g, state, params)
    assert types(new_state) == types(state)
    if "_" in name:
        assert types(updates) == types(g)


def test_abstract_init(entry):
    tx, params = build(entry), params_of()
    state = tx.init(params)
    shapes = jax.eval_shape(lambda: params)
    optax_refuses = entry is TABLE["transport_moments(inject_hyperparams)"]
    for init in (lambda x: jax.eval_shape(tx.init, x), *([] if optax_refuses else [tx.init])):
        abstract = init(shapes)
        assert types(abstract) == types(state)
        assert types(jax.eval_shape(tx.update, shapes, abstract, shapes)[1]) == types(state)
    assert all(leaf.size > 0 for leaf in jax.tree.leaves(state))


def test_scan(entry, x64):
    tx, params, grads = build(entry), params_of("float64"), gradients("float64")

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
    result, _ = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), stacked))()
    equal(result, run(tx, params, grads), rtol=1e-10)


def test_cond(entry, x64):
    tx, params, (g, *_) = build(entry), params_of("float64"), gradients("float64")
    state = tx.init(params)

    def skip():
        return jax.tree.map(jnp.zeros_like, g), state

    maybe = jax.jit(lambda flag: jax.lax.cond(flag, lambda: tx.update(g, state, params), skip))
    equal(maybe(True), tx.update(g, state, params), rtol=1e-10)
    equal(maybe(False), skip())


def test_vmap(entry, x64):
    tx, grads = build(entry), gradients("float64")
    many = [params_of("float64", seed=seed) for seed in (10, 11)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *many)
    state = jax.vmap(tx.init)(stacked)
    update = jax.jit(jax.vmap(tx.update, in_axes=(None, 0, 0)))
    for g in grads:
        updates, state = update(g, state, stacked)
        stacked = optax.apply_updates(stacked, updates)
    for i, params in enumerate(many):
        result = jax.tree.map(lambda x, i=i: x[i], (stacked, state))
        equal(result, run(tx, params, grads), rtol=1e-10)


def test_multi_steps_is_the_averaged_step(entry, x64):
    tx, params, grads = build(entry), params_of("float64"), gradients("float64", steps=4)
    pairs = zip(grads[::2], grads[1::2], strict=True)
    averaged = [jax.tree.map(lambda a, b: (a + b) / 2, *pair) for pair in pairs]
    newer = "accumulator_dtype" in inspect.signature(optax.MultiSteps).parameters
    wide = {"accumulator_dtype": "float64"} if newer else {}  # older: as the parameters
    multi = optax.MultiSteps(tx, every_k_schedule=2, **wide)
    params_multi, state = run(multi, params, grads)
    expected, expected_state = run(tx, params, averaged)
    equal(params_multi, expected, rtol=1e-10)
    equal(state.inner_opt_state, expected_state, rtol=1e-10)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_apply_if_finite_leaves_everything_as_it_was(entry, bad):
    tx, params, grads = build(entry), params_of(), gradients()
    guarded = optax.apply_if_finite(tx, max_consecutive_errors=5)
    params, state = run(guarded, params, grads[:2])
    poisoned = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(bad), grads[2])
    after, bad_state = run(guarded, params, [poisoned], state)
    assert bad_state.notfinite_count == 1
    equal(after, params)
    equal(bad_state.inner_state, state.inner_state)
    equal(run(guarded, after, grads[2:], bad_state)[0], run(guarded, params, grads[2:], state)[0])


def test_inject_hyperparams_is_the_same(entry, x64):
    params, grads = params_of("float64"), gradients("float64")
    injected = optax.inject_hyperparams(entry.factory)(groups=GROUPS, **entry.numbers)
    result, state = run(injected, params, grads)
    expected, _ = run(build(entry), params, grads)
    equal(result, expected, rtol=1e-10)
    assert set(state.hyperparams) >= set(entry.numbers)


@pytest.mark.parametrize("name", [name for name, entry in TABLE.items() if entry.numbers])
def test_inject_hyperparams_with_a_schedule(name, x64):
    entry, params, grads = TABLE[name], params_of("float64"), gradients("float64", steps=2)
    number, first = next(iter(entry.numbers.items()))
    schedule = optax.piecewise_constant_schedule(first, {1: 0.5})
    factory = optax.inject_hyperparams(entry.factory)
    tx = factory(groups=GROUPS, **{**entry.numbers, number: schedule})
    result, state = run(tx, params, grads)
    assert state.hyperparams[number] == first / 2

    expected, inner = params, None
    for value, g in zip([first, first / 2], grads, strict=True):
        tx = entry.factory(groups=GROUPS, **{**entry.numbers, number: value})
        expected, inner = run(tx, expected, [g], inner)
    equal(result, expected, rtol=1e-10)


def test_masked(entry, x64):
    params, grads = params_of("float64"), gradients("float64")
    mask = {"conv": True, "dense": True, "blocks": {"kernel": True}, "head": False}
    result, _ = run(optax.masked(build(entry), mask), params, grads)
    expected, _ = run(build(entry), params, grads)
    equal(without_head(result), without_head(expected), rtol=1e-10)
    plain = jax.tree.map(lambda p, *g: p + sum(g), params["head"], *(g["head"] for g in grads))
    equal(result["head"], plain, rtol=1e-10)


TREE = {
    "conv": True,
    "dense": so.per_layer(joint="dense"),
    "blocks": {"kernel": so.per_channel_block(2)},
    "head": None,
}


@pytest.mark.parametrize("groups", [GROUPS, TREE], ids=["rules", "tree"])
def test_partition(entry, groups, x64):
    params, grads = params_of("float64"), gradients("float64")
    labels = {"conv": "sphere", "dense": "sphere", "blocks": "sphere", "head": "plane"}
    tx = optax.partition({"sphere": build(entry, groups), "plane": optax.sgd(0.5)}, labels)
    result, _ = run(tx, params, grads)
    expected, _ = run(build(entry), params, grads)
    equal(without_head(result), without_head(expected), rtol=1e-10)
    plain, _ = run(optax.sgd(0.5), params["head"], [g["head"] for g in grads])
    equal(result["head"], plain, rtol=1e-10)


def test_tree_map_params(entry):
    tx, params = build(entry), params_of()
    state = tx.init(params)
    names = jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path), params)
    recorded = isinstance(state, (so.RecordSphereState, so.RecordGradientState))

    def other(node):
        """A recorder's values are none of the parameters', and come as one node."""
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


def test_none_leaves(entry):
    params, grads = params_of(), gradients()
    expected, _ = run(build(entry), params, grads)
    params, *grads = ({**tree, "frozen": None} for tree in (params, *grads))
    params["conv"]["bias"] = None
    for g in grads:
        g["conv"]["bias"] = None
    result, _ = run(build(entry), params, grads)
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
    tx, params, (g, *_) = build(TABLE[name]), params_of(), gradients()
    g["conv"]["kernel"] = None
    updates, state = jax.jit(tx.update)(g, tx.init(params), params)
    assert updates["conv"]["kernel"] is None
    finite((updates, state))


@pytest.mark.parametrize(
    "name",
    ["project_radial", "scale_by_adams", "retract(initial)", "record_sphere", "record_gradient"],
)
def test_integer_leaf_without_a_group_passes_through(name):
    # The others are made of optax transforms, which refuse integer leaves.
    tx, params, (g, *_) = build(TABLE[name]), params_of(), gradients()
    expected, _ = tx.update(g, tx.init(params), params)
    table = np.zeros(3, jax.dtypes.float0)
    params, g = {**params, "table": jnp.arange(3)}, {**g, "table": table}
    updates, _ = tx.update(g, tx.init(params), params)
    assert updates["table"] is table
    equal({key: updates[key] for key in expected}, expected)


def test_zero_norm_groups_and_zero_gradients_stay_finite(entry, dtype):
    params, grads = params_of(dtype), gradients(dtype)
    params = {**params, "conv": {"kernel": params["conv"]["kernel"].at[..., 0].set(0)}}
    params["dense"] = jax.tree.map(jnp.zeros_like, params["dense"])
    zeros = [jax.tree.map(jnp.zeros_like, params)] * 2
    still, state = run(build(entry), params, zeros)
    finite((still, state))
    moved, state = run(build(entry), still, grads, state)
    finite((moved, state))
    assert np.abs(np.asarray(moved["dense"]["kernel"], np.float64)).max() > 0


# Of what is around Optax's Adam gradients are not finite where its second moment is 0.
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
    "normalize_updates(decay)",
    "center_updates",
    "project_if_tangent",
    "adamsrt",  # with L2, whose gradient is radial, and leaves a moment of rounding's size
]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_through_two_updates_are_finite(name):
    """For groups with no gradient and no weights, neither, or both, and moments of zero."""
    tx = build(TABLE[name], so.per_filter())
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


def test_donated_buffers(entry, x64):
    tx, params, grads = build(entry), params_of("float64"), gradients("float64")
    expected = run(tx, params, grads)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    params = params_of("float64")
    state = tx.init(params)
    for g in grads:
        old = params
        params, state = step(params, state, g)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    equal((params, state), expected, rtol=1e-10)


def test_orbax_restores_bit_for_bit(entry, tmp_path):
    dtype = "bfloat16"
    tx, grads = build(entry), gradients(dtype)
    params, state = run(tx, params_of(dtype), grads)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", (params, state))
        checkpointer.wait_until_finished()
        target = jax.eval_shape(lambda: (params, tx.init(params)))
        restored = checkpointer.restore(tmp_path / "step", target)
    assert types(restored) == types((params, state))
    equal(restored, (params, state))
    equal(run(tx, *[restored[0], grads, restored[1]]), run(tx, params, grads, state))


def test_exports_to_cuda_and_tpu(entry):
    tx, params, (g, *_) = build(entry), params_of(), gradients()
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
    """Pairing leaves by number would give one's gradient to another's moment."""
    who, tx, params, (g, *_) = name.split("(")[0], build(TABLE[name]), params_of(), gradients()
    state = tx.init(params)
    less, more = {**g, "head": {"kernel": g["head"]["kernel"]}}, {**g, "late": jnp.ones(3)}
    turned = {**g, "head": {"kernel": g["head"]["kernel"].T, "bias": g["head"]["bias"]}}
    paths = f"^{who}: expected updates with the paths of the parameters, found none for "
    with pytest.raises(ValueError, match=paths + r"\['head/bias'\], and some for \[\]"):
        tx.update(less, state, params)
    with pytest.raises(ValueError, match=paths + r"\[\], and some for \['late'\]"):
        tx.update(more, state, params)
    shapes = r"head/kernel of shape \(5, 3\): expected updates of shape \(5, 3\), found \(3, 5\)"
    with pytest.raises(ValueError, match=f"^{who}: {shapes}"):
        tx.update(turned, state, params)


@pytest.mark.parametrize(
    ("name", "transform"),
    [
        ("project_radial", "project_radial"),
        ("transport_moments(trace)", "transport_moments"),
        ("retract", "retract"),
        ("record_sphere", "record_sphere"),
        ("record_gradient", "record_gradient"),
        ("adamsrt", "scale_by_adamsrt"),
        ("sgdmrt", "transported_trace"),
        ("adamg", "transport_moments"),
    ],
)
def test_update_without_params_names_the_transform(name, transform):
    entry, params, (g, *_) = TABLE[name], params_of(), gradients()
    numbers = {key: value for key, value in entry.numbers.items() if key != "weight_decay"}
    tx = entry.factory(groups=GROUPS, **numbers)
    message = rf"{transform} requires the current value of the parameters, but `params` was not"
    with pytest.raises(ValueError, match=message):
        tx.update(g, tx.init(params))


def test_every_public_transformation_is_in_the_table():
    text = " ".join(TABLE)
    for name in so.__all__:
        hints = getattr(getattr(so, name), "__annotations__", {})
        if hints.get("return") is optax.GradientTransformationExtraArgs:
            assert name in text, f"{name} is not in the conformance table"
