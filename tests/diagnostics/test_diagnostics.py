"""The predicted step against measured angles, and recorded values against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from reference import parallel_transport, tangent

import spherical_optax as so
from spherical_optax import geometry

BETA1, BETA2, EPS, DAMPENING = 0.8, 0.95, 1e-8, 0.3
LR = {"sgd": 0.5, "momentum": 0.5, "sgdmrt": 0.5, "adam": 0.05, "adams": 0.05, "adamsrt": 0.05}


# --- the effective learning rate --------------------------------------------------------


@jax.jit
@jax.grad
def gradient(kernel, data):
    """The gradient of a random loss that depends only on the directions of the columns."""
    directions = kernel / jnp.linalg.norm(kernel, axis=0)
    return jnp.mean((jnp.tanh(data @ directions) - data[:, :3]) ** 2)


def kernel():
    return jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)))


def data(steps=6):
    return jnp.asarray(np.random.default_rng(1).normal(size=(steps, 9, 6)))


predict = jax.jit(so.effective_learning_rate, static_argnames="group")


def optimizer(name, decay):
    coupled = optax.add_decayed_weights(decay)
    lr, groups = LR[name], so.per_filter()
    return {
        "sgd": lambda: optax.chain(coupled, optax.sgd(lr)),
        "momentum": lambda: optax.chain(coupled, optax.sgd(lr, BETA1)),
        "adam": lambda: optax.chain(coupled, optax.adam(lr, BETA1, BETA2, EPS)),
        "adams": lambda: so.adams(lr, BETA1, BETA2, EPS, groups=groups, weight_decay=decay),
        "adamsrt": lambda: so.adamsrt(lr, BETA1, BETA2, EPS, groups=groups, weight_decay=decay),
        "sgdmrt": lambda: so.sgdmrt(lr, BETA1, DAMPENING, groups=groups, weight_decay=decay),
    }[name]()


def trajectory(name, decay):
    """The kernels before the first and after each step, and each step's gradient and state.

    Gradients include L2.
    """
    tx, x = optimizer(name, decay), kernel()
    state, path, grads, states = tx.init(x), [x], [], []
    update = jax.jit(tx.update)
    for batch in data():
        g = gradient(x, batch)
        updates, state = update(g, state, x)
        grads.append(np.asarray(g + decay * x))
        x = optax.apply_updates(x, updates)
        path.append(x)
        states.append(state)
    return path, grads, states


def quotients(name, path, grads):
    """Numerator and denominator of each step, from the textbook recursions."""
    x, m, v = np.asarray(path[0]), np.zeros((6, 3)), 0.0
    for t, g in enumerate(grads, start=1):
        if name == "sgd":
            yield g, 1.0
            continue
        if name in ("momentum", "sgdmrt"):
            m = BETA1 * m + (1 - DAMPENING if name == "sgdmrt" else 1) * g
            yield m, 1.0
        else:
            squares = g**2 if name == "adam" else (g**2).sum(0)
            m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * squares
            b = np.sqrt(v / (1 - BETA2**t)) + EPS
            yield m / (1 - BETA1**t), b if name == "adam" else b / np.sqrt(6)
        if name in ("sgdmrt", "adamsrt"):
            new = np.asarray(path[t])
            ratio = np.linalg.norm(x, axis=0) / np.linalg.norm(new, axis=0)
            carried = [
                parallel_transport(tangent(m[:, i], x[:, i]), x[:, i], new[:, i]) for i in range(3)
            ]
            x, m, v = new, ratio * np.stack(carried, axis=-1), ratio**2 * v


def check_step(step, x, new, rtol=1e-9):
    """The predicted angle and direction of each column agree with the measured ones."""
    x, new, c = (np.asarray(array) for array in (x, new, step.direction))
    u, length = x / np.linalg.norm(x, axis=0), np.linalg.norm(c, axis=0)
    measured = geometry.angle(jnp.asarray(x), jnp.asarray(new), so.per_filter())
    assert np.min(measured) > 1e-3
    np.testing.assert_allclose(np.arctan(step.learning_rate * length), measured, rtol=rtol)
    np.testing.assert_allclose(step.angle, measured, rtol=rtol)
    turned = np.cos(step.angle) * u - np.sin(step.angle) * c / length
    np.testing.assert_allclose(turned, new / np.linalg.norm(new, axis=0), atol=rtol)


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adams", "adamsrt", "sgdmrt"])
def test_predicted_angle_and_direction_are_those_measured(name, decay, x64):
    path, grads, _ = trajectory(name, decay)
    for x, new, (a, b) in zip(path, path[1:], quotients(name, path, grads), strict=False):
        step = predict(x, a, b, LR[name], so.per_filter())
        check_step(step, x, new)


@pytest.mark.parametrize(("name", "part"), [("adamsrt", 1 - BETA1), ("sgdmrt", 1 - DAMPENING)])
def test_numerator_from_the_state_of_transported_moments(name, part, x64):
    """The numerator is the state's moment of r g plus the gradient's radial part, as documented."""
    path, grads, states = trajectory(name, decay=0.3)
    for t, (x, g, state) in enumerate(zip(path, grads, states, strict=False), start=1):
        r = np.linalg.norm(x, axis=0)
        u = np.asarray(x) / r
        moment = optax.tree.get(state, "mu" if name == "adamsrt" else "trace")
        a, b = np.asarray(moment) / r + part * (g * u).sum(0) * u, 1.0
        if name == "adamsrt":
            a = a / (1 - BETA1**t)
            v = optax.tree.get(state, "nu") / r**2
            b = (np.sqrt(v / (1 - BETA2**t)) + EPS) / np.sqrt(6)
        step = predict(x, a, b, LR[name], so.per_filter())
        check_step(step, x, path[t])


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_closed_form_of_sgd_with_decay(decay, x64):
    x, lr = kernel(), 0.5
    g = gradient(x, data()[0])
    step = predict(x, g + decay * x, 1.0, lr, so.per_filter())
    r = np.linalg.norm(x, axis=0)
    np.testing.assert_allclose(step.learning_rate, lr / (r**2 * (1 - lr * decay)), rtol=1e-12)
    np.testing.assert_allclose(step.direction, r * g, atol=1e-13)  # the gradient at u


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_gradients_are_tangent_and_of_degree_minus_one(factor, x64):
    x, batch = kernel(), data()[0]
    g = gradient(x, batch)
    assert np.abs(geometry.inner(g, x, so.per_filter())).max() < 1e-15
    np.testing.assert_allclose(gradient(factor * x, batch), g / factor, rtol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_radius_after_a_step_of_sgd(decay, x64):
    """A step adds its squared length to the squared radius, after decay has scaled the radius."""
    x, lr = kernel(), 0.5
    g = gradient(x, data()[0])
    updates, _ = optimizer("sgd", decay).update(g, optimizer("sgd", decay).init(x), x)
    r, after = (geometry.norm(each, so.per_filter()) for each in (x, x + updates))
    square = (1 - lr * decay) ** 2 * r**2 + lr**2 * geometry.norm(g, so.per_filter()) ** 2
    np.testing.assert_allclose(after**2, square, rtol=1e-12)


def test_only_division_by_entry_gives_a_step_a_radial_part(x64):
    """On a tangent gradient, Adam's first step has a radial part, and that of AdamS has none."""
    x, group = kernel(), so.per_filter()
    g = gradient(x, data()[0])
    radial = {}
    for name, tx in {
        "adam": optax.scale_by_adam(eps=0.0),
        "adams": so.scale_by_adams(eps=0.0, groups=group),
    }.items():
        step, _ = tx.update(g, tx.init(x), x)
        lengths = geometry.norm(step, group) * geometry.norm(x, group)
        radial[name] = np.abs(geometry.inner(step, x, group) / lengths)
    assert radial["adams"].max() < 1e-14
    assert radial["adam"].max() > 0.1


