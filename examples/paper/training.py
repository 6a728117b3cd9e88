"""One run: a compiled step over all devices, evaluation, checkpoints, selection.

The carry holds the whole state of a run: weights, statistics, optimizer state, and the sums over
the current epoch. A checkpoint is the carry, the best weights so far, and the position in the data.
A run that was killed resumes from it and ends with the same bits.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tqdm
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import spherical_optax as so

from . import published
from .cells import Cell, Role
from .data import Batch, Loading, evaluation_batches, normalization, split, training_batches
from .errors import stop
from .models import make_model
from .optimizers import Schedule, Setting, make_optimizer, record
from .readers import ArrayImages, Dataset

RESULT = "result.json"
LAYER_METRICS = ("radius", "angle", "effective learning rate")


class Totals(NamedTuple):
    """Sums over the images since the start of the epoch."""

    loss: jax.Array
    correct: jax.Array
    images: jax.Array
    layers: Any  # nested dictionaries: LAYER_METRICS per layer, averaged over its filters


class Carry(NamedTuple):
    params: Any
    stats: Any  # of BatchNorm
    state: Any  # of the optimizer
    totals: Totals


class Progress(NamedTuple):
    """The part of a checkpoint that is not arrays."""

    step: int
    place: dict[str, Any]  # the state of the iterator
    history: list[dict[str, Any]]
    best_epoch: int
    best_accuracy: float


def make_schedule(cell: Cell, steps: int) -> Schedule:
    """The schedule as a function of the initial learning rate, which may be traced."""
    protocol = published.Protocol()
    if cell.schedule == "cosine":
        return lambda rate: optax.cosine_decay_schedule(rate, steps)
    if cell.schedule == "constant":
        return optax.constant_schedule
    boundaries = {round(part * steps): protocol.factor for part in protocol.milestones}
    return lambda rate: optax.piecewise_constant_schedule(rate, boundaries)


def layer_metrics(state: Any) -> Any:
    """LAYER_METRICS of the last step per layer, averaged over its filters; NaN if unknown."""
    sphere = optax.tree.get(state, "sphere")
    rates = optax.tree.get(state, "effective_learning_rate")
    if rates is None:
        rates = jax.tree.map(lambda rows: jnp.full_like(rows[0], jnp.nan), sphere)

    def means(rows: jax.Array, rate: jax.Array) -> jax.Array:
        metrics = so.SphereMetrics(*rows)
        values = metrics.radius_after, metrics.step_angle, rate
        return jnp.stack([value.mean() for value in values])

    return jax.tree.map(means, sphere, rates)


class Program:
    """The functions that are compiled once for all runs of a recipe, such as `step`."""

    def __init__(self, cell: Cell, dataset: Dataset) -> None:
        devices = jax.device_count()
        for name in ("batch_size", "test_batch_size"):
            if getattr(cell, name) % devices:
                option = f"--{name.replace('_', '-')}"
                raise stop(option, f"a multiple of {devices}, the devices", getattr(cell, name))
        # The number of steps is the same for all seeds, and so is the schedule.
        sizes = [len(part) for part in split_of(cell, dataset)]
        self.epoch_steps = sizes[0] // cell.batch_size
        if self.epoch_steps == 0:
            raise stop("--batch-size", f"at most {sizes[0]}, the training images", cell.batch_size)
        self.steps = cell.epochs * self.epoch_steps
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.sharded = NamedSharding(mesh, PartitionSpec("data"))
        mean, std = normalization(dataset)
        parts = devices if cell.batch_norm == "device" else 1

        def model(seed: int) -> nnx.Module:
            return make_model(
                cell.model,
                seed,
                channels=cell.channels,
                classes=cell.classes,
                width=cell.width,
                large=cell.large,
                parts=parts,
                dtype=jnp.dtype(cell.dtype),
            )

        graph = nnx.graphdef(nnx.eval_shape(lambda: model(0)))
        schedule = make_schedule(cell, self.steps)

        def optimizer(setting: Setting) -> optax.GradientTransformation:
            tx = make_optimizer(cell.optimizer, setting, schedule)
            return record(cell.optimizer, tx, setting)

        def no_totals(state: Any) -> Totals:
            layers = jax.tree.map(jnp.zeros_like, layer_metrics(state))
            return Totals(jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), layers)

        def prepare(image: jax.Array) -> jax.Array:
            return (image.astype(jnp.float32) / 255 - mean) / std

        def weights(seed: int) -> tuple[Any, Any]:
            # NumPy arrays, which are the same on every host.
            _, *parts = nnx.split(model(seed), nnx.Param, nnx.BatchStat)
            return jax.tree.map(np.asarray, tuple(parts))

        def start(params: Any, stats: Any) -> Carry:
            # The state does not depend on these numbers, and checks in `init` need concrete ones.
            state = optimizer(Setting(1e-3, 1e-3, 0.9, 0.99)).init(params)
            return Carry(params, stats, state, no_totals(state))

        def step(carry: Carry, batch: Any, setting: Setting) -> Carry:
            def loss_fn(params: Any) -> tuple[jax.Array, tuple[Any, jax.Array]]:
                network: Any = nnx.merge(graph, params, carry.stats, copy=True)
                network.train()
                logits = network(prepare(batch["image"]))
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
                correct = (logits.argmax(axis=-1) == batch["label"]).sum()
                return losses.mean(), (nnx.state(network, nnx.BatchStat), correct)

            (loss, (stats, correct)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                carry.params
            )
            updates, state = optimizer(setting).update(grads, carry.state, carry.params)
            params = optax.apply_updates(carry.params, updates)
            images = len(batch["label"])
            layers = jax.tree.map(lambda x: x * images, layer_metrics(state))
            new = Totals(loss * images, correct, jnp.int32(images), layers)
            return Carry(params, stats, state, jax.tree.map(jnp.add, carry.totals, new))

        def evaluate(params: Any, stats: Any, batch: Any) -> jax.Array:
            network: Any = nnx.merge(graph, params, stats, copy=True)
            network.eval()
            logits = network(prepare(batch["image"]))
            right = (logits.argmax(axis=-1) == batch["label"]) * batch["weight"]
            return jnp.stack([right.sum(), batch["weight"].sum()])

        where = {"out_shardings": self.replicated}
        self.weights, self.start = weights, jax.jit(start, **where)
        self.step = jax.jit(step, donate_argnums=0, **where)
        self.evaluate = jax.jit(evaluate, **where)
        self.restart = jax.jit(
            lambda carry: carry._replace(totals=no_totals(carry.state)), donate_argnums=0, **where
        )
        self.copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), **where)

    def place(self, batch: Batch) -> Any:
        """Makes the global batch from this process's part."""
        return {
            name: jax.make_array_from_process_local_data(self.sharded, part)
            for name, part in batch.items()
        }


