"""Trains a small convolutional network on scikit-learn's digits with several optimizers.

Every optimizer starts from the same weights and sees the same batches. The program prints a
table of test accuracy and step time, and writes `results.json` and `curves.png`.

    python examples/digits.py                                  # eight optimizers
    python examples/digits.py --optimizer adamsrt adam --seeds 2
    python examples/digits.py --optimizer adamsrt --learning-rate 0.1 --epochs 40
    python examples/digits.py --help
"""

import dataclasses
import functools
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
import tyro
from flax import nnx
from helpers.classify import Dataset, shuffled
from helpers.options import check_options
from helpers.outputs import check_out, print_rows
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import spherical_optax as so

Name: TypeAlias = Literal[
    "adamsrt",
    "adams",
    "sgdmrt",
    "adamg",
    "adamg_star",
    "adamp",
    "sgdp",
    "adamh",
    "muonh",
    "rotational_adamw",
    "rotational_sgdm",
    "rotational_lion",
    "adam",
    "adamw",
    "sgd",
]
Curves: TypeAlias = dict[str, np.ndarray]  # one value per epoch
Make: TypeAlias = Callable[..., optax.GradientTransformation]

DEFAULT: tuple[Name, ...] = (
    "muonh",
    "adamh",
    "rotational_adamw",
    "adamsrt",
    "adams",
    "adam",
    "adamw",
    "sgd",
)
BATCH_SIZE = 128

# BatchNorm follows each convolution, so multiplying a filter by a positive number does not
# change the loss: each filter is a radially invariant group. No normalization follows the
# linear layer, so no rule matches it, and it has no group.
RULES = so.groups_by_path({r"conv\d+/kernel": so.per_filter()})


def adam_elsewhere(spherical: Make) -> Make:
    """Trains parameters without a group by Adam, at the same learning rate as the groups."""
    return lambda rate, groups: spherical(rate, groups=groups, other=optax.adam(rate))


SPHERICAL: dict[Name, Make] = {
    "adamsrt": so.adamsrt,
    "adams": so.adams,
    "sgdmrt": so.sgdmrt,
    "adamg": adam_elsewhere(so.adamg),
    "adamg_star": so.adamg_star,
    "adamp": so.adamp,
    "sgdp": so.sgdp,
    "adamh": adam_elsewhere(so.adamh),
    "muonh": adam_elsewhere(so.muonh),
    # The decay sets the angle per step. These runs are short, so it is larger than the default.
    "rotational_adamw": functools.partial(so.rotational_adamw, weight_decay=0.1),
    "rotational_sgdm": functools.partial(so.rotational_sgdm, weight_decay=1e-3),
    "rotational_lion": functools.partial(so.rotational_lion, weight_decay=1.0),
}
BASELINES: dict[Name, Make] = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "sgd": functools.partial(optax.sgd, momentum=0.9),
}

# Learning rates from a grid search by 5-fold cross-validation on the training set, with 20 epochs.
# The grid is 3e-4, 1e-3, ..., 0.3, and ten times that for adamg_star and the variants of SGD. Each
# fold is held out twice, so there are ten seeds, other than those used here. The best mean accuracy
# wins; cross-entropy breaks ties.
LEARNING_RATES: dict[Name, float] = {
    "adamsrt": 0.03,
    "adams": 0.01,
    "sgdmrt": 1.0,
    "adamg": 0.3,
    "adamg_star": 3.0,
    "adamp": 0.3,
    "sgdp": 1.0,
    "adamh": 0.1,
    "muonh": 0.1,
    "rotational_adamw": 0.03,
    "rotational_sgdm": 0.3,
    "rotational_lion": 0.01,
    "adam": 0.03,
    "adamw": 0.01,
    "sgd": 0.3,
}

