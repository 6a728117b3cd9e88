"""Detection is right for every leaf of the usual architectures, and names bad input."""

import contextlib
import functools
import itertools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import precision
from flax import nnx

import spherical_optax as so
from spherical_optax import _trees, geometry
from spherical_optax.detection import _flow
from spherical_optax.detection._experiment import Experiment
from spherical_optax.groups import joints_of

FILTER, LAYER = so.per_filter(), so.per_layer()
KEY = jax.random.key(0)
IMAGES = jax.random.normal(KEY, (4, 8, 8, 3))
VECTORS = jax.random.normal(KEY, (8, 6))
SEQUENCES = jax.random.normal(KEY, (3, 5, 8))
TOKENS = jax.random.randint(KEY, (4, 6), 0, 20)


def linen(module, x, **kwargs):
    """A Linen module's forward pass in training mode, its parameters and its input."""
    variables = module.init(KEY, x)
    stats = {key: value for key, value in variables.items() if key != "params"}

    def fn(params, x):
        return module.apply({"params": params, **stats}, x, mutable=list(stats))[0]

    return fn, variables["params"], x, kwargs


def nnx_model(model, x):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def fn(params, rest, x):
        return nnx.merge(graphdef, params, rest)(x)

    return functools.partial(_call, fn, rest), params, x, {}


def _call(fn, rest, params, x):
    return fn(params, jax.tree.map(lambda a: a, rest), x)


BatchNorm = functools.partial(nn.BatchNorm, use_running_average=False)


