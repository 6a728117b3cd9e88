"""ResNet18 in its CIFAR and its ImageNet form, ResNet20 and VGG16, with PyTorch's defaults.

Convolutions have no bias, and BatchNorm follows each of them. So every filter is a radially
invariant group; `GROUPS` declares them. `width` is the number of channels of the first stage, by
default the published one.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import spherical_optax as so

from .published import Model

GROUPS = so.groups_by_path({r".*conv\d*(/\d+)?/kernel": so.per_filter()})
WIDTHS: dict[Model, int] = {"resnet18": 64, "resnet20": 16, "vgg16": 64}
EPSILON = 1e-5
MOMENTUM = 0.9  # of the running statistics; PyTorch calls this 0.1


def at_least_float32(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


class BatchNorm(nnx.Module):
    """BatchNorm over the whole batch, or over each of `parts` equal parts of it.

    Statistics are at least float32. The running variance is unbiased, as in PyTorch. Running
    statistics of several parts are averaged.
    """

    def __init__(self, channels: int, *, parts: int = 1, dtype: Any = jnp.float32) -> None:
        self.scale, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.var = nnx.BatchStat(jnp.ones(channels))
        self.parts, self.dtype = parts, dtype
        self.use_running_average = False  # set by train() and eval()

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
            return self._normalize(x, mean, var)
        split = x.reshape(self.parts, -1, *x.shape[1:])
        wide = split.astype(at_least_float32(self.dtype))
        mean = wide.mean(axis=(1, 2, 3), keepdims=True)
        square = jnp.square(wide).mean(axis=(1, 2, 3), keepdims=True)
        var = jnp.maximum(square - jnp.square(mean), 0)
        count = math.prod(split.shape[1:-1])
        unbiased = var * (count / max(count - 1, 1))
        for kept, new in ((self.mean, mean), (self.var, unbiased)):
            new = new.reshape(self.parts, -1).mean(axis=0)
            kept[...] = MOMENTUM * kept[...] + (1 - MOMENTUM) * new
        return self._normalize(split, mean, var).reshape(x.shape)

    def _normalize(self, x: jax.Array, mean: jax.Array, var: jax.Array) -> jax.Array:
        factor = self.scale[...] * jax.lax.rsqrt(var + EPSILON)
        # One product and one sum per entry, in at least float32, then the cast.
        shift = self.bias[...] - mean * factor
        return (x.astype(at_least_float32(self.dtype)) * factor + shift).astype(self.dtype)


class Layers:
    """Makes the layers of a network, all of one dtype and one kind of BatchNorm."""

    def __init__(self, seed: int, parts: int, dtype: Any) -> None:
        # NumPy's random numbers: compiling JAX's for so many shapes takes half a minute on a CPU.
        self.rng, self.rngs, self.dtype = np.random.default_rng(seed), nnx.Rngs(0), dtype
        self.norm = functools.partial(BatchNorm, parts=parts, dtype=dtype)

    def conv(self, inside: int, outside: int, size: int = 3, stride: int = 1) -> nnx.Conv:
        return nnx.Conv(
            inside,
            outside,
            (size, size),
            strides=stride,
            padding=(size - 1) // 2,  # symmetric as in PyTorch; "SAME" is not with stride 2
            use_bias=False,
            kernel_init=self.uniform(size * size * inside),
            dtype=self.dtype,
            rngs=self.rngs,
        )

    def linear(self, inside: int, outside: int) -> nnx.Linear:
        uniform = self.uniform(inside)
        return nnx.Linear(inside, outside, kernel_init=uniform, bias_init=uniform, rngs=self.rngs)

    def uniform(self, fan_in: int) -> Callable[..., jax.Array]:
        """PyTorch's kaiming_uniform_(a=sqrt(5)): uniform within plus or minus fan_in^(-1/2)."""
        bound = fan_in**-0.5

        def init(key: Any, shape: Sequence[int], *_: Any) -> jax.Array:
            del key
            return jnp.asarray(self.rng.uniform(-bound, bound, shape), jnp.float32)

        return init


class Block(nnx.Module):
    """Two convolutions and a shortcut; if the shape changes, the shortcut is a 1x1 convolution."""

    def __init__(self, layers: Layers, inside: int, outside: int, stride: int) -> None:
        self.conv1, self.norm1 = layers.conv(inside, outside, 3, stride), layers.norm(outside)
        self.conv2, self.norm2 = layers.conv(outside, outside), layers.norm(outside)
        self.projects = stride != 1 or inside != outside
        if self.projects:
            self.shortcut_conv = layers.conv(inside, outside, 1, stride)
            self.shortcut_norm = layers.norm(outside)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + (self.shortcut_norm(self.shortcut_conv(x)) if self.projects else x))


class ResNet(nnx.Module):
    """Stages of blocks; each stage has twice the channels and half the resolution of the last."""

    def __init__(
        self,
        layers: Layers,
        channels: int,
        classes: int,
        width: int,
        stages: Sequence[int],
        *,
        large: bool,
    ) -> None:
        self.large = large
        self.stem_conv = layers.conv(channels, width, *((7, 2) if large else (3, 1)))
        self.stem_norm = layers.norm(width)
        blocks, inside = [], width
        for stage, count in enumerate(stages):
            outside = width * 2**stage
            for i in range(count):
                blocks.append(Block(layers, inside, outside, 2 if stage > 0 and i == 0 else 1))
                inside = outside
        self.blocks = nnx.List(blocks)
        self.linear = layers.linear(inside, classes)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem_norm(self.stem_conv(x)))
        if self.large:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x)
        return self.linear(x.astype(at_least_float32(x.dtype)).mean(axis=(1, 2)))


class VGG(nnx.Module):
    """Five stages of convolutions, each followed by a max-pool, and one linear layer."""

    # Of each stage: width relative to the first stage, and number of convolutions.
    STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))

    def __init__(self, layers: Layers, channels: int, classes: int, width: int) -> None:
        convs, norms, inside = [], [], channels
        for times, count in self.STAGES:
            for _ in range(count):
                convs.append(layers.conv(inside, times * width))
                norms.append(layers.norm(times * width))
                inside = times * width
        self.conv, self.norm = nnx.List(convs), nnx.List(norms)
        self.linear = layers.linear(inside, classes)

    def __call__(self, x: jax.Array) -> jax.Array:
        # Five max-pools need 32 pixels: smaller images, such as Fashion-MNIST's, are padded.
        border = [(max(32 - side, 0) // 2, (max(32 - side, 0) + 1) // 2) for side in x.shape[1:3]]
        x = jnp.pad(x, ((0, 0), *border, (0, 0)))
        layer = 0
        for _, count in self.STAGES:
            for _ in range(count):
                x = nnx.relu(self.norm[layer](self.conv[layer](x)))
                layer += 1
            x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        return self.linear(x.astype(at_least_float32(x.dtype)).mean(axis=(1, 2)))


def make_model(
    name: Model,
    seed: int,
    *,
    channels: int = 3,
    classes: int = 10,
    width: int | None = None,
    large: bool = False,
    parts: int = 1,
    dtype: Any = jnp.float32,
) -> nnx.Module:
    """Makes a network with initial weights; `large` selects ResNet18's ImageNet form."""
    layers = Layers(seed, parts, dtype)
    width = width or WIDTHS[name]
    if name == "vgg16":
        return VGG(layers, channels, classes, width)
    stages = (2, 2, 2, 2) if name == "resnet18" else (3, 3, 3)
    return ResNet(layers, channels, classes, width, stages, large=large)