@pytest.mark.parametrize("denominator", ["number", "per group", "per entry"])
@pytest.mark.parametrize(
    "group",
    [so.per_filter(), so.per_layer(), so.per_channel_block(2), so.per_head(axis=1)],
    ids=["filter", "layer", "blocks", "head"],
)
def test_theorem_for_any_step(group, denominator, x64):
    rng = np.random.default_rng(0)
    x, a = (jnp.asarray(rng.normal(size=(3, 5, 4))) for _ in range(2))
    shape = {"number": (), "per group": group.shape(x.shape), "per entry": x.shape}[denominator]
    b = jnp.asarray(rng.uniform(0.5, 2.0, size=shape))
    rate = rng.uniform(0.1, 0.3, size=group.shape(x.shape))
    step = so.effective_learning_rate(x, a, b, rate, group)
    each = (
        b
        if denominator == "per entry"
        else geometry.spread(jnp.broadcast_to(b, group.shape(x.shape)), x, group)
    )
    new = x - geometry.spread(rate, x, group) * a / each
    np.testing.assert_allclose(step.angle, geometry.angle(x, new, group), rtol=1e-12)
    back = geometry.retract(x, new - x, group)
    minus = geometry.scale(step.angle / geometry.norm(step.direction, group), step.direction, group)
    u = geometry.retract(x, jnp.zeros_like(x), group)
    np.testing.assert_allclose(
        geometry.retract(u, -minus, group, method="geodesic"), back, atol=1e-14
    )


