"""The optimizers against NumPy, against Optax, and against the laws of the sphere."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from trajectory import run

import spherical_optax as so
from spherical_optax import geometry

OPTIMIZERS = {"adams": so.adams, "adamsrt": so.adamsrt, "sgdmrt": so.sgdmrt, "adamg": so.adamg}
OPTIMIZERS |= {"adamsw": so.adamsw, "adamsrtw": so.adamsrtw}


# --- against the textbook formulas ------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float64_formula(name, x64):
    """Updates agree with the float64 reference, which transports exactly."""
    rng = np.random.default_rng(0)
    x, grads = rng.normal(size=(7, 3)), rng.normal(size=(20, 7, 3))
    lr, decay = 0.02, 0.0 if name == "adamg" else 0.05
    adam = {"lr": lr, "b1": 0.8, "b2": 0.95, "eps": 1e-8, "weight_decay": decay}
    adam["decoupled"] = name.endswith("w")
    if name == "sgdmrt":
        given = {"momentum": 0.8, "dampening": 0.3, "weight_decay": decay}
        tx = so.sgdmrt(lr, groups=so.per_filter(), **given)
        paths = [reference.sgdmrt(x[:, i], grads[:, :, i], lr=lr, **given) for i in range(3)]
    else:
        kwargs = {} if name == "adamg" else {"weight_decay": decay}
        tx = OPTIMIZERS[name](lr, b1=0.8, b2=0.95, groups=so.per_filter(), **kwargs)
        how = {"transport": name not in ("adams", "adamsw"), "on_unit_sphere": name == "adamg"}
        paths = [reference.adam_family(x[:, i], grads[:, :, i], **adam, **how) for i in range(3)]
    path = run(tx, jnp.asarray(x), jnp.asarray(grads))
    np.testing.assert_allclose(np.stack(path), np.stack(paths, axis=-1), rtol=1e-10, atol=1e-12)


def test_a_decay_rate_scheduled_to_zero_stays_finite():
    """When compiled, this schedule ends at -1e-8, which has no logarithm."""
    schedule = optax.linear_schedule(0.9, 0.0, 20)
    assert jax.jit(schedule)(20) < 0
    x, tx = jnp.array([3.0, 4.0]), optax.inject_hyperparams(so.adams)
    path = run(tx(0.1, b1=schedule, groups=so.per_layer()), x, [x] * 21)
    assert np.isfinite(path[-1]).all()


# --- against optax ----------------------------------------------------------------------


NO_GROUPS = {"kernel": None, "bias": None}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (so.adams(1e-2, groups=NO_GROUPS), optax.adam(1e-2)),
        (so.adamsrt(1e-2, groups=NO_GROUPS), optax.adam(1e-2)),
        (
            so.adamg(1e-2, groups=NO_GROUPS, other=optax.adam(1e-2, b2=0.9)),
            optax.adam(1e-2, b2=0.9),
        ),
        (
            so.adams(1e-2, groups=NO_GROUPS, mu_dtype="bfloat16"),
            optax.adam(1e-2, mu_dtype="bfloat16"),
        ),
        (so.adamsw(1e-2, groups=NO_GROUPS), optax.adamw(1e-2)),
        (
            so.adamsrtw(1e-2, groups=NO_GROUPS, weight_decay=0.1),
            optax.adamw(1e-2, weight_decay=0.1),
        ),
        (so.sgdmrt(1e-2, 0.8, groups=NO_GROUPS), optax.sgd(1e-2, 0.8)),
        (
            so.adamsrt(optax.cosine_decay_schedule(0.1, 5), groups=NO_GROUPS, weight_decay=0.1),
            optax.chain(
                optax.add_decayed_weights(0.1), optax.adam(optax.cosine_decay_schedule(0.1, 5))
            ),
        ),
    ],
    ids=[
        "adams",
        "adamsrt",
        "adamg",
        "mu_dtype",
        "adamsw",
        "adamsrtw",
        "sgdmrt",
        "schedule and decay",
    ],
)
def test_leaves_without_a_group_follow_optax_to_the_bit(ours, theirs, dtype):
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(8, 4)), dtype), "bias": jnp.zeros(4, dtype)}
    grads = [
        jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), dtype), params)
        for _ in range(6)
    ]
    for a, b in zip(run(ours, params, grads), run(theirs, params, grads), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_ungrouped_leaves_beside_grouped_ones_follow_adam_to_the_bit():
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 2, 4), "head": (4, 3)}
    make = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params = {key: make(shape) for key, shape in shapes.items()}
    grads = [{key: make(shape) for key, shape in shapes.items()} for _ in range(4)]
    ours = run(so.adamsrt(0.1, groups={"conv": True, "head": None}), params, grads)
    adam = run(optax.adam(0.1), params["head"], [g["head"] for g in grads])
    for a, b in zip(ours, adam, strict=True):
        np.testing.assert_array_equal(a["head"], b)


def test_optimizers_are_chains_of_the_public_transforms(x64):
    rng = np.random.default_rng(0)
    x, grads = jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray(rng.normal(size=(6, 5, 3)))
    groups = so.per_filter()
    chain = optax.chain(
        optax.add_decayed_weights(0.1),
        so.scale_by_adamsrt(b1=0.8, groups=groups),
        optax.scale_by_learning_rate(0.05),
    )
    optimizer = so.adamsrt(0.05, b1=0.8, groups=groups, weight_decay=0.1)
    np.testing.assert_array_equal(run(chain, x, grads), run(optimizer, x, grads))


# --- laws of radially invariant losses --------------------------------------------------


def network_loss(params, seed):
    """A random loss of a two-layer network that depends only on the kernels' directions."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(16, 5)))
    for name in ("first", "second"):
        kernel = params[name]["kernel"] / jnp.linalg.norm(params[name]["kernel"], axis=0)
        x = jnp.tanh(x @ kernel * params[name]["scale"] + params[name]["bias"])
    return jnp.mean((x - jnp.asarray(rng.normal(size=(16, 4)))) ** 2)


