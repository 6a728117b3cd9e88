"""Training of image classifiers: losses, batches, a step, and runs of many settings."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import optax
from flax import nnx

Dataset: TypeAlias = tuple[np.ndarray, np.ndarray]  # images and labels

OTHER_LEARNING_RATE = 0.01  # of all that is not compared


class Score(NamedTuple):
    accuracy: float
    loss: float  # cross-entropy in nats


class Task(NamedTuple):
    """What a run trains, on what."""

    network: Callable[[int], nnx.Module]  # of a seed
    train: Dataset
    test: Dataset
    images: int  # of the training set, for one run; the rest is left out
    batch_size: int
    epochs: int

    @property
    def steps(self) -> int:
        return self.epochs * (self.images // self.batch_size)


def forward(
    graph: Any, params: Any, stats: Any, images: jax.Array, labels: jax.Array, *, train: bool
) -> tuple[jax.Array, tuple[Any, jax.Array]]:
    """The mean loss, and BatchNorm's new statistics and the accuracy; tested, the running ones."""
    model = nnx.merge(graph, params, stats, copy=True)
    if not train:
        model.eval()
    logits = model(images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    accuracy = (logits.argmax(axis=-1) == labels).mean()
    return losses.mean(), (nnx.state(model, nnx.BatchStat), accuracy)


def functional_loss(model: nnx.Module) -> tuple[Callable[..., jax.Array], Any]:
    """The loss as a function of parameters, images and labels; and the parameters in float64."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = jax.tree.map(lambda leaf: leaf.astype(float), (params, rest))

    def loss_fn(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, params, rest, copy=True)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss_fn, params


def shuffled(rng: np.random.Generator, images: int | np.ndarray, size: int) -> np.ndarray:
    """An epoch's batches (batches, size) of that many images, or of images with these numbers."""
    order = rng.permutation(images)
    return order[: len(order) // size * size].reshape(-1, size)


def train_step(
    graph: Any,
    tx: optax.GradientTransformation,
    variables: Any,
    images: jax.Array,
    labels: jax.Array,
) -> Any:
    """The parameters, BatchNorm's statistics and the optimizer's state after a step."""
    params, stats, state = variables
    loss_fn = functools.partial(forward, graph, train=True)
    grads, (stats, _) = jax.grad(loss_fn, has_aux=True)(params, stats, images, labels)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), stats, state


def with_adam(
    tx: optax.GradientTransformation, steps: int, chosen: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """The transformation for the leaves where `chosen` gives True, and for the others one Adam.

    Its learning rate falls along a cosine, and is the same whatever is compared.
    """
    rest = optax.adam(optax.cosine_decay_schedule(OTHER_LEARNING_RATE, steps))
    return optax.partition({True: tx, False: rest}, chosen)


Run: TypeAlias = Callable[..., Score]  # of a setting, a seed, and whether to test


def make_run(task: Task, optimizer: Callable[[Any], optax.GradientTransformation]) -> Run:
    """Training with the optimizer of a setting, a number or tuple of numbers.

    A seed sets the images trained on, their batches and the initial weights. The score is that on
    the images left out, or on the test set.
    """
    graph = nnx.graphdef(nnx.eval_shape(lambda: task.network(0)))

    @functools.cache
    def weights(seed: int) -> tuple[Any, Any]:
        _, params, stats = nnx.split(task.network(seed), nnx.Param, nnx.BatchStat)
        return params, stats

    @jax.jit
    def start(params: Any, setting: Any) -> Any:
        return optimizer(setting).init(params)

    # Not a scan over the steps: XLA's convolutions on CPU are much slower in a loop.
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
    """The loss, at most that of calling ten classes equally likely, which stands for divergence."""
    return min(loss, math.log(10)) if math.isfinite(loss) else math.log(10)