def test_theorem_for_joint_groups(x64):
    rng = np.random.default_rng(0)
    make = lambda: {  # noqa: E731
        "kernel": jnp.asarray(rng.normal(size=(5, 4))),
        "bias": jnp.asarray(rng.normal(size=4)),
    }
    x, a, b = make(), make(), jax.tree.map(jnp.abs, make())
    group = {"kernel": so.per_channel_block(2), "bias": so.per_channel_block(2)}
    for denominator in (b, jnp.array([0.5, 2.0]), 3.0):
        step = so.effective_learning_rate(x, a, denominator, 0.01, group)
        if not isinstance(denominator, dict):
            full = np.repeat(np.broadcast_to(denominator, 2), 2)
            denominator = {"kernel": full, "bias": full}
        new = jax.tree.map(lambda x, a, b: x - 0.01 * a / b, x, a, denominator)
        assert step.learning_rate.shape == (2,)
        np.testing.assert_allclose(step.angle, geometry.angle(x, new, group), rtol=1e-10)


def test_steps_beyond_90_degrees_and_zero_groups(x64):
    x = jnp.array([[1.0, 0.0], [0.0, 0.0]])
    a = jnp.array([[2.0, 1.0], [1.0, 1.0]])
    step = so.effective_learning_rate(x, a, 1.0, 1.0, so.per_filter())
    np.testing.assert_allclose(step.angle, [np.pi * 3 / 4, 0.0])
    np.testing.assert_array_equal(step.learning_rate, [-1.0, 0.0])
    np.testing.assert_array_equal(step.direction, [[0.0, 0.0], [1.0, 0.0]])


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"group": True}, TypeError, "expected RadialGroup, found True"),
        ({"b": jnp.ones(2)}, ValueError, r"b as a number, of the shape \(2, 3\) .* \(2,\)"),
        ({"a": jnp.ones((3, 2))}, (TypeError, ValueError), "shape"),
    ],
)
def test_effective_learning_rate_refuses(kwargs, error, message):
    given = {"a": jnp.ones((2, 3)), "b": 1.0, "learning_rate": 0.1, "group": so.per_filter()}
    with pytest.raises(error, match=message):
        so.effective_learning_rate(jnp.ones((2, 3)), **{**given, **kwargs})


# --- recorded values --------------------------------------------------------------------

GROUPS = so.groups_by_path(
    {
        "conv": so.per_filter(),
        "dense": so.per_layer(joint="dense"),
        "blocks": so.per_channel_block(2),
    }
)


