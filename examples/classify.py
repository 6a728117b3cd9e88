"""Training runs of an image classifier, compiled once for all settings of an optimizer."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import optax
from digits import Dataset
from flax import nnx

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
        params, stats, state = variables
        loss_fn = functools.partial(forward, graph, train=True)
        grads, (stats, _) = jax.grad(loss_fn, has_aux=True)(params, stats, images, labels)
        updates, state = optimizer(setting).update(grads, state, params)
        return optax.apply_updates(params, updates), stats, state

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
            order = rng.permutation(chosen)[: len(chosen) // size * size]
            for batch in order.reshape(-1, size):
                variables = step(variables, images[batch], labels[batch], setting)
        held_out = task.test if test else (images[left_out], labels[left_out])
        accuracy, loss = evaluate(*variables[:2], *held_out)
        return Score(float(accuracy), float(loss))

    return run


def finite_loss(loss: float) -> float:
    """The loss, at most that of calling ten classes equally likely, which stands for divergence."""
    return min(loss, math.log(10)) if math.isfinite(loss) else math.log(10)
