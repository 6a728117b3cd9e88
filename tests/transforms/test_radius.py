"""Radii: placing weights on spheres, remembering radii, and custom surfaces."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from layouts import CASES, JOINT, tree_of
from trajectory import run

import spherical_optax as so

PARAMS = {"conv": {"kernel": (3, 3, 2, 4)}, "fc": {"kernel": (4, 5), "bias": (5,)}, "gain": (3,)}
GROUPS = so.groups_by_path(
    {"conv/kernel": so.per_filter(), "fc/(kernel|bias)": so.per_layer(joint="fc")}
)


def lengths(params, groups):
    metrics = so.sphere_metrics(params, params, groups)
    return {path: np.asarray(each.radius_after) for path, each in metrics.items()}


@pytest.mark.parametrize("case", sorted(set(CASES) - {"no group, one entry"}))
def test_placed_groups_have_the_radius_and_their_direction(case, x64):
    shapes, groups = CASES[case]
    params = tree_of(shapes, 0)
    placed = so.place_on_sphere(params, groups, 3.0)
    for path, length in lengths(placed, groups).items():
        np.testing.assert_allclose(length, 3.0, rtol=1e-12, err_msg=path)
    for each in so.sphere_metrics(params, placed, groups).values():
        np.testing.assert_allclose(each.step_angle, 0, atol=1e-7)


@pytest.mark.parametrize(
    ("radius", "conv", "fc"),
    [
        (2.0, 2.0, 2.0),
        ("sqrt(d)", np.sqrt(18), 5.0),
        ({"conv": 2.0, "fc/(kernel|bias)": 3.0}, 2.0, 3.0),
        ({"kernel|bias": "sqrt(d)"}, np.sqrt(18), 5.0),
        ({"conv": 2.0, "": "sqrt(d)"}, 2.0, 5.0),
    ],
)
def test_forms_of_the_radius(radius, conv, fc, x64):
    params, grads = tree_of(PARAMS, 0), [tree_of(PARAMS, seed) for seed in (1, 2)]
    placed = so.place_on_sphere(params, GROUPS, radius)
    inner = optax.scale_by_adam()
    ends = [
        placed,
        run(optax.chain(optax.sgd(0.1), so.retract(GROUPS, radius)), params, grads)[-1],
        run(
            so.hyperball(inner, 0.1, groups=GROUPS, other=optax.adam(0.1), radius=radius),
            params,
            grads,
        )[-1],
    ]
    for end in ends:
        found = lengths(end, GROUPS)
        np.testing.assert_allclose(found["conv/kernel"], conv, rtol=1e-12)
        np.testing.assert_allclose(found["fc/kernel"], fc, rtol=1e-12)
    np.testing.assert_array_equal(placed["gain"], params["gain"])


def test_placing_keeps_dtypes_boxes_and_tracing():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    state = nnx.state(model, nnx.Param)
    groups = so.groups_by_path({"kernel": so.per_filter()})
    placed = jax.jit(lambda state: so.place_on_sphere(state, groups, 1.0))(state)
    nnx.update(model, placed)
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    assert model.kernel.dtype == jnp.bfloat16
    np.testing.assert_allclose(so.geometry.norm(model.kernel[...], so.per_filter()), 1, rtol=1e-2)


def test_hyperball_at_its_own_radius_is_that_at_the_initial_one(x64):
    """A given radius that equals the initial one gives the same trajectory."""
    params, grads = tree_of(PARAMS, 0), [tree_of(PARAMS, seed) for seed in (1, 2, 3)]
    params = so.place_on_sphere(params, GROUPS, 2.0)
    paths = [
        run(
            so.hyperball(
                optax.scale_by_adam(), 0.1, groups=GROUPS, other=optax.adam(0.1), **radius
            ),
            params,
            grads,
        )[-1]
        for radius in ({}, {"radius": 2.0}, {"radius": {"": 2.0}})
    ]
    for path in paths[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), path, paths[0])


def test_keep_lies_between_a_sphere_and_a_free_step(x64):
    params, g = tree_of(PARAMS, 0), tree_of(PARAMS, 1)
    ends = [
        lengths(run(optax.chain(optax.sgd(0.1), tx), params, [g, g])[-1], GROUPS)
        for tx in (
            so.retract(GROUPS),
            so.retract(GROUPS, keep=0.0),
            so.retract(GROUPS, keep=1.0),
            optax.identity(),
        )
    ]
    for path in ends[0]:
        np.testing.assert_allclose(ends[1][path], ends[0][path], rtol=1e-12)
        np.testing.assert_allclose(ends[2][path], ends[3][path], rtol=1e-12)


@pytest.mark.parametrize("method", ["normalize", "geodesic"])
def test_the_geometry_as_a_function_is_the_method(method, x64):
    """A function as `method` gets joint leaves as a dictionary by path, and equals the method."""
    params, grads = tree_of(PARAMS, 0), [tree_of(PARAMS, seed) for seed in (1, 2)]
    paths = []

    def end(x, v, group):
        paths.extend(x if isinstance(x, dict) else ())
        return so.geometry.retract(x, v, group, 2.0, method)

    params = so.place_on_sphere(params, GROUPS, 2.0)
    ends = [
        run(optax.chain(optax.sgd(0.1), tx), params, grads)[-1]
        for tx in (so.retract(GROUPS, 2.0, method), so.retract(GROUPS, method=end))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), *ends)
    assert paths == ["fc/bias", "fc/kernel"]


def test_split_radial_follows_a_reparametrization(x64):
    """It equals SGD on the length and, separately, SGD on the direction."""
    x, g = np.array([3.0, 4.0]), np.array([1.0, -2.0])
    tx = so.split_radial(optax.sgd(0.1), optax.sgd(0.3), so.per_layer())
    end = run(tx, jnp.asarray(x), [jnp.asarray(g)])[-1]
    u = x / 5
    y = x - 0.1 * (g - (g @ u) * u)
    np.testing.assert_allclose(end, (5 - 0.3 * (g @ u)) * y / np.linalg.norm(y), rtol=1e-12)


def test_split_radial_leaves_a_group_without_direction_and_one_without_gradient(x64):
    params = {"zero": jnp.zeros(3), "still": jnp.ones(3), "rest": jnp.ones(3)}
    groups = so.groups_by_path({"zero|still": so.per_layer()})
    tx = so.split_radial(optax.sgd(0.1), optax.adam(0.1), groups)
    g = {"zero": jnp.ones(3), "still": None, "rest": jnp.ones(3)}
    state = tx.init(params)
    updates, state = tx.update(g, state, params)
    assert updates["still"] is None
    np.testing.assert_allclose(updates["zero"], -0.1)
    np.testing.assert_allclose(updates["rest"], -0.1)
    np.testing.assert_allclose(state.lengths["still"], np.sqrt(3))


def test_split_radial_does_not_turn_a_group_inside_out(x64):
    tx = so.split_radial(optax.sgd(0.1), optax.sgd(100.0), so.per_layer())
    end = run(tx, jnp.array([2.0, 0.0]), [jnp.array([1.0, 0.0])])[-1]
    np.testing.assert_allclose(end, [2 / 128, 0.0])


def test_rules_and_radii_that_do_not_fit_are_named():
    params = tree_of(PARAMS, 0, "float32")
    place = lambda radius: so.place_on_sphere(params, GROUPS, radius)  # noqa: E731
    for radius, error, message in (
        (0.0, ValueError, r"expected radius in \(0, inf\), found 0.0"),
        ("initial", ValueError, r"expected radius as a number or \"sqrt\(d\)\", found 'initial'"),
        ({}, ValueError, "expected at least one rule for radius"),
        ({"[": 1.0}, ValueError, "expected regular expressions as keys of radius, found '\\['"),
        ({"": -1.0}, ValueError, r"expected radius in \(0, inf\), found -1.0"),
        ({"": {"": 1.0}}, TypeError, "expected a radius for rule ''"),
        ({"conv": 1.0}, ValueError, r"expected a rule for the radius of fc/bias, found none among"),
        ({"": 1.0, "conv": 2.0}, ValueError, r"found \['conv'\], which apply to none of"),
        ({"kernel": 1.0, "": 2.0}, ValueError, "one radius for the joint label 'fc', found 2.0"),
    ):
        with pytest.raises(error, match=f"place_on_sphere: .*{message}"):
            place(radius)
    with pytest.raises(ValueError, match="retract: expected a rule for the radius of fc/bias"):
        so.retract(GROUPS, {"conv": 1.0}).init(params)
    zero = params | {"conv": {"kernel": jnp.zeros((3, 3, 2, 4))}}
    with pytest.raises(
        ValueError, match=r"conv/kernel: .* found 4 of 4 of norm 0, NaN or infinite"
    ):
        so.place_on_sphere(zero, GROUPS, 1.0)


def test_what_does_not_go_together_is_named():
    groups, own = so.per_layer(), lambda x, v, group: x
    for kwargs, message in (
        ({"radius": 2.0, "keep": 0.5}, 'expected radius="initial" with keep, found 2.0'),
        ({"keep": 1.5}, r"expected keep in \[0, 1\], found 1.5"),
        ({"method": own, "radius": 2.0}, "expected no radius with a function as method"),
        ({"method": own, "keep": 0.5}, "expected no keep with a function as method"),
    ):
        with pytest.raises(ValueError, match=message):
            so.retract(groups, **kwargs)
    short = so.retract(groups, method=lambda x, v, group: x[:1])
    with pytest.raises(ValueError, match=r"expected the function to return an array of this shape"):
        short.update(jnp.ones(3), short.init(jnp.ones(3)), jnp.ones(3))
    for name, parts in (("tangent", (0.1, optax.sgd(1.0))), ("radial", (optax.sgd(1.0), None))):
        with pytest.raises(TypeError, match=re.escape(f"gradient transformation as {name}")):
            so.split_radial(*parts, groups)


def test_joint_leaves_are_placed_together(x64):
    params = tree_of({"kernel": (4, 5), "bias": (5,)}, 0)
    placed = so.place_on_sphere(params, JOINT, 2.0)
    total = sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(placed))
    np.testing.assert_allclose(total, 4.0, rtol=1e-12)


REMEMBER = {
    "retract": lambda: optax.chain(optax.sgd(0.05), so.retract(GROUPS)),
    "retract(geodesic)": lambda: optax.chain(
        optax.sgd(0.05), so.retract(GROUPS, method="geodesic")
    ),
    "hyperball": lambda: so.hyperball(
        optax.scale_by_adam(), 0.05, groups=GROUPS, other=optax.adam(0.05)
    ),
    "adamh": lambda: so.adamh(0.05, groups=GROUPS, other=optax.adam(0.05)),
    "rotational": lambda: so.rotational(
        optax.trace(0.9), 0.05, groups=GROUPS, other=optax.sgd(0.05)
    ),
    "rotational_adamw": lambda: so.rotational_adamw(0.05, groups=GROUPS),
    "rotational_lion": lambda: so.rotational_lion(0.05, groups=GROUPS),
    "rotational_sgdm": lambda: so.rotational_sgdm(0.05, groups=GROUPS, weight_decay=0.1),
    "split_radial": lambda: so.split_radial(optax.sgd(0.05), optax.sgd(0.05), GROUPS),
}


@pytest.mark.parametrize("factor", [1.01, 6.0, 1 / 50])
@pytest.mark.parametrize("name", REMEMBER)
def test_weights_loaded_after_init_train_as_if_loaded_before(name, factor, x64):
    random, loaded = tree_of(PARAMS, 0), jax.tree.map(lambda x: factor * x, tree_of(PARAMS, 1))
    grads, tx = [tree_of(PARAMS, seed) for seed in (2, 3)], REMEMBER[name]()
    late = run(tx, loaded, grads, tx.init(random))[-1]
    jax.tree.map(np.testing.assert_array_equal, late, run(tx, loaded, grads)[-1])


@pytest.mark.parametrize("name", sorted(set(REMEMBER) - {"split_radial"}))
def test_groups_replaced_in_training_keep_their_length(name, x64):
    """Groups that are rescaled or set to 0 during training keep their new length."""
    tx, params, g = REMEMBER[name](), tree_of(PARAMS, 0), tree_of(PARAMS, 1)
    state = tx.init(params)
    updates, state = tx.update(g, state, params)
    params = optax.apply_updates(params, updates)
    factor = np.array([0.3, 3.0, 0.0, 1.0])
    params["conv"]["kernel"] *= factor
    cut = lengths(params, GROUPS)["conv/kernel"]
    for _ in range(3):
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(lengths(params, GROUPS)["conv/kernel"], cut, rtol=1e-12)
    assert lengths(params, GROUPS)["conv/kernel"][2] == 0


def test_what_is_between_half_and_twice_is_drift_and_can_be_forgotten(x64):
    tx, params = so.retract(GROUPS), tree_of(PARAMS, 0)
    still = jax.tree.map(jnp.zeros_like, params)
    state = tx.update(still, tx.init(params), params)[1]
    before = lengths(params, GROUPS)
    shrunk = jax.tree.map(lambda x: 0.6 * x, params)

    def after(state):
        return lengths(optax.apply_updates(shrunk, tx.update(still, state, shrunk)[0]), GROUPS)

    for path, length in before.items():
        np.testing.assert_allclose(after(state)[path], length, rtol=1e-12)
        np.testing.assert_allclose(after(so.forget_radii(state))[path], 0.6 * length, rtol=1e-12)
    part = after(so.forget_radii({"inner": (state,)}, "conv")["inner"][0])
    np.testing.assert_allclose(part["conv/kernel"], 0.6 * before["conv/kernel"], rtol=1e-12)
    np.testing.assert_allclose(part["fc/kernel"], before["fc/kernel"], rtol=1e-12)
    with pytest.raises(ValueError, match=r"that 'decoder' matches, found lengths at \['conv/kern"):
        so.forget_radii(state, "decoder")


WRAPPED = {
    "alone": lambda tx: tx,
    "lookahead": lambda tx: optax.lookahead(tx, 5, 0.5),
    "shrink and perturb": lambda tx: optax.chain(tx, optax.add_decayed_weights(-0.01)),
    "a scale behind": lambda tx: optax.chain(tx, optax.scale(0.5)),
}


@pytest.mark.parametrize(
    ("wrapper", "dtype", "entries", "steps", "tolerance"),
    [
        ("alone", "float32", 16, 40_000, 3e-3),
        ("alone", "bfloat16", 64, 8000, 1e-2),
        ("lookahead", "float32", 16, 10_000, 0.06),  # averages end inside the sphere
        ("shrink and perturb", "float32", 16, 10_000, 0.011),
        ("a scale behind", "float32", 16, 10_000, 3e-3),
    ],
)
def test_lengths_do_not_drift(wrapper, dtype, entries, steps, tolerance):
    groups = so.per_filter()
    tx = WRAPPED[wrapper](so.hyperball(optax.identity(), 0.01, groups=groups))
    x = jax.random.normal(jax.random.key(0), (entries, 4)).astype(dtype)
    params = optax.LookaheadParams.init_synced(x) if wrapper == "lookahead" else x

    @jax.jit
    def train(params, state):
        def body(carry, key):
            params, state = carry
            g = jax.random.normal(key, (entries, 4)).astype(dtype)
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(1), steps)
        return jax.lax.scan(body, (params, state), keys)[0][0]

    end = train(params, tx.init(params))
    end = end.fast if wrapper == "lookahead" else end
    np.testing.assert_allclose(
        so.geometry.norm(end, groups), so.geometry.norm(x, groups), rtol=tolerance
    )


def finish(init, params):
    """The state, after all host callbacks of `init` have run."""
    state = init(params)
    jax.effects_barrier()
    return state


@pytest.mark.parametrize("radius", [2.0, {"": 2.0}, "initial"])
def test_a_group_of_length_zero_stays_so_and_is_not_silent(radius):
    tx = so.hyperball(optax.scale_by_adam(), 0.1, groups=so.per_filter(), radius=radius)
    params = {"out": jnp.ones((3, 2)).at[:, 1].set(0)}
    with pytest.raises(ValueError, match="out: expected groups of norm above 0, found 1 of 2"):
        tx.init(params)
    with pytest.warns(UserWarning, match=r"found 0 in out \(1 of 2\)") as seen:
        state = finish(jax.jit(tx.init), params)
    assert len(seen) == 1
    for seed in range(5):
        g = {"out": jax.random.normal(jax.random.key(seed), (3, 2))}
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["out"][:, 1], 0)


def in_a_mesh(kind):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(kind,))
    return lambda init: jax.shard_map(init, mesh=mesh, in_specs=P(), out_specs=P())


TRACED = {
    "jit": jax.jit,
    "vmap": lambda init: jax.vmap(init),
    "scan": lambda init: lambda x: jax.lax.scan(lambda c, x: (c, init(x)), 0, x)[1],
    "shard_map": lambda init: jax.jit(in_a_mesh(AxisType.Auto)(init)),
}


@pytest.mark.parametrize("how", TRACED)
def test_a_traced_init_is_not_silent(how):
    tx = so.adamh(0.1, groups=so.per_filter())
    params = {"out": jnp.ones((3, 2)).at[:, 1].set(0)}
    if how in ("vmap", "scan"):
        params = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    with pytest.warns(UserWarning, match=r"found 0 in out \(1 of 2\)\. .* never move"):
        finish(TRACED[how](tx.init), params)


def test_an_update_can_be_exported_and_an_init_that_warns_cannot():
    tx = so.adamh(0.1, groups=so.per_filter())
    params = {"out": jnp.ones((3, 2))}
    exported = export.export(jax.jit(tx.update))(params, tx.init(params), params)
    updates, _ = exported.call(params, tx.init(params), params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        updates,
        tx.update(params, tx.init(params), params)[0],
    )
    with pytest.raises(NotImplementedError, match="host_callbacks"):
        export.export(jax.jit(tx.init))(params).serialize()


def test_a_padded_state_takes_the_lengths_of_new_rows(x64):
    """New rows in a state padded with zeros take their own lengths, or the radius of a rule."""
    rows, old, new = so.RadialGroup((0,)), tree_of({"w": (5, 4)}, 0), tree_of({"w": (8, 4)}, 1)
    grads = tree_of({"w": (8, 4)}, 2)
    for radius, expected in (("initial", so.geometry.norm(new["w"], rows)), ({"w": 3.0}, 3.0)):
        tx = so.hyperball(optax.scale_by_adam(), 0.1, groups=rows, radius=radius)
        state = tx.init(old)
        padded = jax.tree.map(
            lambda a, b: jnp.zeros(b.shape, b.dtype).at[: a.shape[0]].set(a) if a.ndim else a,
            state,
            jax.eval_shape(tx.init, new),
        )
        updates, _ = tx.update(grads, padded, new)
        end = optax.apply_updates(new, updates)
        np.testing.assert_allclose(so.geometry.norm(end["w"], rows), expected, rtol=1e-12)