def parameters(seed=0, dtype="float64"):
    rng = np.random.default_rng(seed)
    return {
        "blocks": {"kernel": jnp.asarray(rng.normal(size=(3, 6)), dtype)},
        "conv": {"kernel": jnp.asarray(rng.normal(size=(3, 2, 4)), dtype)},
        "dense": {
            "bias": jnp.asarray(rng.normal(size=5), dtype),
            "kernel": jnp.asarray(rng.normal(size=(4, 5)), dtype),
        },
        "head": {"kernel": jnp.asarray(rng.normal(size=(5, 3)), dtype)},
    }


def vectors(params):
    """For each path with a group, the groups as columns of a matrix, made by hand."""
    joint = np.concatenate([params["dense"]["bias"], np.ravel(params["dense"]["kernel"])])
    blocks = np.asarray(params["blocks"]["kernel"]).reshape(3, 2, 3)
    return {
        "blocks/kernel": blocks.transpose(0, 2, 1).reshape(9, 2),
        "conv/kernel": np.asarray(params["conv"]["kernel"]).reshape(6, 4),
        "dense/bias": joint,
        "dense/kernel": joint,
    }


def by_hand(before, after):
    found = {}
    for (path, x), y in zip(vectors(before).items(), vectors(after).values(), strict=True):
        r, step = np.linalg.norm(x, axis=0), y - x
        radial = (step * x).sum(0) / r
        tangential = np.linalg.norm(step - radial * x / r, axis=0)
        angle = np.arctan2(tangential, r + radial)
        found[path] = so.SphereMetrics(r, np.linalg.norm(y, axis=0), angle, radial, tangential)
    return found


def test_sphere_metrics_by_hand(x64):
    before, after = parameters(0), parameters(1)
    found, expected = so.sphere_metrics(before, after, GROUPS), by_hand(before, after)
    assert list(found) == list(expected)
    for path, metrics in found.items():
        assert isinstance(metrics, so.SphereMetrics)
        for name, value in metrics._asdict().items():
            hand = getattr(expected[path], name)
            assert value.shape == hand.shape
            np.testing.assert_allclose(value, hand, rtol=1e-12, err_msg=f"{path} {name}")


def test_sphere_metrics_keep_the_order_of_the_parameters():
    joint = so.per_layer(joint="ends")
    params = {name: jnp.ones(2) for name in "abc"}
    found = so.sphere_metrics(params, params, {"a": joint, "b": so.per_layer(), "c": joint})
    assert list(found) == ["a", "b", "c"]


def test_sphere_metrics_of_nnx_states():
    model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    before = jax.tree.map(jnp.array, nnx.state(model, nnx.Param))
    model.kernel[...] = model.kernel[...] * 2
    found = so.sphere_metrics(
        before, nnx.state(model, nnx.Param), so.groups_by_path({"kernel": so.per_filter()})
    )
    assert list(found) == ["kernel"]
    length = np.linalg.norm(before["kernel"][...], axis=0)
    np.testing.assert_allclose(found["kernel"].radius_after, 2 * length, rtol=1e-6)
    np.testing.assert_allclose(found["kernel"].step_radial, length, rtol=1e-6)
    np.testing.assert_allclose(found["kernel"].step_angle, 0, atol=1e-6)


def test_recorded_in_a_scan_is_what_the_snapshots_say(x64):
    tx = optax.chain(so.adamsrt(0.1, groups=GROUPS), so.record_sphere(GROUPS))
    params = parameters()
    state = tx.init(params)

    def step(carry, seed):
        params, state = carry
        grads = jax.tree.map(lambda p: jnp.cos(p + seed), params)
        updates, state = tx.update(grads, state, params)
        after = optax.apply_updates(params, updates)
        return (after, state), (params, after, optax.tree.get(state, "sphere"))

    measure = jax.jit(lambda before, after: so.sphere_metrics(before, after, GROUPS))
    _, stacked = jax.jit(lambda: jax.lax.scan(step, (params, state), jnp.arange(3.0)))()
    for k in range(3):
        before, after, sphere = jax.tree.map(lambda leaf, k=k: np.asarray(leaf[k]), stacked)
        for path, metrics in measure(before, after).items():
            layer, leaf = path.split("/")
            recorded = so.SphereMetrics(*sphere[layer][leaf])
            for name, value in metrics._asdict().items():
                found = getattr(recorded, name)
                assert found.shape == value.shape
                np.testing.assert_allclose(
                    found, value, rtol=1e-9, atol=1e-14, err_msg=f"{path} {name}"
                )
        assert set(sphere) == {"blocks", "conv", "dense"}


