"""Training steps with Flax: NNX's optimizer, Linen's train state, and metadata boxes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import spherical_optax as so

GROUPS = so.groups_by_path({r"conv/kernel": so.per_filter(), r"dense/kernel": so.per_filter()})
OPTIMIZERS = {
    "adams": lambda: so.adams(1e-2, groups=GROUPS, weight_decay=1e-3),
    "adamsrt": lambda: so.adamsrt(1e-2, groups=GROUPS, weight_decay=1e-3),
    "sgdmrt": lambda: so.sgdmrt(1e-1, groups=GROUPS),
    "adamg": lambda: so.adamg(1e-2, groups=GROUPS, other=optax.adam(1e-2)),
    "retract": lambda: optax.chain(optax.adam(1e-2), so.retract(GROUPS)),
}


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.dense = nnx.Linear(4, 5, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean(axis=(1, 2))
        return self.head(jnp.tanh(self.dense(x)))


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.LayerNorm(name="norm")(nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)))
        x = jnp.tanh(nn.Dense(5, use_bias=False, name="dense")(x.mean(axis=(1, 2))))
        return nn.Dense(3, name="head")(x)


def data():
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(8, 6, 6, 1)), jnp.float32)
    return images, jnp.asarray(rng.integers(3, size=8))


def loss_of(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nnx_and_linen_take_the_same_steps(name):
    images, labels = data()
    model = NnxModel(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, OPTIMIZERS[name](), wrt=nnx.Param)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    params = jax.tree.map(jnp.array, params)
    state = TrainState.create(apply_fn=LinenModel().apply, params=params, tx=OPTIMIZERS[name]())

    @nnx.jit
    def nnx_step(model, optimizer):
        grads = nnx.grad(lambda model: loss_of(model(images), labels))(model)
        optimizer.update(model, grads)

    @jax.jit
    def linen_step(state):
        grads = jax.grad(lambda p: loss_of(state.apply_fn({"params": p}, images), labels))(
            state.params
        )
        return state.apply_gradients(grads=grads)

    for _ in range(5):
        nnx_step(model, optimizer)
        state = linen_step(state)
    expected = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert jax.tree.structure(expected) == jax.tree.structure(state.params)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), expected, params)
    assert min(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.parametrize("how", ["masked", "partition"])
def test_nnx_with_part_of_the_parameters(how):
    """Masked leaves, which are empty variables, do not affect the others."""
    images, labels = data()
    tx = so.adamsrt(1e-2, groups=GROUPS)
    if how == "masked":
        tx = optax.masked(tx, lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    else:
        kinds = lambda p: jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", p)  # noqa: E731
        tx = optax.partition({"matrix": tx, "vector": optax.sgd(0.1)}, kinds)
    model = NnxModel(nnx.Rngs(0))
    before = jax.tree.map(jnp.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda model: loss_of(model(images), labels))(model)
    optimizer.update(model, grads)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    plain = so.adamsrt(1e-2, groups=GROUPS)
    pure = nnx.to_pure_dict(nnx.state(grads, nnx.Param))
    updates, _ = plain.update(pure, plain.init(before), before)
    expected = optax.apply_updates(before, updates)
    np.testing.assert_allclose(after["conv"]["kernel"], expected["conv"]["kernel"], rtol=1e-6)
    assert np.abs(after["head"]["bias"] - before["head"]["bias"]).max() > 0


def test_nnx_state_is_traced_once():
    images, labels = data()
    model = NnxModel(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, OPTIMIZERS["adamsrt"](), wrt=nnx.Param)
    traces = 0

    @nnx.jit
    def step(model, optimizer):
        nonlocal traces
        traces += 1
        grads = nnx.grad(lambda model: loss_of(model(images), labels))(model)
        optimizer.update(model, grads)

    for _ in range(3):
        step(model, optimizer)
    assert traces == 1


def test_groups_of_an_nnx_state_are_described():
    state = nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param)
    lines = so.describe_groups(state, GROUPS).splitlines()
    assert lines[1].split() == ["conv/kernel", "(3,", "3,", "1,", "4)", "4", "9", "-"]
    assert so.describe_groups(nnx.to_pure_dict(state), GROUPS).splitlines() == lines


@pytest.mark.parametrize("rest", ["statistics", "dropout"])
def test_a_whole_nnx_model_as_parameters(rest):
    rngs = nnx.Rngs(0)
    layers = {"kernel": nnx.Linear(2, 3, rngs=rngs)}
    layers |= {"norm": nnx.BatchNorm(3, rngs=rngs)} if rest == "statistics" else {}
    layers |= {"drop": nnx.Dropout(0.5, rngs=rngs)} if rest == "dropout" else {}
    model = nnx.Dict(**layers)
    where, found = (
        ("norm/mean", "BatchStat") if rest == "statistics" else ("drop/rngs/count", "RngCount")
    )
    groups = so.groups_by_path({"kernel/kernel": so.per_filter()})
    message = rf"{where}: expected an array of parameters, found a {found}\. Pass .*nnx\.Param"
    for params in (model, nnx.state(model)):
        for use in (so.adamsrt(0.1, groups=groups).init, lambda p: so.describe_groups(p, groups)):
            with pytest.raises(TypeError, match=message):
                use(params)


def test_an_nnx_model_of_parameters_alone():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    tx = so.adamsrt(0.1, groups=so.groups_by_path({"kernel": so.per_filter()}))
    grads = jax.tree.map(jnp.ones_like, model)
    updates, _ = tx.update(grads, tx.init(model), model)
    np.testing.assert_allclose(updates.bias[...], -0.1, rtol=1e-5)


def test_sharding_metadata_of_a_kernel_stays_off_the_reduced_state():
    """Per-group state does not keep a kernel's sharding metadata, which NNX copies to the state."""
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        model = nnx.Linear(4, 6, kernel_init=init, rngs=nnx.Rngs(0))
        groups = so.groups_by_path({"kernel": so.per_filter()})
        optimizer = nnx.Optimizer(model, so.adamsrt(0.1, groups=groups), wrt=nnx.Param)
        before = np.array(model.kernel[...])
        grads = nnx.grad(lambda model: model(jnp.ones((2, 4))).sum())(model)
        optimizer.update(model, grads)
    assert np.abs(model.kernel[...] - before).max() > 0


def test_boxed_linen_parameters():
    """Boxed parameters of `nn.with_partitioning` train like plain ones."""
    box = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model = nn.Dense(3, kernel_init=box)
    boxed = model.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    plain = nn.unbox(boxed)
    tx = so.adamsrt(0.1, groups=so.groups_by_path({"^kernel$": so.per_filter()}))

    def step(params):
        grads = jax.tree.map(jnp.cos, params)
        state = tx.init(params)
        for _ in range(2):
            updates, state = jax.jit(tx.update)(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    jax.tree.map(np.testing.assert_array_equal, nn.unbox(step(boxed)), step(plain))