def network(seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: {
            "kernel": jnp.asarray(rng.normal(size=shape)),
            "scale": jnp.ones(shape[1]),
            "bias": jnp.zeros(shape[1]),
        }
        for name, shape in {"first": (5, 6), "second": (6, 4)}.items()
    }


KERNELS = so.groups_by_path({"kernel": so.per_filter()})
DIRECTIONS = {
    # The chain before the learning rate, and the power p: when a group's weights are scaled by
    # c, its learning rate must be scaled by c^p. Gradients have degree -1.
    "adamsrt": (lambda: so.scale_by_adamsrt(eps=0.0, groups=KERNELS), 1),
    "sgdmrt": (lambda: so.transported_trace(0.9, groups=KERNELS), 2),
    "composed adamsrt": (
        lambda: so.transport_moments(so.scale_by_adams(eps=0.0, groups=KERNELS), KERNELS),
        1,
    ),
    "composed sgdmrt": (lambda: so.transport_moments(optax.trace(0.9), KERNELS), 2),
    "adam without radial terms": (
        lambda: so.transport_moments(optax.scale_by_adam(eps=0.0), KERNELS),
        1,
    ),
}


def train(tx, params, factors, power, steps, state=None):
    """Trains with the learning rate of each kernel column multiplied by factor^power."""
    state = tx.init(params) if state is None else state

    @jax.jit
    def step(params, state, seed_grads):
        updates, state = tx.update(seed_grads, state, params)
        for name, factor in factors.items():
            updates[name]["kernel"] = updates[name]["kernel"] * factor**power
        return jax.tree.map(lambda p, u: p - 0.02 * u, params, updates), state

    path = []
    for seed in steps:
        params, state = step(params, state, jax.grad(network_loss)(params, seed))
        path.append(params)
    return path, state


def scaled(params, factors):
    return {
        name: {**layer, "kernel": layer["kernel"] * factors[name]} for name, layer in params.items()
    }


def assert_same_directions(path, other):
    for a, b in zip(path, other, strict=True):
        for name in a:
            u, v = (p[name]["kernel"] / np.linalg.norm(p[name]["kernel"], axis=0) for p in (a, b))
            np.testing.assert_allclose(u, v, atol=1e-10)
            np.testing.assert_allclose(a[name]["scale"], b[name]["scale"], atol=1e-10)


