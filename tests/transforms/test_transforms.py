"""Each transform against laws and hand-made references."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import parallel_transport, tangent

import spherical_optax as so
from spherical_optax import geometry

LAYER, FILTER = so.per_layer(), so.per_filter()


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def step(tx, grads, state, params):
    updates, state = jax.jit(tx.update)(grads, state, params)
    return optax.apply_updates(params, updates), state


# --- project_radial ---------------------------------------------------------------------


def test_projected_updates_are_tangent_jointly(x64):
    groups = {"kernel": so.per_layer(joint="a"), "bias": so.per_layer(joint="a"), "rest": None}
    params = {"kernel": normal(0, (3, 4)), "bias": normal(1, (4,)), "rest": normal(2, (2,))}
    grads = jax.tree.map(lambda p: p + 1.0, params)
    tx = so.project_radial(groups)
    updates, _ = tx.update(grads, tx.init(params), params)
    joint = sum(jnp.vdot(updates[key], params[key]) for key in ("kernel", "bias"))
    assert abs(joint) < 1e-13
    assert abs(jnp.vdot(updates["bias"], params["bias"])) > 1e-3  # only the sum vanishes
    np.testing.assert_array_equal(updates["rest"], grads["rest"])


# --- transport_moments ------------------------------------------------------------------


def test_momentum_stays_tangent_at_every_step(x64):
    tx = optax.chain(
        so.transport_moments(optax.trace(0.9), groups=FILTER), optax.scale_by_learning_rate(0.5)
    )
    params, state = normal(0, (5, 3)), tx.init(normal(0, (5, 3)))
    for seed in range(30):
        start = params
        grads = normal(seed + 1, (5, 3)) + 0.3 * start  # with a radial part, as L2 gives
        params, state = step(tx, grads, state, start)
        trace = optax.tree.get(state, "trace")
        radial = geometry.inner(trace, start, FILTER) / geometry.norm(start, FILTER)
        assert np.all(np.abs(radial) <= 1e-12 * geometry.norm(trace, FILTER))


def test_the_carried_momentum_is_rescaled_parallel_transport(x64):
    tx = so.transport_moments(optax.trace(0.5), groups=LAYER)
    x, g = normal(0, (6,)), normal(1, (6,))
    _, state = tx.update(g, tx.init(x), x)
    y = 1.7 * (x - 0.4 * tangent(g, x))
    carried, _ = tx.update(jnp.zeros(6), state, y)
    ratio = np.linalg.norm(x) / np.linalg.norm(y)
    expected = 0.5 * ratio * parallel_transport(tangent(g, x), x, y)
    np.testing.assert_allclose(carried, expected, rtol=1e-12)


def test_second_moments_are_rescaled(x64):
    x, g = normal(0, (4, 3)), normal(1, (4, 3))
    for inner in (optax.scale_by_adam(b2=0.9), so.scale_by_adams(b2=0.9, groups=FILTER)):
        tx = so.transport_moments(inner, groups=FILTER)
        _, state = tx.update(g, tx.init(x), x)
        before = optax.tree.get(state, "nu")
        _, state = tx.update(jnp.zeros_like(g), state, 2 * x)
        np.testing.assert_allclose(optax.tree.get(state, "nu"), 0.9 * before / 4, rtol=1e-12)


def test_without_rescaling_lengths_are_kept(x64):
    tx = so.transport_moments(optax.scale_by_adam(b1=0.5), groups=FILTER, rescale=False)
    x, g = normal(0, (4, 3)), normal(1, (4, 3))
    _, state = tx.update(geometry.project(g, x, FILTER), tx.init(x), x)
    mu, nu = optax.tree.get(state, "mu"), optax.tree.get(state, "nu")
    _, state = tx.update(jnp.zeros_like(g), state, 3 * x + g)
    after = geometry.norm(optax.tree.get(state, "mu"), FILTER)
    np.testing.assert_allclose(after, 0.5 * geometry.norm(mu, FILTER), rtol=1e-12)
    np.testing.assert_allclose(optax.tree.get(state, "nu"), 0.999 * nu, rtol=1e-12)


def test_joint_leaves_move_as_one_vector(x64):
    """A kernel and a bias with one label train like the matrix of their stacked rows."""
    kernel, bias = normal(0, (3, 4)), normal(1, (4,))
    for group in (so.per_layer, functools.partial(so.per_channel_block, 2)):
        joint = so.adamsrt(0.1, groups=group(joint="dense"), weight_decay=0.1)
        whole = so.adamsrt(0.1, groups=group(), weight_decay=0.1)
        params, stacked = {"kernel": kernel, "bias": bias}, jnp.vstack([kernel, bias])
        state, stacked_state = joint.init(params), whole.init(stacked)
        for seed in range(5):
            grads = normal(seed, (4, 4))
            params, state = step(joint, {"kernel": grads[:3], "bias": grads[3]}, state, params)
            stacked, stacked_state = step(whole, grads, stacked_state, stacked)
        result = jnp.vstack([params["kernel"], params["bias"]])
        np.testing.assert_allclose(result, stacked, rtol=1e-12)


def test_blocks_move_as_separate_layers(x64):
    kernel = normal(0, (3, 6))
    blocks = so.adamsrt(0.1, groups=so.per_channel_block(2))
    layers = so.adamsrt(0.1, groups=LAYER)
    params, parts = kernel, {"a": kernel[:, :3], "b": kernel[:, 3:]}
    state, parts_state = blocks.init(params), layers.init(parts)
    for seed in range(5):
        grads = normal(seed, (3, 6))
        params, state = step(blocks, grads, state, params)
        parts, parts_state = step(
            layers, {"a": grads[:, :3], "b": grads[:, 3:]}, parts_state, parts
        )
    np.testing.assert_allclose(params, jnp.hstack([parts["a"], parts["b"]]), rtol=1e-12)


def test_moments_are_found_by_path_not_by_name_alone(x64):
    """Moments are found also if parameters are called mu or nu."""
    groups = {"mu": {"kernel": FILTER}, "nu": FILTER}
    params = {"mu": {"kernel": normal(0, (4, 3))}, "nu": normal(1, (4, 3))}
    renamed = {"a": {"kernel": params["mu"]["kernel"]}, "b": params["nu"]}
    tx = so.transport_moments(optax.scale_by_adam(), groups)
    other = so.transport_moments(optax.scale_by_adam(), {"a": FILTER, "b": FILTER})
    state, other_state = tx.init(params), other.init(renamed)
    for seed in range(3):
        g, h = normal(seed, (4, 3)), normal(seed + 9, (4, 3))
        params, state = step(tx, {"mu": {"kernel": g}, "nu": h}, state, params)
        renamed, other_state = step(other, {"a": {"kernel": g}, "b": h}, other_state, renamed)
    np.testing.assert_array_equal(params["mu"]["kernel"], renamed["a"]["kernel"])
    np.testing.assert_array_equal(params["nu"], renamed["b"])


def test_a_parameter_called_mu_does_not_pass_for_a_first_moment(x64):
    """`nu/mu/kernel` is a second moment, even if `kernel` is also a parameter."""
    groups = so.groups_by_path({"kernel": FILTER})
    params = {"mu": {"kernel": normal(0, (4, 3))}, "kernel": normal(1, (4, 3))}
    renamed = {"a": params["mu"], "kernel": params["kernel"]}
    results = []
    for tree in (params, renamed):
        tx = so.transport_moments(optax.scale_by_adam(), groups)
        state = tx.init(tree)
        for seed in range(3):
            tree, state = step(
                tx, jax.tree.map(lambda p, s=seed: normal(s, p.shape), tree), state, tree
            )
        results.append(jax.tree.leaves(optax.tree.get(state, "nu")))
        assert min(leaf.min() for leaf in results[-1]) >= 0
    np.testing.assert_array_equal(results[0][1], results[1][0])


def test_only_part_of_the_tree_may_have_moments(x64):
    inner = optax.masked(optax.trace(0.5), {"a": True, "b": False})
    tx = so.transport_moments(inner, groups={"a": FILTER, "b": FILTER})
    alone = so.transport_moments(optax.trace(0.5), groups=FILTER)
    params = {"a": normal(0, (3, 2)), "b": normal(1, (3, 2))}
    state, alone_state = tx.init(params), alone.init(params["a"])
    for seed in range(3):
        g = normal(seed, (3, 2))
        updates, state = tx.update({"a": g, "b": g}, state, params)
        expected, alone_state = alone.update(g, alone_state, params["a"])
        np.testing.assert_array_equal(updates["a"], expected)
        np.testing.assert_array_equal(updates["b"], g)
        params = optax.apply_updates(params, updates)


def test_a_group_that_leaves_zero_becomes_ordinary(x64):
    """At norm zero the moments are not transported, nor on the first step away from it."""
    tx = so.transport_moments(optax.trace(0.5), groups=LAYER)
    zero, g = jnp.zeros(3), normal(0, (3,))
    _, state = tx.update(g, tx.init(zero), zero)
    updates, state = tx.update(jnp.zeros(3), state, -0.1 * g)
    np.testing.assert_allclose(updates, 0.5 * g)
    np.testing.assert_allclose(optax.tree.get(state, "trace"), 0, atol=1e-15)  # all radial
    assert optax.tree.get(state, "radius") == pytest.approx(0.1 * np.linalg.norm(g))


@pytest.mark.filterwarnings("ignore:.*entry by entry")
def test_single_entries_have_no_tangent_space(x64):
    """With groups of one entry AdamSRT is Adam, as in the published code."""
    x = normal(0, (4, 3))
    ours = so.adamsrt(0.1, groups=so.RadialGroup(index_axes=(0, 1)))
    params, state = x, ours.init(x)
    adam_params, adam_state = x, optax.adam(0.1).init(x)
    for seed in range(5):
        params, state = step(ours, normal(seed, (4, 3)), state, params)
        adam_params, adam_state = step(
            optax.adam(0.1), normal(seed, (4, 3)), adam_state, adam_params
        )
    np.testing.assert_allclose(params, adam_params, rtol=1e-12)


def test_no_copy_of_the_parameters_is_kept():
    tx = so.transport_moments(optax.trace(0.9), groups=FILTER)
    state = tx.init({"kernel": jnp.ones((50, 4)), "bias": None})
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state))
    assert sizes == [4, 200]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: optax.scale(-1.0),
            ValueError,
            r"\['mu', 'nu', 'trace'\] in the inner .*found no moments",
        ),
        (lambda: optax.ema(0.9), ValueError, r"the inner state, found \['count', 'ema'\]"),
        (
            lambda: optax.chain(optax.scale(1.0), optax.ema(0.9)),
            ValueError,
            r"found \['1/count', '1/ema'\]\. Name the fields with first_moments",
        ),
    ],
)
def test_no_moment_found(make, error, message):
    tx = so.transport_moments(make(), groups=FILTER)
    with pytest.raises(error, match=message):
        tx.init({"kernel": jnp.ones((3, 2))})


def test_moments_under_other_names(x64):
    """Moments with other names can be named: `optax.ema` keeps the same average as `trace`."""
    tx = so.transport_moments(
        optax.ema(0.9, debias=False), FILTER, first_moments=("ema",), second_moments=()
    )
    same = so.transport_moments(optax.trace(0.9), FILTER)
    x, g = normal(0, (4, 3)), normal(1, (4, 3))
    _, state = tx.update(g, tx.init(x), x)
    _, same_state = same.update(g, same.init(x), x)
    result, _ = tx.update(g, state, x + g)
    expected, _ = same.update(g, same_state, x + g)
    np.testing.assert_allclose(result, 0.1 * expected, rtol=1e-12)


def test_bad_names_of_moments():
    with pytest.raises(TypeError, match="first_moments as a tuple of field names, found None"):
        so.transport_moments(optax.trace(0.9), FILTER, first_moments=None)
    with pytest.raises(ValueError, match=r"a field named \['m'\] in the inner state, found .*'mu'"):
        so.transport_moments(optax.scale_by_adam(), FILTER, first_moments=("m",)).init(
            jnp.ones((3, 2))
        )
    with pytest.raises(TypeError, match="a gradient transformation as inner, found RadialGroup"):
        so.transport_moments(FILTER, optax.trace(0.9))
    with pytest.raises(TypeError, match=r"first_moments as a tuple of field names, found 'mu'"):
        so.transport_moments(optax.trace(0.9), FILTER, first_moments="mu")
    tx = so.transport_moments(so.scale_by_adams(groups=FILTER), FILTER, first_moments=("nu",))
    message = r"kernel of shape \(3, 2\): expected its moment nu/kernel to have shape \(3, 2\), "
    with pytest.raises(ValueError, match=message + r"found \(2,\)"):
        tx.init({"kernel": jnp.ones((3, 2))})


@pytest.mark.parametrize(
    ("inner", "state", "moment"),
    [
        (lambda: so.scale_by_adamsrt(groups=FILTER), "ScaleByAdamsrtState", "mu/kernel"),
        (lambda: so.sgdmrt(0.1, groups=FILTER), "TransportedTraceState", "2/trace/kernel"),
        (
            lambda: optax.chain(optax.scale(2.0), so.adamg(0.1, groups=FILTER)),
            "ScaleByAdamgState",
            "1/1/mu/kernel",
        ),
    ],
)
def test_what_is_carried_already_is_refused(inner, state, moment):
    tx, params = so.transport_moments(inner(), FILTER), {"kernel": jnp.ones((3, 2))}
    message = rf"nothing carries yet, found \['{moment}'.*\] in {state}\. They would be .* twice"
    with pytest.raises(ValueError, match=message):
        tx.init(params)


def test_other_moments_beside_those_that_are_carried():
    inner = optax.chain(so.transported_trace(0.9, groups=FILTER), optax.scale_by_adam())
    tx = so.transport_moments(inner, FILTER, first_moments=("mu",))
    assert tx.init({"kernel": jnp.ones((3, 2))}).radius["kernel"].shape == (2,)


@pytest.mark.parametrize(
    "tx",
    [so.project_radial(so.per_layer(joint="a")), so.retract(so.per_layer(joint="a"))],
    ids=["project_radial", "retract"],
)
def test_a_joint_group_needs_all_its_gradients(tx):
    params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    grads = {"kernel": jnp.ones((3, 4)), "bias": None}
    message = (
        r"joint label 'a': expected gradients for all its 2 leaves or none, found None for "
        r"\['bias'\] and gradients for \['kernel'\]"
    )
    with pytest.raises(ValueError, match=message):
        tx.update(grads, tx.init(params), params)


def test_leaves_of_a_joint_group_keep_their_state_in_own_buffers():
    params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    for tx in (
        so.retract(so.per_layer(joint="a")),
        so.adamsrt(0.1, groups=so.per_layer(joint="a")),
    ):
        state = tx.init(params)
        _, after = tx.update(params, state, params)
        for each in (state, after):
            pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(each)]
            assert len(set(pointers)) == len(pointers)


# --- scale_by_adamg_star ----------------------------------------------------------------


def test_adamg_star_follows_sgd_through_a_change_of_the_learning_rate(x64):
    """The learning rate may be injected, and therefore traced."""
    schedule = optax.piecewise_constant_schedule(0.04, {10: 0.25})
    star = optax.inject_hyperparams(so.adamg_star)(schedule, 0.5, groups=FILTER)
    sgd = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(schedule))
    data = normal(0, (7, 5))
    gradient = jax.grad(lambda x: jnp.sum(data @ (x / jnp.linalg.norm(x, axis=0))) ** 2 / 20)
    paths = []
    for tx in (star, sgd):
        params, state = 2 * normal(1, (5, 3)), tx.init(normal(1, (5, 3)) * 2)
        path = [params]
        for _ in range(20):
            params, state = step(tx, gradient(params), state, params)
            path.append(params)
        paths.append(path)
    angles = [geometry.angle(a, b, FILTER).max() for a, b in zip(*paths, strict=True)]
    turned = [geometry.angle(paths[1][i], paths[1][i + 10], FILTER).min() for i in (0, 10)]
    assert max(angles) < 1e-3 * min(turned)


def test_adamg_star_for_several_learning_rates_at_once():
    x, g = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 0.5]])

    def update(rate):
        tx = so.scale_by_adamg_star(rate, 0.1, groups=LAYER)
        return tx.update(g, tx.init(x), x)

    rates = jnp.array([0.1, 0.2])
    for each, rate in zip(jax.vmap(update)(rates)[0], rates, strict=True):
        np.testing.assert_allclose(each, update(float(rate))[0], rtol=1e-6)


# --- scale_by_adams ---------------------------------------------------------------------


def test_one_second_moment_per_group():
    params = {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)}
    tx = so.scale_by_adams(groups={"kernel": FILTER, "bias": None}, mu_dtype="bfloat16")
    state = jax.eval_shape(tx.init, params)
    assert state.nu["kernel"].shape == (4,)
    assert state.nu["bias"].shape == (4,)
    assert state.mu["kernel"].shape == (3, 3, 2, 4)
    assert state.mu["kernel"].dtype == jnp.bfloat16


def test_the_first_step_keeps_the_direction_and_has_adams_length(x64):
    g = normal(0, (5, 3))
    for sqrt_dim, length in ((True, np.sqrt(5)), (False, 1.0)):
        tx = so.scale_by_adams(groups=FILTER, eps=0.0, sqrt_dim=sqrt_dim)
        updates, _ = tx.update(g, tx.init(g))
        expected = geometry.scale(length / geometry.norm(g, FILTER), g, FILTER)
        np.testing.assert_allclose(updates, expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bias_correction_is_accurate_in_low_precision(dtype):
    """With a constant gradient, all updates are equal from the first step on."""
    g = jnp.full((4,), 0.25, dtype)
    tx = so.scale_by_adams(groups=LAYER, eps=0.0)
    state = tx.init(g)
    for _ in range(5):
        updates, state = tx.update(g, state)
        np.testing.assert_allclose(np.asarray(updates, np.float64), 1, rtol=4e-3)
        if dtype == "float32":
            np.testing.assert_allclose(updates, 1, rtol=1e-6)


# --- retract ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["normalize", "geodesic"])
@pytest.mark.parametrize("radius", [2.5, "initial"])
def test_every_step_ends_on_the_sphere(method, radius, dtype):
    tx = so.retract(FILTER, radius=radius, method=method)
    params = normal(0, (6, 3)).astype(dtype)
    state = tx.init(params)
    target = geometry.norm(params, FILTER) if radius == "initial" else 2.5
    for seed in range(5):
        params, state = step(tx, 0.1 * normal(seed, (6, 3)).astype(dtype), state, params)
        tolerance = {"bfloat16": 1e-2, "float32": 1e-6, "float64": 1e-14}[dtype]
        np.testing.assert_allclose(geometry.norm(params, FILTER), target, rtol=tolerance)


def test_repeated_rounding_does_not_drift():
    tx = so.retract(LAYER)
    params = jnp.asarray(np.random.default_rng(0).normal(size=256), "bfloat16")
    target, state = geometry.norm(params, LAYER), tx.init(params)

    def body(carry, key):
        params, state = carry
        updates = (0.01 * jax.random.normal(key, (256,))).astype("bfloat16")
        updates, state = tx.update(updates, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(0), 2000)
    (params, _), _ = jax.lax.scan(body, (params, state), keys)
    np.testing.assert_allclose(geometry.norm(params, LAYER), target, rtol=1e-3)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"radius": 0.0}, ValueError, r"radius in \(0, inf\), found 0\.0"),
        ({"radius": -1.0}, ValueError, r"radius in \(0, inf\), found -1\.0"),
        ({"radius": float("nan")}, ValueError, r"radius in \(0, inf\), found nan"),
        (
            {"radius": "first"},
            ValueError,
            'a number or "initial" or "sqrt\\(d\\)", found \'first\'',
        ),
        ({"method": "cayley"}, ValueError, r"\['normalize', 'geodesic'\], found 'cayley'"),
    ],
)
def test_bad_retraction(kwargs, error, message):
    with pytest.raises(error, match=message):
        so.retract(FILTER, **kwargs)


def test_rates_by_path_do_not_freeze_leaves_without_a_group():
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    groups, rules = {"kernel": FILTER, "bias": None}, {"kernel": 0.1}
    message = (
        r"scale_by_learning_rates: expected other, an optimizer .*, \['bias'\], found "
        r"None\. .*Pass other=optax\.scale_by_learning_rate"
    )
    with pytest.raises(ValueError, match=message):
        so.scale_by_learning_rates(rules, groups=groups).init(params)
    other = optax.scale_by_learning_rate(0.5)
    tx = so.scale_by_learning_rates(rules, groups=groups, other=other)
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1)
    np.testing.assert_allclose(updates["bias"], -0.5)
