"""Groups are found, and masks refused, at every precision of weights and computation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend import core

import spherical_optax as so
from spherical_optax.detection import _widened

X = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
PRECISIONS = [
    (weights, compute)
    for weights in ("float32", "bfloat16", "float16")
    for compute in ("float32", "bfloat16", "float16")
]
RIGHT = {"conv/kernel": so.per_filter(), "fc/(kernel|bias)": so.per_layer(joint="fc")}


class Linen(nn.Module):
    """A convolution before BatchNorm, a dense layer before LayerNorm, and a head."""

    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x):
        kind = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = {"dtype": self.dtype}
        x = nn.Conv(8, (3, 3), use_bias=False, name="conv", **kind)(x)
        x = nn.gelu(nn.BatchNorm(use_running_average=False, name="bn", **norm)(x))
        x = nn.Dense(16, name="fc", **kind)(x.mean((1, 2)))
        x = nn.relu(nn.LayerNorm(name="ln", **norm)(x))
        return nn.Dense(5, name="head", **kind)(x)


class Nnx(nnx.Module):
    """The same network in NNX."""

    def __init__(self, dtype, param_dtype, rngs):
        kind = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        norm = {"dtype": dtype, "rngs": rngs}
        self.conv = nnx.Conv(3, 8, (3, 3), use_bias=False, **kind)
        self.bn, self.ln = nnx.BatchNorm(8, **norm), nnx.LayerNorm(16, **norm)
        self.fc, self.head = nnx.Linear(8, 16, **kind), nnx.Linear(16, 5, **kind)

    def __call__(self, x):
        x = nnx.silu(self.bn(self.conv(x)))
        x = nnx.relu(self.ln(self.fc(x.mean((1, 2)))))
        return self.head(x)


def linen(compute, weights):
    net = Linen(compute, weights)
    variables = net.init(jax.random.key(1), X)

    def fn(params, x):
        variables_of = {"batch_stats": variables["batch_stats"], "params": params}
        return net.apply(variables_of, x, mutable=["batch_stats"])[0]

    return fn, variables["params"]


def of_nnx(compute, weights):
    graphdef, params, rest = nnx.split(Nnx(compute, weights, nnx.Rngs(0)), nnx.Param, ...)
    return lambda params, x: nnx.merge(graphdef, params, rest, copy=True)(x), params


@pytest.mark.parametrize(("weights", "compute"), PRECISIONS)
@pytest.mark.parametrize("make", [pytest.param(linen, marks=pytest.mark.slow), of_nnx])
def test_groups_do_not_depend_on_the_precision(make, weights, compute):
    fn, params = make(compute, weights)
    found = so.find_radial_groups(fn, params, X)
    right = so.groups_by_path(RIGHT)
    assert so.describe_groups(params, found) == so.describe_groups(params, right)
    so.check_radial_groups(fn, params, right, X)
    wrong = so.groups_by_path({"conv/kernel": so.per_filter(), "head/kernel": so.per_filter()})
    with pytest.raises(ValueError, match=r"head/kernel of shape \(16, 5\): expected an invariant"):
        so.check_radial_groups(fn, params, wrong, X)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_keras_under_a_mixed_policy(policy, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((8, 8, 3)),
            layers.Conv2D(8, 3, use_bias=False, name="conv", dtype=policy),
            layers.BatchNormalization(name="bn", dtype=policy),
            layers.ReLU(dtype=policy),
            layers.GlobalAveragePooling2D(dtype=policy),
            layers.Dense(5, name="head", dtype=policy),
        ]
    )
    names = [v.path for v in model.trainable_variables]
    params = {v.path: v.value for v in model.trainable_variables}
    rest = [v.value for v in model.non_trainable_variables]

    def fn(params, x):
        return model.stateless_call([params[name] for name in names], rest, x, training=True)[0]

    found = so.find_radial_groups(fn, params, X)
    right = so.groups_by_path({"conv/kernel": so.per_filter()})
    assert so.describe_groups(params, found) == so.describe_groups(params, right)
    so.check_radial_groups(fn, params, right, X)


def layers_of(body):
    """A network with a normalized layer in bfloat16, followed by `body`."""

    def fn(params, x):
        x = x.astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)
        x = x * jax.lax.rsqrt((x * x).mean(0) + jnp.bfloat16(1e-5))
        return (body(x) @ params["head"].astype(jnp.bfloat16)).astype(jnp.float32)

    return fn


def scanned(x):
    return jax.lax.scan(lambda carry, _: (jnp.tanh(carry), None), x, None, length=2)[0]


def dropped(x):
    keep = jax.random.bernoulli(jax.random.key(3), 0.9, x.shape)
    return jnp.where(keep, x / jnp.bfloat16(0.9), 0)


BODIES = {
    "softmax": lambda x: jax.nn.softmax(jax.nn.gelu(x)),
    "scan": scanned,
    "cond": lambda x: jax.lax.cond(x.sum() > 1e9, jnp.sin, jax.nn.silu, x),
    "remat": jax.checkpoint(lambda x: jax.nn.relu(x) + jnp.bfloat16(0.5)),
    "while": lambda x: jax.lax.fori_loop(0, 2, lambda _, y: jnp.tanh(y), x),
    "dropout with a fixed key": dropped,
    "vmap, sort and scatter": lambda x: jax.vmap(lambda r: jnp.sort(r).at[0].add(1))(x),
    "custom derivative": jax.custom_jvp(lambda x: jnp.tanh(x)),
    "rounded on purpose": lambda x: jax.lax.reduce_precision(x, 8, 7),
    "wide sums": lambda x: jax.lax.dot(
        x, jnp.eye(16, dtype=x.dtype), preferred_element_type=jnp.float32
    ).astype(x.dtype),
}
BODIES["custom derivative"].defjvp(lambda x, t: (jnp.tanh(*x), t[0] * (1 - jnp.tanh(*x) ** 2)))


@pytest.mark.parametrize("name", BODIES)
def test_programs_of_half_precision(name):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(7, 16)), "head": rng.normal(size=(16, 3))}
    params = {key: jnp.asarray(each, jnp.float32) for key, each in params.items()}
    x = jnp.asarray(rng.normal(size=(32, 7)), jnp.float32)
    fn = layers_of(BODIES[name])
    program = _widened.widened(jax.make_jaxpr(fn)(params, x))
    assert _widened.narrowest(program) == jnp.float32
    assert so.find_radial_groups(fn, params, x) == {"w": so.per_filter(), "head": None}


def test_what_reads_the_bits_of_narrow_numbers_is_judged_by_its_digits():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(7, 16)), jnp.float32)}
    params["head"] = jnp.asarray(rng.normal(size=(16, 3)), jnp.float32)
    fn = layers_of(lambda x: x + 0.1 * jax.random.normal(jax.random.key(0), (16,), x.dtype))
    with pytest.warns(UserWarning, match=r"half precision that cannot \(it reads the bits"):
        found = so.find_radial_groups(fn, params, jnp.asarray(rng.normal(size=(32, 7)), "f4"))
    assert found == {"w": so.per_filter(), "head": None}


def test_a_widened_program_computes_the_same_in_float32():
    def fn(x):
        y = jax.nn.softmax(x.astype(jnp.bfloat16) * jnp.bfloat16(1.5))
        return jax.lax.scan(lambda c, r: (c + r.sum(), r * c), jnp.bfloat16(0), y)

    x = jax.random.normal(jax.random.key(0), (4, 6))
    program = _widened.widened(jax.make_jaxpr(fn)(x))
    assert _widened.narrowest(program) == jnp.float32
    y = np.asarray(jax.nn.softmax(x * 1.5), np.float64)
    before = np.concatenate([[0], np.cumsum(y.sum(1))])
    total, rows = core.jaxpr_as_fun(program)(x)
    np.testing.assert_allclose(total, before[-1], rtol=1e-6)
    np.testing.assert_allclose(rows, y * before[:-1, None], rtol=1e-6)


def test_a_program_of_float32_stays_as_it_is():
    program = jax.make_jaxpr(jnp.tanh)(X)
    assert _widened.widened(program) is program
