"""Data that change: sequences of tasks, and the networks that learn them."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers.classify import Dataset
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import spherical_optax as so

TRAIN = 1000  # of the 1797 digits; the others are the test set


class Task(NamedTuple):
    train: Dataset
    test: Dataset


class Setting(NamedTuple):
    """A sequence of tasks, and the network that learns them."""

    network: Callable[[nnx.Rngs], nnx.Module]
    tasks: Callable[[int, int], Iterator[Task]]  # from a seed and a number of tasks
    number: int  # of tasks
    last: int  # the outcome is the mean over this many last tasks
    steps: int  # training steps per task
    batch: int | None  # images per step; None: all images
    outcome: str  # "loss" on the training set, or "accuracy" on the test set
    cosine: bool  # whether learning rates fall to 0 within each task
    invariant: so.RadialGroup  # the radially invariant groups of a kernel


class Dense(nnx.Module):
    """Two hidden layers of 64 units, with LayerNorm before ReLU, and a linear layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.kernel1, self.norm1 = linear(64, 64), nnx.LayerNorm(64, rngs=rngs)
        self.kernel2, self.norm2 = linear(64, 64), nnx.LayerNorm(64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm1(self.kernel1(x.reshape(len(x), -1))))
        return self.head(nnx.relu(self.norm2(self.kernel2(x))))


def convolve(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: str, **_: Any
) -> jax.Array:
    """A convolution as one matrix product, with SAME padding.

    Inside a `scan` on a CPU it takes a seventh of the time of XLA's convolution.
    """
    shape = kernel.shape[:2]
    sizes = [-(-size // stride) for size, stride in zip(x.shape[1:3], strides, strict=True)]
    pads = jax.lax.padtype_to_pads(x.shape[1:3], shape, strides, padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    (height, width), (down, right) = sizes, strides
    seen = [
        x[:, i : i + (height - 1) * down + 1 : down, j : j + (width - 1) * right + 1 : right]
        for i, j in np.ndindex(*shape)
    ]
    return jnp.concatenate(seen, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


class Convolutions(nnx.Module):
    """Three convolutions with BatchNorm and ReLU, and a linear layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        conv = functools.partial(
            nnx.Conv,
            kernel_size=(3, 3),
            use_bias=False,
            conv_general_dilated=convolve,
            rngs=rngs,
        )
        norm = functools.partial(nnx.BatchNorm, momentum=0.9, rngs=rngs)
        self.kernel1, self.norm1 = conv(1, 8), norm(8)
        self.kernel2, self.norm2 = conv(8, 16, strides=2), norm(16)
        self.kernel3, self.norm3 = conv(16, 32, strides=2), norm(32)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm1(self.kernel1(x)))
        x = nnx.relu(self.norm2(self.kernel2(x)))
        x = nnx.relu(self.norm3(self.kernel3(x)))
        return self.head(x.reshape(len(x), -1))


@functools.cache
def digits() -> Task:
    """One stratified split, the same for all seeds."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    x, x_test, y, y_test = train_test_split(
        images, labels, train_size=TRAIN, stratify=labels, random_state=0
    )
    return Task((x, y), (x_test, y_test))


def random_labels(seed: int, number: int) -> Iterator[Task]:
    """The same 512 digits with new random labels in each task, for training and test."""
    rng = np.random.default_rng([0, seed])
    images = digits().train[0][rng.choice(TRAIN, 512, replace=False)]
    for _ in range(number):
        labels = rng.integers(10, size=512)
        yield Task((images, labels), (images, labels))


def permuted_pixels(seed: int, number: int) -> Iterator[Task]:
    """All digits. Each task has a new order of pixels, the same for training and test set."""
    rng = np.random.default_rng([1, seed])
    for _ in range(number):
        order = rng.permutation(64)
        train, test = (
            (x.reshape(-1, 64)[:, order].reshape(x.shape), labels) for x, labels in digits()
        )
        yield Task(train, test)


def growing(seed: int, number: int) -> Iterator[Task]:
    """A growing part of the digits, and all of them in the last task."""
    rng = np.random.default_rng([2, seed])
    (images, labels), test = digits()
    order = rng.permutation(TRAIN)
    for task in range(number):
        part = order[: TRAIN * (task + 1) // number]
        yield Task((images[part], labels[part]), test)


LAYER, FILTER = so.per_layer(), so.per_filter()
SETTINGS: dict[str, Setting] = {
    "memory": Setting(Dense, random_labels, 40, 10, 150, None, "loss", False, LAYER),
    "permuted": Setting(Dense, permuted_pixels, 40, 10, 250, 64, "accuracy", False, LAYER),
    "convolution": Setting(
        Convolutions, permuted_pixels, 20, 5, 250, 64, "accuracy", False, FILTER
    ),
    "warm_start": Setting(Dense, growing, 2, 1, 2000, 64, "accuracy", True, LAYER),
}