class ResNet(nn.Module):
    """BatchNorm, zero-initialized last scales, depthwise convolutions and a shortcut."""

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, use_bias=False)
        x = nn.relu(BatchNorm()(conv(8, (3, 3), name="stem")(x)))
        for block, width in enumerate((8, 12)):
            y = nn.relu(BatchNorm()(conv(width, (1, 1), name=f"wide{block}")(x)))
            depthwise = conv(width, (3, 3), feature_group_count=width, name=f"deep{block}")
            y = BatchNorm(scale_init=nn.initializers.zeros)(depthwise(y))
            if y.shape != x.shape:
                x = BatchNorm()(conv(width, (1, 1), name=f"shortcut{block}")(x))
            x = nn.relu(x + y)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class ConvNet(nn.Module):
    norm: str
    bias: bool = True

    @nn.compact
    def __call__(self, x):
        make = {
            "batch": BatchNorm,
            "instance": nn.InstanceNorm,
            "group": functools.partial(nn.GroupNorm, 4),
            "none": lambda: lambda x: x,
        }[self.norm]
        for layer in range(2):
            x = nn.Conv(8, (3, 3), use_bias=self.bias, name=f"conv{layer}")(x)
            x = nn.relu(make()(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class MLP(nn.Module):
    norm: type
    bias: bool

    @nn.compact
    def __call__(self, x):
        for layer, width in enumerate((16, 12)):
            x = nn.gelu(self.norm()(nn.Dense(width, use_bias=self.bias, name=f"fc{layer}")(x)))
        return nn.Dense(3, name="head")(x)


class MobileNet(nn.Module):
    """Clipped ReLU, squeeze and excitation, depthwise convolutions, and a large epsilon."""

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(BatchNorm, epsilon=1e-3)
        x = nn.relu6(norm()(conv(8, (3, 3), name="stem")(x)))
        for block, width in enumerate((8, 12)):
            wide = 4 * x.shape[-1]
            y = nn.relu6(norm()(conv(wide, (1, 1), name=f"wide{block}")(x)))
            depthwise = conv(wide, (3, 3), feature_group_count=wide, name=f"deep{block}")
            y = nn.relu6(norm()(depthwise(y)))
            squeezed = nn.relu(nn.Dense(4, name=f"squeeze{block}")(y.mean((1, 2))))
            gate = nn.sigmoid(nn.Dense(wide, name=f"excite{block}")(squeezed))
            y = norm()(conv(width, (1, 1), name=f"narrow{block}")(y * gate[:, None, None]))
            x = x + y if x.shape == y.shape else y
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class ConvNeXt(nn.Module):
    """LayerNorm over channels, depthwise convolutions with bias, zero-initialized LayerScale."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Conv(8, (2, 2), strides=2, name="stem")(x))
        for block in range(2):
            y = nn.Conv(8, (7, 7), feature_group_count=8, name=f"deep{block}")(x)
            y = nn.gelu(nn.Dense(32, name=f"up{block}")(nn.LayerNorm()(y)))
            y = nn.Dense(8, name=f"down{block}")(y)
            x = x + y * self.param(f"scale{block}", nn.initializers.zeros, (8,))
        return nn.Dense(4, name="head")(nn.LayerNorm()(x.mean((1, 2))))


class WeightNormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.relu(nn.WeightNorm(nn.Dense(8, name="v"))(x)))


class Embedded(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(3, name="head")(nn.LayerNorm()(nn.Embed(20, 8, name="embed")(tokens)))


class Transformer(nn.Module):
    normalize: bool
    bias: bool

    @nn.compact
    def __call__(self, x):
        attention = nn.MultiHeadDotProductAttention(
            num_heads=2,
            qkv_features=12,
            out_features=8,
            normalize_qk=self.normalize,
            use_bias=self.bias,
            name="attention",
        )
        x = x + attention(nn.LayerNorm()(x))
        x = x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(16, name="up")(nn.LayerNorm()(x))))
        return nn.Dense(3, name="head")(nn.LayerNorm()(x))


class Ladder(nn.Module):
    """The main path is not normalized; branches have a norm at the start and one inside."""

    depth: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="stem")(x)
        for level in range(self.depth):
            y = nn.Dense(8, name=f"in{level}")(nn.LayerNorm()(x))
            x = x + nn.Dense(8, name=f"out{level}")(nn.silu(nn.LayerNorm()(y)))
            x = nn.tanh(nn.Dense(8, name=f"down{level}")(x))
        return nn.Dense(3, name="head")(x)


class Residual(nn.Module):
    """The block of diffusion models; without `time`, that of autoencoders."""

    channels: int
    bias: bool = True

    @nn.compact
    def __call__(self, x, time=None):
        y = nn.silu(nn.GroupNorm(2, name="norm0")(x))
        y = nn.Conv(self.channels, (3, 3), use_bias=self.bias, name="conv0")(y)
        if time is not None:
            y = y + nn.Dense(self.channels, name="time")(nn.silu(time))[:, None, None]
        y = nn.silu(nn.GroupNorm(2, name="norm1")(y))
        return x + nn.Conv(x.shape[-1], (3, 3), use_bias=self.bias, name="conv1")(y)


class Diffusion(nn.Module):
    bias: bool

    @nn.compact
    def __call__(self, x):
        time = nn.Dense(6, name="time")(x[:, 0, 0])
        x = nn.Conv(4, (3, 3), name="stem")(x)
        for block in range(2):
            x = nn.tanh(Residual(4, self.bias, name=f"block{block}")(x, time))
        return nn.Conv(3, (1, 1), name="head")(x)


class Autoencoder(nn.Module):
    """Four levels down and four up, with GroupNorm in the branches only."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        for level in range(4):
            x = Residual(4, name=f"encode{level}")(x)
            x = nn.Conv(4, (2, 2), strides=2 if level < 2 else 1, name=f"down{level}")(x)
        for level in range(4):
            x = Residual(4, name=f"decode{level}")(x)
            x = nn.Conv(4, (3, 3), name=f"up{level}")(jnp.repeat(x, 1 + level // 2, axis=1))
        return nn.Conv(3, (1, 1), name="head")(nn.tanh(x))


class PreNorm(nn.Module):
    width: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(20, self.width, name="embed")(tokens)
        for block in range(2):
            y = nn.Dense(16, name=f"up{block}")(nn.RMSNorm()(x))
            x = x + nn.Dense(self.width, name=f"down{block}")(nn.gelu(y))
        return nn.Dense(5, name="head")(nn.RMSNorm()(x))


class Critic(nn.Module):
    """A head with weight normalization and a single output."""

    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(1, name="v"))(nn.tanh(nn.Dense(8, name="fc")(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)])
        self.layer_norm = nnx.LayerNorm(6, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
        return self.layers[1](nnx.relu(self.layer_norm(self.layers[0](x))))


def batch_norm(x, epsilon=1e-5):
    return (x - x.mean(0)) / jnp.sqrt(x.var(0) + epsilon)


def rms_norm(x):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def zeros(**shapes):
    return {name: jnp.zeros(shape) for name, shape in shapes.items()}


def stacked(params, x):
    def layer(x, p):
        y = batch_norm(x @ p["batch"]["kernel"] + p["batch"]["bias"])
        return x + jnp.tanh(rms_norm(y @ p["rms"]["kernel"] + p["rms"]["bias"])), None

    return jax.lax.scan(layer, x, params)[0]


def stacked_group_norm(params, x):
    def layer(x, kernel):
        y = (x @ kernel).reshape(*x.shape[:-1], 3, 2)
        return x + jnp.tanh(rms_norm(y).reshape(x.shape)), None

    return jax.lax.scan(layer, x, params["kernel"])[0]


def experts(params, x):
    gates = jax.nn.softmax(x @ params["router"])
    hidden = jax.nn.gelu(rms_norm(jnp.einsum("bd,edh->beh", x, params["up"])))
    return jnp.einsum("be,beh,ehd->bd", gates, hidden, params["down"])


def residual(params, x):
    return batch_norm(x + x @ params["kernel"])


def keras_like(params, x):
    """A model whose parameters are a list of arrays, as in Keras."""
    kernel, scale, shift, hidden, bias, norm, head = params
    x = jax.nn.relu(batch_norm(x @ kernel, 1e-3) * scale + shift)
    x = jax.nn.relu(rms_norm(x @ hidden + bias) * norm)
    return x @ head


JOINT_BLOCKS = so.per_channel_block(4, joint="*")
JOINT_LAYER = so.per_layer(joint="*")
HEADS = {"query/kernel": so.per_head(axis=1), "key/kernel": so.per_head(axis=1)}
JOINT_HEADS = {
    f"attention/{name}/{leaf}": so.RadialGroup(index_axes=(axis,), joint="*")
    for name in ("query", "key")
    for leaf, axis in (("kernel", 1), ("bias", 0))
}

MODELS = {
    "resnet": (
        lambda: linen(ResNet(), IMAGES),
        {f"{name}/kernel": FILTER for name in ("stem", "wide0", "wide1", "deep0", "deep1")}
        | {"shortcut1/kernel": FILTER},
    ),
    "MobileNet": (
        lambda: linen(MobileNet(), IMAGES),
        {"stem/kernel": FILTER}
        | {f"{name}{i}/kernel": FILTER for name in ("wide", "deep", "narrow") for i in (0, 1)},
    ),
    "ConvNeXt": (
        lambda: linen(ConvNeXt(), IMAGES),
        {
            f"{name}/{leaf}": JOINT_LAYER
            for name in ("stem", "deep0", "deep1")
            for leaf in ("kernel", "bias")
        },
    ),
    "a layer before ReLU and a layer before RMSNorm": (
        lambda: (
            lambda p, x: rms_norm(jax.nn.relu(x @ p["a"]["w"] + p["a"]["b"]) @ p["b"]["w"]),
            {"a": zeros(w=(6, 8), b=(8,)), "b": zeros(w=(8, 5))},
            VECTORS,
            {},
        ),
        {"a/w": JOINT_LAYER, "a/b": JOINT_LAYER, "b/w": LAYER},
    ),
    "deep without a norm": (
        lambda: (
            lambda p, x: functools.reduce(lambda x, w: x + jax.nn.relu(x @ w), p["w"], x),
            {"w": [jnp.zeros((6, 6))] * 100},
            VECTORS,
            {},
        ),
        {},
    ),
    "bias before BatchNorm": (
        lambda: linen(ConvNet("batch"), IMAGES),
        {"conv0/kernel": FILTER, "conv1/kernel": FILTER},
    ),
    "constant images": (
        lambda: linen(ConvNet("batch"), jnp.ones((4, 8, 8, 3))),
        {"conv0/kernel": FILTER, "conv1/kernel": FILTER},
    ),
    "constant vectors": (
        lambda: linen(BatchNormed(1e-5), jnp.ones((8, 6))),
        {"hidden/kernel": FILTER},
    ),
    "BatchNorm with a large epsilon": (
        lambda: linen(BatchNormed(1e-3), VECTORS),
        {"hidden/kernel": FILTER},
    ),
    "InstanceNorm": (
        lambda: linen(ConvNet("instance"), IMAGES),
        {"conv0/kernel": FILTER, "conv1/kernel": FILTER},
    ),
    "GroupNorm": (
        lambda: linen(ConvNet("group", bias=False), IMAGES),
        {"conv0/kernel": so.per_channel_block(4), "conv1/kernel": so.per_channel_block(4)},
    ),
    "GroupNorm with bias": (
        lambda: linen(ConvNet("group"), IMAGES),
        {f"conv{i}/{leaf}": JOINT_BLOCKS for i in (0, 1) for leaf in ("kernel", "bias")},
    ),
    "LayerNorm": (
        lambda: linen(MLP(nn.LayerNorm, bias=False), VECTORS),
        {"fc0/kernel": LAYER, "fc1/kernel": LAYER},
    ),
    "LayerNorm with bias": (
        lambda: linen(MLP(nn.LayerNorm, bias=True), VECTORS),
        {f"fc{i}/{leaf}": JOINT_LAYER for i in (0, 1) for leaf in ("kernel", "bias")},
    ),
    "RMSNorm": (
        lambda: linen(MLP(nn.RMSNorm, bias=False), VECTORS),
        {"fc0/kernel": LAYER, "fc1/kernel": LAYER},
    ),
    "RMSNorm with bias": (
        lambda: linen(MLP(nn.RMSNorm, bias=True), VECTORS),
        {f"fc{i}/{leaf}": JOINT_LAYER for i in (0, 1) for leaf in ("kernel", "bias")},
    ),
    "WeightNorm": (lambda: linen(WeightNormed(), VECTORS), {"v/kernel": FILTER}),
    "embedding into LayerNorm": (
        lambda: linen(Embedded(), TOKENS),
        {"embed/embedding": so.RadialGroup(index_axes=(0,))},
    ),
    "QK-norm": (
        lambda: linen(Transformer(normalize=True, bias=False), SEQUENCES),
        {f"attention/{path}": group for path, group in HEADS.items()},
    ),
    "QK-norm with bias": (
        lambda: linen(Transformer(normalize=True, bias=True), SEQUENCES),
        JOINT_HEADS,
    ),
    "attention without QK-norm": (
        lambda: linen(Transformer(normalize=False, bias=True), SEQUENCES),
        {},
    ),
    "stacked by scan": (
        lambda: (
            stacked,
            {
                "batch": zeros(kernel=(3, 6, 7), bias=(3, 7)),
                "rms": zeros(kernel=(3, 7, 6), bias=(3, 6)),
            },
            VECTORS,
            {},
        ),
        {
            "batch/kernel": so.RadialGroup(index_axes=(0, -1)),
            "rms/kernel": so.RadialGroup(index_axes=(0,), joint="*"),
            "rms/bias": so.RadialGroup(index_axes=(0,), joint="*"),
        },
    ),
    "stacked GroupNorm": (
        lambda: (stacked_group_norm, zeros(kernel=(4, 6, 6)), VECTORS, {}),
        {"kernel": so.RadialGroup(index_axes=(0, -1), num_blocks=3)},
    ),
    "mixture of experts": (
        lambda: (experts, zeros(router=(6, 4), up=(4, 6, 16), down=(4, 16, 6)), VECTORS, {}),
        {"up": so.RadialGroup(index_axes=(0,))},
    ),
    "residual before the norm": (lambda: (residual, zeros(kernel=(6, 6)), VECTORS, {}), {}),
    "no norm": (lambda: linen(ConvNet("none"), IMAGES), {}),
    "scales and biases if asked": (
        lambda: linen(ConvNet("batch"), IMAGES, vectors=True),
        {
            "conv0/kernel": FILTER,
            "conv1/kernel": FILTER,
            "BatchNorm_0/scale": JOINT_LAYER,
            "BatchNorm_0/bias": JOINT_LAYER,
        },
    ),
    **{
        f"ladder of {depth}": (
            functools.partial(lambda depth: linen(Ladder(depth), VECTORS), depth),
            {f"in{i}/{leaf}": JOINT_LAYER for i in range(depth) for leaf in ("kernel", "bias")},
        )
        for depth in (3, 4, 10)
    },
    **{
        f"pre-norm transformer of width {width}": (
            functools.partial(lambda width: linen(PreNorm(width), TOKENS), width),
            {},
        )
        for width in (64, 2048)
    },
    "diffusion block": (
        lambda: linen(Diffusion(bias=True), IMAGES),
        {
            f"block{block}/{name}/{leaf}": so.per_channel_block(2, joint="*")
            for block in (0, 1)
            for name in ("conv0", "time")
            for leaf in ("kernel", "bias")
        },
    ),
    "diffusion block, one bias": (
        lambda: linen(Diffusion(bias=False), IMAGES),
        {
            f"block{block}/{name}": so.per_channel_block(2, joint="*")
            for block in (0, 1)
            for name in ("conv0/kernel", "time/kernel", "time/bias")
        },
    ),
    "autoencoder of four levels": (
        lambda: linen(Autoencoder(), IMAGES),
        {
            f"{name}{level}/conv0/{leaf}": so.per_channel_block(2, joint="*")
            for name in ("encode", "decode")
            for level in range(4)
            for leaf in ("kernel", "bias")
        },
    ),
    "kernel with one output": (lambda: linen(Critic(), VECTORS), {"v/kernel": LAYER}),
    "list of arrays, as Keras has": (
        lambda: (
            keras_like,
            [jnp.zeros(s) for s in ((6, 8), (8,), (8,), (8, 12), (12,), (12,), (12, 3))],
            VECTORS,
            {},
        ),
        {"0": FILTER, "3": JOINT_LAYER, "4": JOINT_LAYER},
    ),
    "NNX": (
        lambda: nnx_model(Nnx(nnx.Rngs(0)), IMAGES),
        {"conv/kernel": FILTER, "layers/0/kernel": JOINT_LAYER, "layers/0/bias": JOINT_LAYER},
    ),
    "integers among the leaves": (
        lambda: (
            lambda p, x: batch_norm(x @ p["kernel"])[:, p["order"]] @ p["head"],
            zeros(kernel=(6, 4), head=(4, 2)) | {"order": jnp.array([2, 0, 1, 3])},
            VECTORS,
            {},
        ),
        {"kernel": FILTER},
    ),
}


class BatchNormed(nn.Module):
    epsilon: float

    @nn.compact
    def __call__(self, x):
        x = BatchNorm(epsilon=self.epsilon)(nn.Dense(8, name="hidden")(x))
        return nn.Dense(3, name="head")(nn.relu(x))


def without_labels(groups, params):
    """The groups by path, with `*` for each joint label, and the sets of paths with one label."""
    leaves = _trees.visible_leaves(params)
    plain, together = {}, {}
    for joint in joints_of(groups, params):
        for i, group in joint.items():
            label = None if group.joint is None else "*"
            plain[leaves[i].path] = so.RadialGroup(group.index_axes, group.num_blocks, label)
            if group.joint is not None:
                together.setdefault(group.joint, set()).add(leaves[i].path)
    return plain, list(together.values())


LARGE = (
    "MobileNet",
    "autoencoder of four levels",
    "deep without a norm",
    "ladder of 4",
    "ladder of 10",
    "diffusion block",
)


def quiet(warned):
    """Expects the warning that no group was found if `warned`."""
    return pytest.warns(UserWarning, match="no group is") if warned else contextlib.nullcontext()


@pytest.mark.filterwarnings("ignore:scatter inputs")  # NNX's statistics stay float32
@pytest.mark.parametrize(
    ("name", "dtype"),
    [pytest.param(name, "float32", marks=[pytest.mark.slow] * (name in LARGE)) for name in MODELS]
    + [("NNX", "float64"), pytest.param("ConvNeXt", "float64", marks=pytest.mark.slow)],
)
def test_every_leaf_is_right(name, dtype):
    with precision(dtype):
        make, expected = MODELS[name]
        fn, params, x, kwargs = make()
        if dtype == "float64":
            cast = lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a  # noqa: E731
            params, x = jax.tree.map(cast, (params, x))
        with quiet(not expected):
            found = so.find_radial_groups(fn, params, x, explain=True, **kwargs)
        groups, joint = without_labels(found, params)
        assert groups == expected
        blocks = 2 if "diffusion" in name else 1
        assert all(len({(*path.split("/")[:-blocks],) for path in paths}) == 1 for paths in joint)
        # Deviations of invariant groups and of others differ by orders of magnitude.
        assert found.invariant_up_to < (1e-3 if dtype == "float32" else 1e-5)
        assert found.others_from > 0.03
        assert found.forward_passes <= 27


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_of_a_random_loss_are_orthogonal(dtype):
    """Where epsilon is negligible, the gradient of every group found is tangent."""
    with precision(dtype):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6)), dtype)

        def fn(params, x):
            x = x @ params["batch"]["kernel"]
            x = jnp.tanh((x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-12))
            x = x @ params["rms"]["kernel"] + params["rms"]["bias"]
            return jnp.tanh(x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)) ** 2

        rng = np.random.default_rng(1)
        make = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
        params = {"batch": {"kernel": make(6, 8)}, "rms": {"kernel": make(8, 5), "bias": make(5)}}
        groups = so.find_radial_groups(fn, params, x)
        grads = jax.grad(lambda p: jnp.vdot(make(16, 5), fn(p, x)))(params)
        x_leaves, g_leaves = jax.tree.leaves(params), jax.tree.leaves(grads)
        joints = joints_of(groups, params)
        assert sum(len(joint) for joint in joints) == 3
        for joint in joints:
            g, p = ({i: leaves[i] for i in joint} for leaves in (g_leaves, x_leaves))
            size = geometry.norm(g, joint) * geometry.norm(p, joint)
            bound = 1e-4 if dtype == "float32" else 1e-9
            assert np.all(np.abs(geometry.inner(g, p, joint)) <= bound * size)