def test_recorded_by_hand():
    tx = optax.chain(optax.scale(1.0), so.record_sphere(so.per_filter()))
    x, v = jnp.array([[3.0, 0.0], [4.0, 2.0]]), jnp.array([[4.0, 2.0], [-3.0, 0.0]])
    _, state = tx.update(v, tx.init(x), x)
    sphere = so.SphereMetrics(*optax.tree.get(state, "sphere"))
    quarter = np.pi / 4
    for name, values in {
        "radius_before": (5, 2),
        "radius_after": (np.sqrt(50), np.sqrt(8)),
        "step_angle": (quarter, quarter),
        "step_radial": (0, 0),
        "step_tangential": (5, 2),
    }.items():
        np.testing.assert_allclose(getattr(sphere, name), values, rtol=1e-6, err_msg=name)
    inwards, state = tx.update(-x / 2, state, x)
    sphere = so.SphereMetrics(*optax.tree.get(state, "sphere"))
    np.testing.assert_array_equal(sphere.step_radial, [-2.5, -1])
    np.testing.assert_array_equal(inwards, -x / 2)


@pytest.mark.parametrize("record", [so.record_sphere, so.record_gradient])
def test_updates_are_unchanged(record, dtype):
    params, grads = parameters(0, dtype), parameters(1, dtype)
    tx = optax.sgd(0.1, 0.9)
    chains = optax.chain(tx, record(GROUPS)), optax.chain(record(GROUPS), tx)
    expected, _ = tx.update(grads, tx.init(params), params)
    for chain in chains:
        updates, _ = chain.update(grads, chain.init(params), params)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_zero_groups_missing_updates_and_lost_steps(dtype):
    groups = so.per_filter()
    tx = so.record_sphere(groups)
    x = jnp.array([[0.0, 1.0], [0.0, 0.0]], dtype)
    _, state = tx.update(jnp.array([[3.0, 0.0], [4.0, 1e-3]], dtype), tx.init(x), x)
    sphere = so.SphereMetrics(*state.sphere)
    np.testing.assert_array_equal(sphere.radius_before, [0, 1])
    np.testing.assert_array_equal(sphere.step_radial, [0, 0])
    np.testing.assert_allclose(sphere.step_tangential, [5, 1e-3], rtol=1e-2)
    np.testing.assert_allclose(sphere.step_angle, [0, 1e-3], rtol=1e-2)  # bfloat16 resolves 1e-3
    assert sphere.step_angle.dtype == ("float64" if dtype == "float64" else "float32")

    tx = so.record_sphere({"a": groups})
    params = {"a": x}
    _, state = tx.update({"a": None}, tx.init(params), params)
    sphere = so.SphereMetrics(*state.sphere["a"])
    np.testing.assert_array_equal(sphere.radius_before, [0, 1])
    np.testing.assert_array_equal(sphere.step_tangential, 0)


def test_a_step_that_bfloat16_loses():
    x = jnp.array([1.0, 1.0], "bfloat16")
    v = jnp.array([1e-3, -1e-3], "bfloat16")
    tx = so.record_sphere(so.per_layer())
    updates, state = tx.update(v, tx.init(x), x)
    after = optax.apply_updates(x, updates)
    angle = so.SphereMetrics(*state.sphere).step_angle
    assert float(angle) == pytest.approx(1e-3, rel=0.01)
    kept = so.sphere_metrics({"x": x}, {"x": jnp.ones_like(x)}, so.per_layer())["x"]
    assert kept.step_angle == 0
    assert after.dtype == x.dtype