def split_of(cell: Cell, dataset: Dataset) -> Any:
    return split(dataset, cell.seed, cell.validation, cell.train_images, cell.test_images)


@functools.lru_cache(maxsize=1)
def program_of(recipe: Cell, dataset: Dataset) -> Program:
    """The program of a recipe. The cache keeps only the last one, to free compiled programs."""
    return Program(recipe, dataset)


def accuracy(counts: Iterator[Any], protocol: str) -> float:
    """The accuracy over all images; with the published protocol, the mean over batches."""
    right, images = np.array(jax.device_get(list(counts)), np.float64).T
    return float((right / images).mean() if protocol == "published" else right.sum() / images.sum())


def train(
    cell: Cell,
    dataset: Dataset,
    folder: pathlib.Path,
    role: Role = "report",
    *,
    checkpoint_steps: int | None = None,
    log_every: int = 20,
    threads: int | None = None,
    keep: bool = False,
) -> dict[str, Any]:
    """Trains a cell, or resumes it from a checkpoint, and writes its result to the folder."""
    program = program_of(cell.recipe, dataset)
    parts = split_of(cell, dataset)
    if threads is None:
        threads = 2 if isinstance(dataset.train, ArrayImages) else 16
    loading = Loading(cell.image_size, jax.process_index(), jax.process_count(), threads)
    data_seed = cell.seed % 2**32
    batches = training_batches(
        parts.train, cell.batch_size, cell.epochs, data_seed, cell.augmentation, loading
    )
    # The published protocol augments validation images as it does training images.
    plain = "none"
    validation_how = cell.augmentation if cell.protocol == "published" else plain
    if parts.validation is parts.test:
        validation_how = plain

    def measure(params: Any, stats: Any, source: Any, how: Any, seed: int) -> float:
        found = evaluation_batches(source, cell.test_batch_size, seed, how, loading)
        counts = (program.evaluate(params, stats, program.place(batch)) for batch in found)
        return accuracy(counts, cell.protocol)

    carry = program.start(*program.weights(cell.seed))
    best = program.copy((carry.params, carry.stats))
    at = Progress(0, batches.get_state(), [], 0, -1.0)
    checkpoints = (folder / "checkpoints").absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
    with ocp.CheckpointManager(checkpoints, options=options) as manager:
        latest = manager.latest_step()
        if latest is not None:
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, (carry, best))
            del carry, best
            restored = manager.restore(
                latest,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore()
                ),
            )
            carry, best = restored["arrays"]
            at = Progress(**restored["progress"])
            batches.set_state(at.place)
        meter = Meter(cell, program, at.step)
        for step in range(at.step + 1, program.steps + 1):
            carry = program.step(carry, program.place(next(batches)), cell.setting)
            ended = step % program.epoch_steps == 0
            if step % log_every == 0 or ended:
                meter.show(step, carry.totals)
            if ended:
                epoch = step // program.epoch_steps
                seed = (data_seed + epoch) % 2**32
                found = measure(carry.params, carry.stats, parts.validation, validation_how, seed)
                line = {"epoch": epoch, "validation_accuracy": found, **summary(carry.totals)}
                carry = program.restart(carry)
                at = at._replace(history=[*at.history, line])
                if found > at.best_accuracy:
                    at = at._replace(best_epoch=epoch, best_accuracy=found)
                    best = program.copy((carry.params, carry.stats))
            if step % (checkpoint_steps or program.epoch_steps) == 0 or step == program.steps:
                at = at._replace(step=step, place=batches.get_state())
                saved = ocp.args.Composite(
                    arrays=ocp.args.StandardSave((carry, best)),
                    progress=ocp.args.JsonSave(at._asdict()),
                )
                manager.save(step, args=saved)
            if ended:
                meter.restart()
        meter.bar.close()
        result = {
            "cell": dataclasses.asdict(cell),
            "role": role,
            # Runs that choose a setting never see the test set.
            "test_accuracy": measure(*best, parts.test, plain, 0) if role == "report" else None,
            "validation_accuracy": at.best_accuracy,
            "best_epoch": at.best_epoch,
            "images_per_second": meter.rate,
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "sha256": digest((carry[:3], best)),
            "history": at.history,
        }
    if jax.process_index() == 0:
        write_json(folder / RESULT, result)
        if not keep:
            shutil.rmtree(checkpoints)
    return result