@pytest.mark.slow
def test_found_groups_train():
    fn, params, x, _ = MODELS["GroupNorm with bias"][0]()
    tx = so.adamsrt(0.01, groups=so.find_radial_groups(fn, params, x))
    state = tx.init(params)
    grads = jax.grad(lambda p: (fn(p, x) ** 2).sum())(params)
    updates, state = tx.update(grads, state, params)
    assert state[1].nu["conv0"]["kernel"].shape == (4,)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


def test_the_callers_parameters_are_only_read():
    fn, params, x, _ = MODELS["LayerNorm"][0]()
    before = jax.tree.map(np.array, params)
    so.find_radial_groups(fn, params, x)
    jax.tree.map(np.testing.assert_array_equal, before, params)
    shapes = jax.eval_shape(lambda: params)
    assert so.find_radial_groups(fn, shapes, x) == so.find_radial_groups(fn, params, x)


def test_one_compilation(monkeypatch):
    compiled = []
    monkeypatch.setattr(jax, "jit", lambda f, jit=jax.jit, **kw: compiled.append(f) or jit(f, **kw))
    fn, params, x, _ = MODELS["LayerNorm"][0]()
    so.find_radial_groups(fn, params, x)
    assert [f.__name__ for f in compiled] == ["evaluate"]