# Okabe and Ito's colors, and more that differ from them.
STYLES: dict[Name, tuple[str, str]] = {
    "adamsrt": ("#D55E00", "-"),
    "adams": ("#E69F00", "-"),
    "sgdmrt": ("#CC79A7", "-"),
    "adamg": ("#000000", "-"),
    "adamg_star": ("#999999", "-"),
    "adamp": ("#882255", "-."),
    "sgdp": ("#7A4B1E", "-."),
    "adamh": ("#117733", "-"),
    "muonh": ("#CC6677", "-."),
    "rotational_adamw": ("#332288", ":"),
    "rotational_sgdm": ("#999933", ":"),
    "rotational_lion": ("#AA4499", ":"),
    "adam": ("#0072B2", "--"),
    "adamw": ("#56B4E9", "--"),
    "sgd": ("#009E73", "--"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Compares optimizers on 8x8 images of handwritten digits."""

    optimizer: tuple[Name, ...] = DEFAULT
    """Optimizers to train with, one or several."""
    learning_rate: float | None = None
    """Initial learning rate, decayed along a cosine (constant for adamg_star). None: the tuned
    one of each optimizer."""
    epochs: int = 20
    """Passes over the training set."""
    groups: Literal["rules", "auto"] = "rules"
    """How the radial groups are given: by the path rules in this file, or found automatically."""
    seeds: int = 10
    """Runs per optimizer; the seeds 0, 1, ... set the initial weights and the batches."""
    out: pathlib.Path = pathlib.Path("out/digits")
    """Directory for results.json and curves.png."""


class Network(nnx.Module):
    """Three convolutions, each with BatchNorm and ReLU, mean pooling and a linear layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        # BatchNorm subtracts the mean, so a bias before it has no effect.
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), use_bias=False, rngs=rngs)
        norm = functools.partial(nnx.BatchNorm, momentum=0.9, rngs=rngs)
        self.conv1, self.norm1 = conv(1, 16), norm(16)
        self.conv2, self.norm2 = conv(16, 32, strides=2), norm(32)
        self.conv3, self.norm3 = conv(32, 32), norm(32)
        self.linear = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(self.norm2(self.conv2(x)))
        x = nnx.relu(self.norm3(self.conv3(x)))
        return self.linear(x.mean(axis=(1, 2)))

    def kernels(self) -> list[jax.Array]:
        return [conv.kernel[...] for conv in (self.conv1, self.conv2, self.conv3)]


def make_optimizer(
    name: Name, learning_rate: float, steps: int, groups: so.Groups
) -> optax.GradientTransformation:
    """The optimizer of that name; its learning rate decays to zero, except for adamg_star."""
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    if name in BASELINES:
        return BASELINES[name](schedule)
    # The initial second moment of AdamG* depends on the learning rate, which must be a number.
    return SPHERICAL[name](learning_rate if name == "adamg_star" else schedule, groups=groups)


def find_groups(images: np.ndarray) -> so.FoundGroups:
    """Finds the groups of the network automatically, with a few images."""
    graphdef, params, rest = nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)

    def forward(params: Any, images: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, rest, copy=True)(images)

    return so.find_radial_groups(forward, params, jnp.asarray(images), explain=True)