def test_gradient_cosine_tells_right_groups_from_wrong_ones(x64):
    x = kernel()
    g = gradient(x, data()[0])
    for group, low, high in (
        (so.per_filter(), 0, 1e-14),
        (so.RadialGroup(index_axes=(0,)), 1e-2, 1),
    ):
        tx = optax.chain(so.record_gradient(group), optax.sgd(0.1))
        _, state = tx.update(g, tx.init(x), x)
        cosine = optax.tree.get(state, "gradient_cosine")
        assert low <= np.abs(cosine).max() <= high

    tx = so.record_gradient(so.per_filter())
    _, state = tx.update(g + 0.1 * x, tx.init(x), x)
    length, decay = np.linalg.norm(g, axis=0), 0.1 * np.linalg.norm(x, axis=0)
    expected = decay / np.hypot(length, decay)
    np.testing.assert_allclose(state.gradient_cosine, expected, rtol=1e-12)
    _, state = tx.update(jnp.zeros_like(g), state, x)
    np.testing.assert_array_equal(state.gradient_cosine, np.zeros(3))


def test_recorded_through_nnx_optimizer():
    model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    groups = so.groups_by_path({"kernel": so.per_filter()})
    tx = optax.chain(so.record_gradient(groups), optax.sgd(0.1), so.record_sphere(groups))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = jax.tree.map(jnp.array, nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: model(jnp.ones((2, 4))).sum())(model))

    step(model, optimizer)
    expected = so.sphere_metrics(before, nnx.state(model, nnx.Param), groups)["kernel"]
    sphere = optax.tree.get(optimizer.opt_state, "sphere")
    angle = so.SphereMetrics(*sphere["kernel"][...]).step_angle
    np.testing.assert_allclose(angle, expected.step_angle, rtol=1e-5)
    assert np.all(angle > 0)


# --- bad input --------------------------------------------------------------------------


@pytest.mark.parametrize("record", [so.record_sphere, so.record_gradient])
def test_groups_must_fit(record):
    params = {"a": {"kernel": jnp.ones((3, 4))}}
    with pytest.raises(ValueError, match=r"no parameter path matches \['dense'\]"):
        record(so.groups_by_path({"dense": so.per_layer()})).init(params)
    with pytest.raises(TypeError, match="expected a group, found a function; call per_filter"):
        record(so.per_filter).init(params)
    name = record.__name__
    state = record(so.per_layer()).init(params)
    shape, other = ("5, 4", "5,") if name == "record_sphere" else ("4,", "")
    message = rf"{name}: expected state of shapes .*a/kernel': \({shape}\).* found .*\({other}\)"
    with pytest.raises(ValueError, match=message):
        record(so.per_filter()).update(params, state, params)
    more = {**params, "b": jnp.ones(2)}
    with pytest.raises(
        ValueError, match=f"{name}: expected state of shapes .*/b.*, found .*a/kernel"
    ):
        record(so.per_layer()).update(more, state, more)


@pytest.mark.parametrize(
    ("after", "groups", "error", "message"),
    [
        (
            {"a": jnp.ones((3, 5))},
            True,
            ValueError,
            r"a: expected the same shape in both .*\(3, 5\)",
        ),
        ({"a": None}, True, ValueError, r"a: expected the same shape in both .*found \(3, 4\)"),
        ({"b": jnp.ones((3, 4))}, True, ValueError, r"found \['a'\] before and \['b'\] after"),
        ({"a": jnp.ones((3, 4))}, {"b": True}, ValueError, "found nothing for a of shape"),
        ({"a": jnp.ones((3, 4))}, 3, TypeError, "expected a RadialGroup, None, True or False"),
    ],
)
def test_sphere_metrics_refuses(after, groups, error, message):
    with pytest.raises(error, match=message):
        so.sphere_metrics({"a": jnp.ones((3, 4))}, after, groups)
