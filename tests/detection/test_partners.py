"""Which leaves form a joint group, which arguments are varied, and which outputs count."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spherical_optax as so

KEYS = jax.random.split(jax.random.key(0), 12)
X = jax.random.normal(KEYS[0], (32, 8))


def new(n, *shape):
    return jax.random.normal(KEYS[n], shape) / shape[0] ** 0.5


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)


def batch_norm(x):
    return (x - x.mean(0)) * jax.lax.rsqrt(x.var(0) + 1e-6)


def rms_norm(x):
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def table(fn, params, *args):
    return so.describe_groups(params, so.find_radial_groups(fn, params, *args))


def expected(params, rules):
    return so.describe_groups(params, so.groups_by_path(rules))


@pytest.mark.parametrize(("hidden", "out"), [(64, 32), (64, 16), (32, 64), (8, 8), (9, 40)])
@pytest.mark.parametrize("first", ["fc1", "zz"])
def test_the_fewest_modules_win_at_every_size_and_order(hidden, out, first):
    """In a projection head the group is the second layer, not the first with the second bias."""
    params = {
        first: {"kernel": new(1, 8, hidden), "bias": jnp.zeros(hidden)},
        "fc2": {"kernel": new(2, hidden, out), "bias": jnp.zeros(out)},
    }

    def fn(p, x):
        x = jax.nn.relu(x @ p[first]["kernel"] + p[first]["bias"])
        x = x @ p["fc2"]["kernel"] + p["fc2"]["bias"]
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    right = {"fc2/(kernel|bias)": so.per_layer(joint="fc2")}
    assert table(fn, params, X) == expected(params, right)
    so.check_radial_groups(fn, params, so.groups_by_path(right), X)


LORA = {
    "siblings": ("lin/kernel", "lora/lora_a", "lora/lora_b", "joint"),
    "parent and child": ("lora/base_module/kernel", "lora/lora_a", "lora/lora_b", "lora"),
    "one module": ("lora/kernel", "lora/lora_a", "lora/lora_b", "lora"),
}


@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("layout", LORA)
def test_the_finest_of_equally_many_leaves_wins(layout, rank):
    """For W + A B before BatchNorm: W with B (a group per column), not W with A (one group)."""
    w, a, b, label = LORA[layout]
    shapes = {w: (8, 16), a: (8, rank), b: (rank, 16), "head/kernel": (16, 3)}
    params = {}
    for n, (path, shape) in enumerate(shapes.items()):
        *modules, name = path.split("/")
        functools.reduce(lambda d, key: d.setdefault(key, {}), modules, params)[name] = new(
            n, *shape
        )

    def at(tree, path):
        return functools.reduce(lambda d, key: d[key], path.split("/"), tree)

    def fn(p, x):
        x = x @ at(p, w) + x @ at(p, a) @ at(p, b)
        return jax.nn.relu(batch_norm(x)) @ at(p, "head/kernel")

    assert table(fn, params, X) == expected(
        params, {f"{w}|{b}": so.RadialGroup((-1,), joint=label)}
    )


@pytest.mark.parametrize("norm", [layer_norm, batch_norm])
def test_a_bias_in_the_parent(norm):
    params = {
        "gcn": {"lin": {"kernel": new(1, 8, 16)}, "bias": 0.1 * new(2, 16)},
        "head": {"kernel": new(3, 16, 3)},
    }

    def fn(p, x):
        x = x @ p["gcn"]["lin"]["kernel"] + p["gcn"]["bias"]
        return jax.nn.relu(norm(x)) @ p["head"]["kernel"]

    joint = {"gcn/(lin/kernel|bias)": so.per_layer(joint="gcn")}
    right = joint if norm is layer_norm else {"gcn/lin/kernel": so.per_filter()}
    assert table(fn, params, X) == expected(params, right)


# --- outputs and arguments --------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, -1e9, -1e20, float(jnp.finfo("float32").min), -np.inf])
def test_masked_logits_do_not_drown_the_others(value):
    params = {"trunk": new(1, 8, 32), "head": new(2, 32, 6)}
    legal = jax.random.bernoulli(KEYS[3], 0.7, (32, 6))

    def fn(p, x):
        return jnp.where(legal, jax.nn.relu(layer_norm(x @ p["trunk"])) @ p["head"], value)

    assert so.find_radial_groups(fn, params, X) == {"trunk": so.per_layer(), "head": None}
    so.check_radial_groups(fn, params, {"trunk": so.per_layer(), "head": None}, X)
    with pytest.raises(ValueError, match="head of shape"):
        so.check_radial_groups(fn, params, {"trunk": None, "head": so.per_layer()}, X)


def attention(p, x, mask):
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
    bias = (1.0 - mask)[:, None, None, :] * -1e9
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", rms_norm(q), rms_norm(k)) + bias)
    return jnp.einsum("bhts,bshk->bthk", weights, v).reshape(*x.shape) @ p["out"]


def test_a_mask_of_ones_stays_a_mask():
    params = {name: new(n, 16, 2, 8) for n, name in enumerate("qkv")} | {"out": new(4, 16, 16)}
    x = jax.random.normal(KEYS[5], (4, 6, 16))
    found = so.find_radial_groups(attention, params, x, jnp.ones((4, 6)), explain=True)
    assert so.describe_groups(params, found.groups) == expected(
        params, {"q|k": so.per_head(axis=1)}
    )
    assert found.varied == ()


def test_a_noise_level_keeps_its_sign_and_an_input_is_varied():
    """The result, the progress and the error all name the inputs that were varied."""
    params = {"emb": new(1, 8, 16), "in": new(2, 16, 16), "out": new(3, 16, 16)}

    def fn(p, x, sigma):
        emb = jnp.cos(jnp.log(sigma) * 2.0 ** jnp.arange(8)) @ p["emb"]
        return jax.nn.silu(rms_norm(x @ p["in"]) + emb) @ p["out"]

    lines = []
    args = jnp.ones((4, 16)), jnp.full((4, 1), 0.5)
    with warnings.catch_warnings():
        found = so.find_radial_groups(fn, params, *args, explain=True, progress=lines.append)
    assert so.describe_groups(params, found.groups) == expected(params, {"in": so.per_layer()})
    assert found.varied == ("args[0] of shape (4, 16)", "args[1] of shape (4, 1)")
    assert any("a kernel: args[0] of shape (4, 16)" in line for line in lines)
    assert "varied, being constant: args[0] of shape (4, 16)" in so.describe_groups(params, found)
    wrong = so.groups_by_path({"out": so.per_layer()})
    with pytest.raises(ValueError, match=r"Varied because constant: args\[0\] of shape \(4, 16\)"):
        so.check_radial_groups(fn, params, wrong, *args)


def test_scales_and_biases_of_stacked_layers_are_no_kernels():
    def member(p, x):
        x = jax.nn.relu(batch_norm(x @ p["c"]["kernel"]) * p["b"]["scale"] + p["b"]["bias"])
        return jax.nn.relu(layer_norm(x @ p["d"]["kernel"])) @ p["h"]["kernel"]

    def init(key):
        a, b, c = jax.random.split(key, 3)
        kernels = {
            "c": jax.random.normal(a, (8, 16)),
            "d": jax.random.normal(b, (16, 12)),
            "h": jax.random.normal(c, (12, 5)),
        }
        norm = {"b": {"scale": jnp.ones(16), "bias": jnp.zeros(16)}}
        return {name: {"kernel": each} for name, each in kernels.items()} | norm

    alone = init(KEYS[1])
    assert table(member, alone, X) == expected(
        alone, {"c/kernel": so.per_filter(), "d/kernel": so.per_layer()}
    )
    stacked = jax.vmap(init)(jax.random.split(KEYS[1], 3))
    fn = jax.vmap(member, (0, None))
    right = {"c/kernel": so.RadialGroup((0, -1)), "d/kernel": so.RadialGroup((0,))}
    assert table(fn, stacked, X) == expected(stacked, right)
    so.check_radial_groups(fn, stacked, so.groups_by_path(right), X)  # gives no warning


def test_groups_that_cannot_be_said_are_not_silently_coarser():
    """Groups that no `RadialGroup` describes cause a warning.

    Those of a grouped transposed convolution are blocks of axis 0, crossed with axis 1.
    """
    params = {"w": jax.random.normal(KEYS[1], (4, 3, 3, 3))}
    x = jax.random.normal(KEYS[2], (16, 4, 5, 5))

    def fn(p, x):
        parts = [
            jax.lax.conv_transpose(
                x[:, k : k + 2],
                p["w"][k : k + 2],
                (2, 2),
                "SAME",
                dimension_numbers=("NCHW", "IOHW", "NCHW"),
            )
            for k in (0, 2)
        ]
        y = jnp.concatenate(parts, 1)
        over = (0, 2, 3)
        return (y - y.mean(over, keepdims=True)) / jnp.sqrt(y.var(over, keepdims=True) + 1e-5)

    message = r"finer ones for w \(2 blocks of axis 0, crossed with \(1,\)\)"
    with pytest.warns(UserWarning, match=message):
        found = so.find_radial_groups(fn, params, x)
    with pytest.warns(UserWarning, match=message):
        so.check_radial_groups(fn, params, found, x)
    split = {"w": params["w"].reshape(2, 2, 3, 3, 3)}
    apart = lambda p, x: fn({"w": p["w"].reshape(4, 3, 3, 3)}, x)  # noqa: E731
    assert so.find_radial_groups(apart, split, x)["w"] == so.RadialGroup((0, 2))