def test_table_of_the_evidence():
    fn, params, x, _ = MODELS["bias before BatchNorm"][0]()
    found = so.find_radial_groups(fn, params, x, explain=True)
    table = so.describe_groups(params, found).splitlines()
    assert table[0].split()[-2:] == ["verdict", "deviations"]
    rows = {line.split()[0]: line for line in table[1:-1]}
    assert "no effect on the outputs" in rows["conv0/bias"]
    assert "invariant" in rows["conv0/kernel"]
    assert "axis 3 " in rows["conv0/kernel"]
    assert "not invariant" in rows["head/kernel"]
    assert "24 forward passes" in table[-1]


def test_unclear_leaves_are_named_and_get_no_group():
    """A layer that adds a small part of its input is only nearly invariant, so it gets no group."""

    def fn(params, x):
        return rms_norm(x @ params["kernel"] + 1e-3 * x)

    with pytest.warns(UserWarning, match=r"deviations in between for \['kernel \(whole .*no group"):
        groups = so.find_radial_groups(fn, zeros(kernel=(6, 6)), VECTORS)
    assert groups == {"kernel": None}


def test_a_stopped_gradient_does_not_pass_for_no_effect():
    def fn(params, x):
        y = batch_norm(x @ params["kernel"])
        return y + x @ jax.lax.stop_gradient(params["frozen"])

    params = zeros(kernel=(6, 6), frozen=(6, 6))
    found = so.find_radial_groups(fn, params, VECTORS, explain=True)
    verdicts = {finding.path: finding.verdict for finding in found.findings}
    assert verdicts["frozen"] == "not invariant: no gradient, but an effect on the outputs"
    assert found.groups == {"kernel": FILTER, "frozen": None}