class Meter:
    """The progress bar of a run."""

    def __init__(self, cell: Cell, program: Program, step: int) -> None:
        self.bar = tqdm.tqdm(
            total=program.steps,
            initial=step,
            unit="step",
            leave=False,
            desc=f"{cell.optimizer} {cell.learning_rate:g} {cell.weight_decay:g} {cell.seed}",
            disable=jax.process_index() != 0,
        )
        self.batch_size, self.step, self.start = cell.batch_size, step, time.perf_counter()
        self.rate: float | None = None  # images per second in the last interval
        self.compiling = True  # in the first interval

    def restart(self) -> None:
        """Restarts the clock, to leave out the time of evaluation and checkpoints."""
        self.start = time.perf_counter()

    def show(self, step: int, totals: Totals) -> None:
        loss, correct, images = jax.device_get(totals[:3])  # waits for the devices to finish
        now = time.perf_counter()
        speed = (step - self.step) * self.batch_size / (now - self.start)
        self.rate = None if self.compiling else speed
        self.step, self.start, self.compiling = step, now, False
        self.bar.set_postfix(
            loss=f"{loss / images:.3f}",
            accuracy=f"{100 * correct / images:.1f}%",
            images=f"{speed:.0f}/s",
            refresh=False,
        )
        self.bar.update(step - self.bar.n)


def summary(totals: Totals) -> dict[str, Any]:
    """The means over an epoch."""
    totals = jax.device_get(totals)
    images = int(totals.images)
    layers = jax.tree.leaves_with_path(totals.layers)
    return {
        "loss": finite(float(totals.loss) / images),
        "accuracy": int(totals.correct) / images,
        "layers": {
            jax.tree_util.keystr(path, simple=True, separator="/"): [
                finite(float(value) / images) for value in values
            ]
            for path, values in layers
        },
    }


def finite(value: Any) -> float | None:
    """The number, or `None` if it is not finite, which JSON cannot represent."""
    return float(value) if math.isfinite(value) else None


def digest(tree: Any) -> str:
    """The SHA-256 hash of the bits of all arrays."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes a JSON file atomically: a killed program leaves no partial file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)