ONES = {"first": np.ones(6), "second": np.ones(4)}
FACTORS = {
    "first": np.exp(np.random.default_rng(5).normal(size=6)),
    "second": np.exp(np.random.default_rng(6).normal(size=4)),
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_scaling_initial_weights_leaves_the_directions(name, x64):
    make, power = DIRECTIONS[name]
    path, _ = train(make(), network(), ONES, power, range(20))
    other, _ = train(make(), scaled(network(), FACTORS), FACTORS, power, range(20))
    assert_same_directions(path, other)
    start, end = network()["first"]["kernel"], path[-1]["first"]["kernel"]
    moved = geometry.angle(start, end, so.per_filter())
    assert moved.max() > 0.05  # the law would be trivial for weights that hardly move


@pytest.mark.parametrize("name", DIRECTIONS)
def test_scaling_weights_in_mid_training_leaves_the_directions(name, x64):
    """Scaling the weights does not change later directions, because the moments are rescaled."""
    make, power = DIRECTIONS[name]
    first, state = train(make(), network(), ONES, power, range(10))
    path, _ = train(make(), first[-1], ONES, power, range(10, 20), state)
    other, _ = train(make(), scaled(first[-1], FACTORS), FACTORS, power, range(10, 20), state)
    assert_same_directions(path, other)


def test_without_transport_the_directions_change(x64):
    """The law above can fail: AdamS does not rescale its moments."""
    tx = so.scale_by_adams(eps=0.0, groups=KERNELS)
    first, state = train(tx, network(), ONES, 1, range(10))
    path, _ = train(tx, first[-1], ONES, 1, range(10, 20), state)
    other, _ = train(tx, scaled(first[-1], FACTORS), FACTORS, 1, range(10, 20), state)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        assert_same_directions(path, other)


def test_scan_stacked_layers_are_the_unstacked_ones(x64):
    def layer(x, kernel):
        return jnp.tanh(x @ (kernel / jnp.linalg.norm(kernel, axis=0))), None

    rng = np.random.default_rng(0)
    kernels = jnp.asarray(rng.normal(size=(3, 5, 5)))
    x, y = jnp.asarray(rng.normal(size=(8, 5))), jnp.asarray(rng.normal(size=(8, 5)))

    def stacked_loss(params):
        return jnp.mean((jax.lax.scan(layer, x, params)[0] - y) ** 2)

    def unstacked_loss(params):
        hidden = x
        for kernel in params:
            hidden, _ = layer(hidden, kernel)
        return jnp.mean((hidden - y) ** 2)

    def fit(loss, params, group):
        tx = so.adamsrt(0.1, groups=group)
        state = tx.init(params)

        @jax.jit
        def step(params, state):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(5):
            params, state = step(params, state)
        return params

    stacked = fit(stacked_loss, kernels, so.RadialGroup(index_axes=(0, -1)))
    unstacked = fit(unstacked_loss, list(kernels), so.per_filter())
    np.testing.assert_allclose(stacked, jnp.stack(unstacked), rtol=1e-11)
    wrong = fit(stacked_loss, kernels, so.per_filter())  # also sums over the layers
    assert np.abs(wrong - stacked).max() > 1e-3


# --- weights far from their sphere ------------------------------------------------------


@pytest.mark.parametrize(
    ("params_dtype", "updates_dtype", "length", "turned"),
    [
        ("bfloat16", "bfloat16", 1024.0, 0.02),
        ("float32", "bfloat16", 1024.0, 0.02),
        ("bfloat16", "float32", 1024.0, 0.02),
        ("float32", "float32", 1e6, 1e-4),
        ("bfloat16", "bfloat16", 1e-3, 0.02),
    ],
)
def test_adamg_reaches_its_sphere_from_afar(params_dtype, updates_dtype, length, turned):
    """AdamG reaches its sphere from any radius, though low precision limits each update."""
    x = np.random.default_rng(0).normal(size=(64, 128))
    x = jnp.asarray(length * x / np.linalg.norm(x), params_dtype)
    tx = so.adamg(0.1, groups=so.per_layer())
    *_, end = run(tx, x, [jnp.zeros_like(x, updates_dtype)] * 12)
    assert geometry.norm(end, so.per_layer()) == pytest.approx(1, rel=1e-2)
    assert geometry.angle(end.astype("float32"), x.astype("float32"), so.per_layer()) < turned


# --- the state's size -------------------------------------------------------------------


def cifar_resnet18():
    """The shapes of the parameters of a CIFAR ResNet18."""
    shapes = {"stem": {"kernel": (3, 3, 3, 64), "scale": (64,), "bias": (64,)}}
    width = 64
    for stage, channels in enumerate((64, 128, 256, 512)):
        for block in range(2):
            for conv in range(2):
                cin = width if conv == 0 else channels
                norm = {"scale": (channels,), "bias": (channels,)}
                name = f"stage{stage}_block{block}_conv{conv}"
                shapes[name] = {"kernel": (3, 3, cin, channels), **norm}
            if width != channels:
                shapes[f"stage{stage}_shortcut"] = {"kernel": (1, 1, width, channels), **norm}
            width = channels
    shapes["head"] = {"kernel": (512, 10), "bias": (10,)}
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=is_shape)


