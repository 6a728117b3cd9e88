"""Training of image classifiers: losses, batches, a training step, and runs of many settings."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import optax
from flax import nnx

Dataset: TypeAlias = tuple[np.ndarray, np.ndarray]  # images and labels

OTHER_LEARNING_RATE = 0.01  # of the parameters that are not part of the comparison


class Score(NamedTuple):
    accuracy: float
    loss: float  # cross-entropy in nats


class Task(NamedTuple):
    """The network, the data and the length of a run."""

    network: Callable[[int], nnx.Module]  # from a seed
    train: Dataset
    test: Dataset
    images: int  # number of training images that one run uses; the others are held out
    batch_size: int
    epochs: int

    @property
    def steps(self) -> int:
        return self.epochs * (self.images // self.batch_size)


def forward(
    graph: Any, params: Any, stats: Any, images: jax.Array, labels: jax.Array, *, train: bool
) -> tuple[jax.Array, tuple[Any, jax.Array]]:
    """Returns the mean loss, BatchNorm's new running statistics and the accuracy.

    BatchNorm normalizes by batch statistics if `train`, else by the running ones.
    """
    model = nnx.merge(graph, params, stats, copy=True)
    if not train:
        model.eval()
    logits = model(images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    accuracy = (logits.argmax(axis=-1) == labels).mean()
    return losses.mean(), (nnx.state(model, nnx.BatchStat), accuracy)


def functional_loss(model: nnx.Module) -> tuple[Callable[..., jax.Array], Any]:
    """Returns the loss as a function of parameters, images and labels, and the parameters.

    The parameters are in float64 where 64-bit types are enabled.
    """
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = jax.tree.map(lambda leaf: leaf.astype(float), (params, rest))

    def loss_fn(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, params, rest, copy=True)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss_fn, params


def shuffled(rng: np.random.Generator, images: int | np.ndarray, size: int) -> np.ndarray:
    """The shuffled image indices of one epoch, of shape (batches, size).

    Args:
      rng: Random generator.
      images: The number of images, or an array of indices to shuffle.
      size: Batch size.
    """
    order = rng.permutation(images)
    return order[: len(order) // size * size].reshape(-1, size)


def train_step(
    graph: Any,
    tx: optax.GradientTransformation,
    variables: Any,
    images: jax.Array,
    labels: jax.Array,
) -> Any:
    """Takes one step; returns the parameters, BatchNorm's statistics and the optimizer state."""
    params, stats, state = variables
    loss_fn = functools.partial(forward, graph, train=True)
    grads, (stats, _) = jax.grad(loss_fn, has_aux=True)(params, stats, images, labels)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), stats, state


def with_adam(
    tx: optax.GradientTransformation, steps: int, chosen: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """Applies `tx` to the leaves where `chosen` is True, and Adam to all other leaves.

    Adam's learning rate decays along a cosine. It is the same for every `tx`.
    """
    rest = optax.adam(optax.cosine_decay_schedule(OTHER_LEARNING_RATE, steps))
    return optax.partition({True: tx, False: rest}, chosen)


Run: TypeAlias = Callable[..., Score]  # arguments: a setting, a seed, and whether to test


def make_run(task: Task, optimizer: Callable[[Any], optax.GradientTransformation]) -> Run:
    """Returns a function that trains with the optimizer of a setting and returns a score.

    A setting is a number or a tuple of numbers. The seed sets the training images, their batches
    and the initial weights. The score is measured on the held-out images, or on the test set.
    """
    graph = nnx.graphdef(nnx.eval_shape(lambda: task.network(0)))

    @functools.cache
    def weights(seed: int) -> tuple[Any, Any]:
        _, params, stats = nnx.split(task.network(seed), nnx.Param, nnx.BatchStat)
        return params, stats

    @jax.jit
    def start(params: Any, setting: Any) -> Any:
        return optimizer(setting).init(params)

    # The steps are not one scan: on a CPU, XLA's convolutions are much slower inside a loop.
    @jax.jit
    def step(variables: Any, images: jax.Array, labels: jax.Array, setting: Any) -> Any:
        return train_step(graph, optimizer(setting), variables, images, labels)

    @jax.jit
    def evaluate(params: Any, stats: Any, images: jax.Array, labels: jax.Array) -> Score:
        loss, (_, accuracy) = forward(graph, params, stats, images, labels, train=False)
        return Score(accuracy, loss)

    def run(setting: Any, seed: int, *, test: bool) -> Score:
        (images, labels), size = task.train, task.batch_size
        rng = np.random.default_rng(seed)
        chosen, left_out = np.split(rng.permutation(len(images)), [task.images])
        params, stats = weights(seed)
        variables = (params, stats, start(params, setting))
        for _ in range(task.epochs):
            for batch in shuffled(rng, chosen, size):
                variables = step(variables, images[batch], labels[batch], setting)
        held_out = task.test if test else (images[left_out], labels[left_out])
        accuracy, loss = evaluate(*variables[:2], *held_out)
        return Score(float(accuracy), float(loss))

    return run


def finite_loss(loss: float) -> float:
    """Clips the loss at log(10), which also replaces a loss that is not finite.

    log(10) is the loss of a prediction that gives ten classes the same probability.
    """
    return min(loss, math.log(10)) if math.isfinite(loss) else math.log(10)
