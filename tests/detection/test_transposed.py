"""Each framework's transposed and depthwise kernels have the groups of docs/groups.md."""

import flax.linen as nn
import jax
import pytest
from flax import nnx

import spherical_optax as so

X = jax.random.normal(jax.random.key(0), (8, 6, 6, 3))


def normalized(x):
    over = (0, 1, 2)
    return (x - x.mean(over)) / (x.var(over) + 1e-6) ** 0.5


def linen(transpose_kernel):
    net = nn.ConvTranspose(6, (4, 4), (2, 2), transpose_kernel=transpose_kernel, use_bias=False)
    params = net.init(jax.random.key(1), X)["params"]
    return lambda params, x: normalized(net.apply({"params": params}, x)), params


def of_nnx(transpose_kernel):
    layer = nnx.ConvTranspose(
        3, 6, (4, 4), (2, 2), transpose_kernel=transpose_kernel, use_bias=False, rngs=nnx.Rngs(0)
    )
    graphdef, params = nnx.split(layer, nnx.Param)
    return lambda params, x: normalized(nnx.merge(graphdef, params, copy=True)(x)), params


def haiku():
    hk = pytest.importorskip("haiku")
    net = hk.transform(lambda x: hk.Conv2DTranspose(6, 4, 2, with_bias=False)(x))
    return lambda params, x: normalized(net.apply(params, None, x)), net.init(jax.random.key(1), X)


def keras(monkeypatch, name, *args, **kwargs):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    layer = getattr(pytest.importorskip("keras").layers, name)(*args, use_bias=False, **kwargs)
    layer.build(X.shape)
    params = {v.path: v.value for v in layer.trainable_variables}

    def fn(params, x):
        return normalized(layer.stateless_call(list(params.values()), [], x)[0])

    return fn, params


CASES = {
    "linen": (lambda patch: linen(False), so.per_filter()),
    "linen, transposed": (lambda patch: linen(True), so.per_filter(axis=2)),
    "nnx": (lambda patch: of_nnx(False), so.per_filter()),
    "nnx, transposed": (lambda patch: of_nnx(True), so.per_filter(axis=2)),
    "haiku": (lambda patch: haiku(), so.per_filter(axis=2)),
    "keras": (lambda patch: keras(patch, "Conv2DTranspose", 6, 4, 2), so.per_filter(axis=2)),
    "keras, depthwise": (lambda patch: keras(patch, "DepthwiseConv2D", 3), so.per_filter(axis=2)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_group_of_the_table_is_the_one_found(name, monkeypatch):
    make, group = CASES[name]
    fn, params = make(monkeypatch)
    rules = so.groups_by_path({".": group})
    found = so.find_radial_groups(fn, params, X)
    assert so.describe_groups(params, found) == so.describe_groups(params, rules)
    so.check_radial_groups(fn, params, rules, X)