# --- check_radial_groups ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "groups", "message"),
    [
        (
            "bias before BatchNorm",
            {"head/kernel": FILTER, "conv": FILTER},
            r"(?s)3 of 5 parameters.*conv0/bias of shape \(8,\): expected an invariant group, "
            r"found no effect.*head/kernel of shape \(8, 3\): .*a deviation of .*\. None tried is",
        ),
        (
            "bias before BatchNorm",
            {"conv0/kernel": LAYER},
            r"conv0/kernel of shape \(3, 3, 3, 8\): expected the finest invariant groups, found "
            r"so\.per_layer\(\)\. Use so\.per_filter\(\), which is finer",
        ),
        (
            "LayerNorm with bias",
            {"fc0/kernel": LAYER},
            r"fc0/kernel of shape \(6, 16\): expected an invariant group, found a deviation of .* "
            r"for so\.per_layer\(\)\. Use .*joint='fc0'\), which is invariant",
        ),
        (
            "GroupNorm",
            {"conv0/kernel": so.per_channel_block(2)},
            r"Use so\.per_channel_block\(4\), which is finer",
        ),
        (
            "QK-norm",
            {"query/kernel": FILTER},
            r"attention/query/kernel of shape \(8, 2, 6\).*Use so\.per_head\(axis=-2\), which is",
        ),
    ],
)
def test_wrong_masks_are_refused(name, groups, message):
    fn, params, x, _ = MODELS[name][0]()
    with pytest.raises(ValueError, match=message) as refused:
        so.check_radial_groups(fn, params, so.groups_by_path(groups), x)
    _, found, after = str(refused.value).partition("Rules that fit: ")
    if name == "bias before BatchNorm" and "head" in str(groups):
        assert not found
    else:
        rules = eval(after.splitlines()[0], {"so": so})  # as a user would paste them
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # names the leaves that the rules leave out
            so.check_radial_groups(fn, params, rules, x)