def bytes_of(tx, params):
    leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
    assert all(leaf.size > 0 for leaf in leaves)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def test_state_is_half_of_adams():
    params = cifar_resnet18()
    assert sum(math.prod(p.shape) for p in jax.tree.leaves(params)) == 11_173_962
    groups = so.groups_by_path({r"(stem|stage.*)/kernel": so.per_filter()})
    ratio = bytes_of(so.adamsrt(0.1, groups=groups), params) / bytes_of(optax.adam(0.1), params)
    assert ratio <= 0.52


# --- bad input --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("adams", {"b1": 1.0}, r"adams: expected b1 in \[0, 1\), found 1\.0"),
        ("adamsrt", {"b2": 1.5}, r"adamsrt: expected b2 in \[0, 1\), found 1\.5"),
        ("adamg", {"b1": -0.1}, r"expected b1 in \[0, 1\), found -0\.1"),
        ("adams", {"eps": -1e-8}, r"expected eps in \[0, inf\), found -1e-08"),
        ("sgdmrt", {"momentum": 1.0}, r"sgdmrt: expected momentum in \[0, 1\), found 1\.0"),
        ("sgdmrt", {"dampening": -1.0}, r"sgdmrt: expected dampening in \[0, 1\), found -1\.0"),
        ("adamsrt", {"weight_decay": -0.1}, r"adamsrt: expected weight_decay in \[0, inf\)"),
        ("adams", {"learning_rate": -0.1}, r"adams: expected learning_rate in \[0, inf\)"),
        ("adamg", {"learning_rate": float("nan")}, r"adamg: expected learning_rate .* found nan"),
        (
            "adams",
            {"b2": jnp.asarray(0.999, "bfloat16")},
            r"found 1\.0 in bfloat16\. .*hyperparam_dtype",
        ),
    ],
)
def test_numbers_out_of_range(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        OPTIMIZERS[name](**{"learning_rate": 0.1, "groups": True, **kwargs})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"b1": lambda count: 0.9}, r"expected b1 to be a number.*optax\.inject_hyperparams"),
        ({"b1": "0.9"}, r"expected b1 to be a number, found '0\.9'\.$"),
        ({"eps": True}, r"expected eps to be a number, found True\.$"),
        ({"learning_rate": None}, r"expected learning_rate to be a number, found None\.$"),
        ({"weight_decay": np.ones(2)}, r"expected weight_decay to be a number, found array"),
    ],
)
def test_what_is_not_a_number(kwargs, message):
    with pytest.raises(TypeError, match=message):
        so.adams(**{"learning_rate": 0.1, "groups": True, **kwargs})


@pytest.mark.parametrize("name", ["adams", "adamsrt"])
def test_state_of_other_groups_is_refused(name):
    params = {"a": {"kernel": jnp.ones((3, 4))}}
    state = OPTIMIZERS[name](0.1, groups=so.per_layer()).init(params)
    tx = OPTIMIZERS[name](0.1, groups=so.per_filter())
    message = r"a/kernel of shape \(3, 4\): expected state of shape \(4,\), found \(\)\. The state"
    with pytest.raises(ValueError, match=message):
        tx.update(params, state, params)
    more = {**params, "b": jnp.ones(2)}
    with pytest.raises(
        ValueError, match=r"expected state with the paths of the.* missing paths \['b'\]"
    ):
        tx.update(more, state, more)


def test_decay_of_groups_acts_through_the_carried_momentum_only():
    """Without gradients, L2 acts 1 - momentum times as strongly as with SGD, as documented."""
    x, decay, steps = jnp.array([3.0, 4.0]), 1e-3, 2000
    for tx, factor in (
        (so.sgdmrt(0.1, 0.9, groups=so.per_layer(), weight_decay=decay), 1.0),
        (optax.chain(optax.add_decayed_weights(decay), optax.sgd(0.1, 0.9)), 10.0),
    ):
        state = tx.init(x)

        def body(carry, _, tx=tx):
            params, state = carry
            updates, state = tx.update(jnp.zeros(2), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(body, (x, state), length=steps)
        shrunk = -np.log(np.linalg.norm(params) / 5)
        assert shrunk == pytest.approx(0.1 * decay * steps * factor, rel=0.02)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_must_be_said(name):
    with pytest.raises(TypeError, match="required keyword-only argument: 'groups'"):
        OPTIMIZERS[name](0.1)
