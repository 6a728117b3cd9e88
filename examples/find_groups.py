"""Finds the radial groups of two networks with `find_radial_groups`, and trains with them.

The networks are a ResNet18 for 32x32 images (NNX, BatchNorm) and a small transformer with QK-norm
(Linen, RMSNorm with and without biases). For each network the program prints the finding for every
leaf with the measured deviations. Then it takes five steps of AdamSRT with the groups that were
found, on random data.

    python examples/find_groups.py
    python examples/find_groups.py --help
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx

import spherical_optax as so


class Residual(nnx.Module):
    """A residual block: two convolutions with BatchNorm, and a shortcut."""

    def __init__(self, cin: int, cout: int, stride: int, rngs: nnx.Rngs) -> None:
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        self.conv1, self.norm1 = conv(cin, cout, (3, 3), stride), nnx.BatchNorm(cout, rngs=rngs)
        self.conv2 = conv(cout, cout, (3, 3))
        self.norm2 = nnx.BatchNorm(cout, scale_init=nnx.initializers.zeros, rngs=rngs)
        self.shortcut = conv(cin, cout, (1, 1), stride) if stride > 1 else None
        self.norm = nnx.BatchNorm(cout, rngs=rngs) if stride > 1 else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.shortcut is not None and self.norm is not None:
            x = self.norm(self.shortcut(x))
        return nnx.relu(x + y)


class ResNet18(nnx.Module):
    """The ResNet18 for small images, with 11 million parameters."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, 64, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        widths = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
        blocks = []
        for cin, cout, stride in widths:
            blocks += [Residual(cin, cout, stride, rngs), Residual(cout, cout, 1, rngs)]
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(512, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


class Transformer(nn.Module):
    """Two blocks; queries and keys are normalized per head, and so is the MLP's hidden layer."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(100, 32, name="embed")(tokens)
        for i in range(2):
            attention = nn.MultiHeadDotProductAttention(
                num_heads=4, normalize_qk=True, use_bias=False, name=f"attention{i}"
            )
            x = x + attention(nn.RMSNorm(name=f"norm{i}a")(x))
            hidden = nn.Dense(64, name=f"up{i}")(nn.RMSNorm(name=f"norm{i}b")(x))
            x = x + nn.Dense(32, name=f"down{i}")(nn.gelu(nn.RMSNorm(name=f"norm{i}c")(hidden)))
        return nn.Dense(100, name="head")(nn.RMSNorm(name="norm")(x))


def show_and_train(
    name: str, fn: Callable[..., jax.Array], params: Any, x: jax.Array, labels: jax.Array
) -> None:
    """Prints the groups found, and the losses of five training steps with them."""
    found = so.find_radial_groups(fn, params, x, explain=True)
    print(f"\n{name}\n{so.describe_groups(params, found)}")
    tx = so.adamsrt(1e-2, groups=found)

    def loss_fn(params: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(fn(params, x), labels).mean()

    @jax.jit
    def step(params: Any, state: optax.OptState) -> tuple[Any, optax.OptState, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(5):
        params, state, loss = step(params, state)
        losses.append(f"{loss:.3f}")
    print("loss of five steps of adamsrt:", " ".join(losses))


def main() -> None:
    key = jax.random.key(0)
    images = jax.random.normal(key, (4, 32, 32, 3))
    graphdef, params, rest = nnx.split(ResNet18(nnx.Rngs(0)), nnx.Param, ...)

    def resnet(params: Any, images: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, rest, copy=True)(images)

    show_and_train("ResNet18", resnet, nnx.to_pure_dict(params), images, jnp.arange(4))

    tokens = jax.random.randint(key, (4, 12), 0, 100)
    model = Transformer()

    def transformer(params: Any, tokens: jax.Array) -> jax.Array:
        return model.apply({"params": params}, tokens)

    params = model.init(key, tokens)["params"]
    show_and_train("Transformer", transformer, params, tokens, jnp.roll(tokens, -1, axis=1))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