# --- bad input --------------------------------------------------------------------------

COUNTER = itertools.count()


@pytest.mark.parametrize(
    ("fn", "params", "error", "message"),
    [
        (lambda p, x: x @ p["k"] * jnp.nan, zeros(k=(6, 2)), ValueError, "finite outputs of fn"),
        (lambda p, x: None, zeros(k=(6, 2)), ValueError, "found no floating array"),
        (lambda p, x: (x @ p["k"]).argmax(), zeros(k=(6, 2)), ValueError, "no floating array"),
        (
            lambda p, x: (
                jax.random.bernoulli(jax.random.key(next(COUNTER)), shape=(6,)) * x @ p["k"]
            ),
            zeros(k=(6, 2)),
            ValueError,
            "two calls of fn differ. Turn dropout off, or give it a fixed key",
        ),
        (
            lambda p, x: x @ p["k"] * np.random.default_rng(next(COUNTER)).normal(size=2),
            zeros(k=(6, 2)),
            ValueError,
            "two calls of fn differ",
        ),
        (
            lambda p, x, train: x @ p["k"],
            zeros(k=(6, 2)),
            TypeError,
            r"called with params and 1 further arguments and raised: .*'train'.*Pass what fn needs",
        ),
        (
            lambda p, x: x,
            {"k": jnp.arange(3)},
            ValueError,
            r"floating leaves, found \[\('k', 'int32",
        ),
        (lambda p, x: x, {}, ValueError, r"expected parameters with floating leaves, found \[\]"),
    ],
)
def test_bad_forward_pass(fn, params, error, message):
    with pytest.raises(error, match=message):
        so.find_radial_groups(fn, params, VECTORS)