@nnx.jit
def train_step(
    model: Network, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array
) -> dict[str, jax.Array]:
    """Takes one step in place; returns loss, mean radius and mean angle of the filters."""

    def loss_fn(model: Network) -> jax.Array:
        logits = model(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    before = model.kernels()
    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    after = model.kernels()

    filters = so.per_filter()
    radii = [so.geometry.norm(x, filters) for x in after]
    angles = [so.geometry.angle(x, y, filters) for x, y in zip(before, after, strict=True)]
    return {
        "loss": loss,
        "radius": jnp.concatenate(radii).mean(),
        "angle": jnp.concatenate(angles).mean(),
    }


@nnx.jit
def predict(model: Network, images: jax.Array) -> jax.Array:
    return model(images).argmax(axis=-1)


def load() -> tuple[Dataset, Dataset]:
    """The training and the test set: a fixed stratified split."""
    digits = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    x, x_test, y, y_test = train_test_split(
        images, digits.target, test_size=0.25, stratify=digits.target, random_state=0
    )
    return (x, y), (x_test, y_test)


def train(
    tx: optax.GradientTransformation,
    seed: int,
    epochs: int,
    data: tuple[Dataset, Dataset],
    progress: tqdm.tqdm,
) -> tuple[Curves, list[float]]:
    """Trains one network; returns its curves and the time of each step in milliseconds.

    Loss, radius and angle are means over the steps of an epoch. The test accuracy is measured
    after each epoch.
    """
    (images, labels), (test_images, test_labels) = data
    model = Network(nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    # Without the cache, traversing both objects would take a third of each step's time.
    step = nnx.cached_partial(train_step, model, optimizer)
    rng = np.random.default_rng(seed)
    history: list[dict[str, Any]] = []
    times: list[float] = []
    for _ in range(epochs):
        metrics = []
        for batch in shuffled(rng, len(images), BATCH_SIZE):
            x, y = jnp.asarray(images[batch]), jnp.asarray(labels[batch])
            start = time.perf_counter()
            metrics.append(jax.block_until_ready(step(x, y)))
            times.append(1e3 * (time.perf_counter() - start))
        means = {key: np.mean([values[key] for values in metrics]) for key in metrics[0]}
        model.eval()  # BatchNorm uses its running statistics
        predictions = np.asarray(predict(model, jnp.asarray(test_images)))
        model.train()
        history.append(means | {"accuracy": (predictions == test_labels).mean()})
        progress.update()
    curves = {key: np.array([epoch[key] for epoch in history]) for key in history[0]}
    return curves, times[1:]  # the first step may include the compilation


def summarize(learning_rate: float, runs: list[Curves], times: list[float]) -> dict[str, Any]:
    """The results of one optimizer, for results.json."""
    accuracies = [float(run["accuracy"][-1]) for run in runs]
    return {
        "learning_rate": learning_rate,
        "test_accuracy_mean": statistics.mean(accuracies),
        "test_accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "test_accuracy_per_seed": accuracies,
        "step_ms": statistics.median(times),
    }


def print_table(results: dict[Name, dict[str, Any]]) -> None:
    table = [["optimizer", "learning rate", "test accuracy (%)", "step (ms)"]]
    for name, row in results.items():
        std = row["test_accuracy_std"]
        accuracy = f"{100 * row['test_accuracy_mean']:.2f}"
        accuracy += "" if std is None else f" ± {100 * std:.2f}"
        table.append([name, f"{row['learning_rate']:g}", accuracy, f"{row['step_ms']:.2f}"])
    print()
    print_rows(*table)
    print("Mean ± sample standard deviation over seeds; median step, without compilation.")


def plot(runs: dict[Name, list[Curves]], rates: dict[Name, float], path: pathlib.Path) -> None:
    """Plots the curves: lines are means over the seeds, bands span the range of the seeds."""
    columns = 3
    height = 6.7 + 0.25 * math.ceil(len(runs) / columns)  # two rows of panels, and the legend
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    panels = {
        "loss": "training loss (nats)",
        "accuracy": "test accuracy (%)",
        "radius": "mean radius of the filters",
        "angle": "mean angle per step of the filters (rad)",
    }
    for ax, (key, label) in zip(axes.flat, panels.items(), strict=True):
        ax.set_yscale("log" if key in ("loss", "angle") else "linear")
        for name in runs:
            values = np.stack([run[key] for run in runs[name]]) * (100 if key == "accuracy" else 1)
            epochs = np.arange(1, values.shape[1] + 1)
            color, style = STYLES[name]
            style = "." if len(epochs) == 1 else style
            ax.plot(epochs, values.mean(0), style, color=color, label=f"{name}, {rates[name]:g}")
            ax.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
    # The axis covers the second half of the epochs, so that differences are visible.
    late = [run["accuracy"][len(run["accuracy"]) // 2 :] for each in runs.values() for run in each]
    axes[0, 1].set_ylim(100 * np.min(late) - 1, 100.5)
    for ax in axes[1]:
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    title = "optimizer, initial learning rate"
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, title=title)
    figure.savefig(path, dpi=100)


def main(config: Config) -> None:
    rate = config.learning_rate
    check_options(
        ("--optimizer", "none", "at least one name", len(config.optimizer) > 0),
        ("--learning-rate", rate, "a positive number", rate is None or 0 < rate < math.inf),
        ("--epochs", config.epochs, "at least 1", config.epochs >= 1),
        ("--seeds", config.seeds, "at least 1", config.seeds >= 1),
    )
    check_out(config.out, "results.json", "curves.png")
    data = load()
    groups = find_groups(data[0][0][:8]) if config.groups == "auto" else RULES
    print(so.describe_groups(nnx.state(Network(nnx.Rngs(0)), nnx.Param), groups), flush=True)

    steps = config.epochs * (len(data[0][0]) // BATCH_SIZE)
    names = tuple(dict.fromkeys(config.optimizer))
    rates = {name: config.learning_rate or LEARNING_RATES[name] for name in names}
    # All seeds share these: a new transformation would be compiled again.
    txs = {name: make_optimizer(name, rates[name], steps, groups) for name in names}
    runs: dict[Name, list[Curves]] = {name: [] for name in names}
    times: dict[Name, list[float]] = {name: [] for name in names}
    with tqdm.tqdm(total=config.seeds * len(names) * config.epochs, unit="epoch") as progress:
        for seed in range(config.seeds):
            for name in names:  # innermost, so that machine load affects all optimizers alike
                progress.set_description(f"seed {seed}, {name}")
                curves, elapsed = train(txs[name], seed, config.epochs, data, progress)
                runs[name].append(curves)
                times[name] += elapsed

    results = {name: summarize(rates[name], runs[name], times[name]) for name in names}
    print_table(results)
    settings = {"epochs": config.epochs, "seeds": config.seeds, "batch_size": BATCH_SIZE}
    report = settings | {"device": jax.devices()[0].device_kind, "optimizers": results}
    (config.out / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(runs, rates, config.out / "curves.png")
    print(f"Wrote results.json and curves.png to {config.out}.")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