def test_nnx_variables_mutated_from_outside():
    graphdef, params, rest = nnx.split(Nnx(nnx.Rngs(0)), nnx.Param, ...)
    with pytest.raises(ValueError, match=r"mutates variables made outside.*copy=True"):
        so.find_radial_groups(lambda p, x: nnx.merge(graphdef, p, rest)(x), params, IMAGES)


# --- nothing found, or too little -------------------------------------------------------


def evaluated(params, x):
    """BatchNorm in evaluation mode, with running statistics."""
    return jax.nn.relu(0.3 * (x @ params["k"]) + 0.1)


@pytest.mark.parametrize(
    ("fn", "x", "message"),
    [
        (evaluated, VECTORS, r"no group is radially invariant.*BatchNorm in evaluation mode"),
        (
            lambda p, x: (batch_norm(x @ p["k"]), {"mean": (x @ p["k"]).mean(0)}),
            VECTORS,
            r"no group .*returns updated statistics with the outputs",
        ),
        (
            lambda p, x: (batch_norm(x @ p["k"]) ** 2).mean() + 0.01 * (p["k"] ** 2).sum(),
            VECTORS,
            r"no group .*loss with L2",
        ),
        (
            lambda p, x: x[:1] * 0 + batch_norm(x[:1] @ p["k"]),
            VECTORS,
            r"1 of 1 kernels have no effect on the outputs, for example k.*batch of one",
        ),
    ],
    ids=["evaluation mode", "statistics returned", "L2", "one sample"],
)
def test_warns_where_nothing_is_found(fn, x, message):
    with pytest.warns(UserWarning, match=message):
        groups = so.find_radial_groups(fn, zeros(k=(6, 6)), x)
    assert groups == {"k": None}


def test_scaling_that_changes_the_outputs_is_reported_with_its_number(monkeypatch):
    """The confirmation decides: if it sees a change, the leaf gets no group and is reported."""
    fn, params, x, _ = MODELS["resnet"][0]()
    paths = [leaf.path for leaf in _trees.visible_leaves(params)]

    def change(self, number, joints, leaves=()):
        return 0.5 * any(paths[i] == "deep1/kernel" for joint in joints for i in joint)

    monkeypatch.setattr(Experiment, "change", change)
    with pytest.warns(UserWarning, match=r"they change for \['deep1/kernel \(5e-01\)'\]"):
        groups = so.find_radial_groups(fn, params, x)
    found, _ = without_labels(groups, params)
    assert found == {p: g for p, g in MODELS["resnet"][1].items() if p != "deep1/kernel"}


def test_check_names_evaluation_mode_where_all_groups_fail():
    message = (
        r"(?s)1 of 1 parameters.*None tried is invariant.*use training mode.*AdamH.*expected\.$"
    )
    with pytest.raises(ValueError, match=message):
        so.check_radial_groups(evaluated, zeros(k=(6, 6)), {"k": FILTER}, VECTORS)


def test_check_names_evaluation_mode_where_other_groups_hold():
    def fn(params, x):
        return evaluated(params, x), rms_norm(x @ params["kernel"])

    groups = {"k": FILTER, "kernel": LAYER}
    with pytest.raises(ValueError, match=r"(?s)1 of 2 parameters:\nk of shape.*use training mode"):
        so.check_radial_groups(fn, zeros(k=(6, 6), kernel=(6, 6)), groups, VECTORS)


def test_check_names_invariant_kernels_without_a_group():
    fn, params, x, _ = MODELS["bias before BatchNorm"][0]()
    mask = so.groups_by_path({"conv0/kernel": FILTER})
    message = r"are invariant, but have no group: conv1/kernel \(so\.per_filter\(\)\)"
    with pytest.warns(UserWarning, match=message):
        so.check_radial_groups(fn, params, mask, x)


def test_a_right_mask_passes_without_a_word():
    fn, params, x, _ = MODELS["GroupNorm with bias"][0]()
    rules = {r"(conv\d)/(kernel|bias)": so.per_channel_block(4, joint=r"\1")}
    so.check_radial_groups(fn, params, so.groups_by_path(rules), x)


def test_progress():
    lines = []
    fn, params, x, _ = MODELS["LayerNorm"][0]()
    so.find_radial_groups(fn, params, x, progress=lines.append)
    assert all(line.startswith("find_radial_groups: ") for line in lines)
    text = " ".join(lines)
    assert "gradient at point 4 of 4" in text
    assert "leaf 3 of 3: head/kernel" in text


def test_a_scan_reads_what_the_iteration_before_left():
    """Two values are swapped in a scan, so either may be added to the third."""

    def fn(a, b, c):
        swap = lambda carry, _: (carry[::-1], None)  # noqa: E731
        (first, _), _ = jax.lax.scan(swap, (a, b), None, length=2)
        return first + c

    assert _flow.sums(jax.make_jaxpr(fn)(1.0, 2.0, 3.0)) == [(0b011, 0b100)]


def test_epsilons_are_found_inside_other_programs():
    """Epsilons are found in a scan, under jit and under remat, even if the weights are tiny."""

    @jax.jit
    def norm(x):
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-3)

    def fn(params, x):
        step = jax.checkpoint(lambda x, w: (norm(x @ w), None))
        return jax.lax.scan(step, x, params)[0]

    tiny = 1e-2 * jax.random.normal(KEY, (3, 6, 6))
    assert so.find_radial_groups(fn, tiny, VECTORS) == so.RadialGroup((0,))
