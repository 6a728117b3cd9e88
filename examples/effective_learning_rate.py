"""Measures effective learning rate, radius and angle of the filters of digits.py's network.

For every step and filter, the theorem predicts the effective learning rate and the angle from the
optimizer's state. The program compares the prediction with the angle measured on the parameters. It
prints the largest relative deviation, and writes `results.json` and `curves.png`. Each optimizer
runs without and with weight decay.

    python examples/effective_learning_rate.py
    python examples/effective_learning_rate.py --optimizer sgd adamw --epochs 80
    python examples/effective_learning_rate.py --help

The learning rates are constant, so only the radius and, for Adam and its variants, the second
moment change the effective learning rate. All computations are in float64: the angle of a step
comes from a small difference of parameters, which float32 resolves to few digits.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
import tyro
from digits import BATCH_SIZE, RULES, Network, load
from flax import nnx
from helpers.classify import Dataset, functional_loss, shuffled
from helpers.options import check_options
from helpers.outputs import check_out, print_rows
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from PIL import Image

import spherical_optax as so

Name: TypeAlias = Literal["sgd", "adam", "adamw", "adams", "adamsrt"]

LAYERS = {"conv1": "#D55E00", "conv2": "#CC79A7", "conv3": "#56B4E9"}  # with their colors
FILTERS = so.per_filter()
MOMENTUM, B1, B2, EPS = 0.9, 0.9, 0.999, 1e-8


class Setting(NamedTuple):
    """Chosen so that the effect of weight decay shows within 40 epochs, not for accuracy."""

    learning_rate: float
    decay: float


SETTINGS: dict[Name, Setting] = {
    "sgd": Setting(0.1, 1e-2),
    "adam": Setting(0.01, 5e-3),
    "adamw": Setting(0.01, 1.0),
    "adams": Setting(0.01, 5e-3),
    "adamsrt": Setting(0.01, 2e-2),
}


class Record(NamedTuple):
    """One step of one layer, with one value per filter."""

    effective: jax.Array
    radius: jax.Array
    angle: jax.Array
    predicted: jax.Array


@dataclasses.dataclass(frozen=True)
class Config:
    """Effective learning rate, radius and angle per step of each layer on digits."""

    optimizer: tuple[Name, ...] = get_args(Name)
    """Optimizers to train with, one or several. Each runs without and with weight decay."""
    epochs: int = 40
    """Passes over the training set, each of 10 steps."""
    seed: int = 0
    """Seed of the initial weights and the batches."""
    out: pathlib.Path = pathlib.Path("out/effective_learning_rate")
    """Directory for results.json and curves.png."""


def make_optimizer(name: Name, learning_rate: float, decay: float) -> optax.GradientTransformation:
    """The optimizer of that name; weight decay is L2, or decoupled for adamw."""
    if name == "adams":
        return so.adams(learning_rate, B1, B2, EPS, groups=RULES, weight_decay=decay)
    if name == "adamsrt":
        return so.adamsrt(learning_rate, B1, B2, EPS, groups=RULES, weight_decay=decay)
    if name == "adamw":
        return optax.adamw(learning_rate, B1, B2, EPS, weight_decay=decay)
    inner = (
        optax.sgd(learning_rate, MOMENTUM)
        if name == "sgd"
        else optax.adam(learning_rate, B1, B2, EPS)
    )
    return optax.chain(optax.add_decayed_weights(decay), inner)


def quotient(
    name: Name, state: optax.OptState, layer: str, gradient: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, jax.Array | float]:
    """Numerator and denominator of the last step of one layer's kernel.

    Args:
      name: The optimizer.
      state: The optimizer's state after the step.
      layer: The layer.
      gradient: The gradient of the step, including L2.
      kernel: The kernel before the step.
    """

    def moment(field: str) -> jax.Array:
        return optax.tree.get(state, field)[layer]["kernel"][...]

    if name == "sgd":
        return moment("trace"), 1.0
    m, v, count = moment("mu"), moment("nu"), optax.tree.get(state, "count")
    if name == "adamsrt":  # its moments are of the gradient's tangent part on the unit sphere
        radius = so.geometry.norm(kernel, FILTERS)
        radial = gradient - so.geometry.project(gradient, kernel, FILTERS)
        m, v = m / radius + (1 - B1) * radial, v / radius**2
    b = jnp.sqrt(v / (1 - B2**count)) + EPS
    if name in ("adams", "adamsrt"):
        b /= np.sqrt(kernel[..., 0].size)
    return m / (1 - B1**count), b


def batches(data: Dataset, seed: int, epochs: int) -> Iterator[tuple[jax.Array, jax.Array]]:
    images, labels = data
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        for batch in shuffled(rng, len(images), BATCH_SIZE):
            yield jnp.asarray(images[batch], float), jnp.asarray(labels[batch])


def make_step(
    name: Name, decay: float, tx: optax.GradientTransformation
) -> Callable[..., tuple[Any, optax.OptState, list[Record]]]:
    """Returns the optimizer's step, which also returns a record per layer."""
    learning_rate = SETTINGS[name].learning_rate
    coupled = 0.0 if name == "adamw" else decay
    # Decoupled decay multiplies x by 1 - learning_rate * decay, which changes no direction.
    # Dividing the learning rate by this factor instead rotates the filters by the same angle.
    rate = learning_rate / (1 - learning_rate * decay) if name == "adamw" else learning_rate

    @jax.jit
    def step(grads: Any, state: Any, params: Any) -> tuple[Any, optax.OptState, list[Record]]:
        updates, state = tx.update(grads, state, params)
        after = optax.apply_updates(params, updates)
        records = []
        for layer in LAYERS:
            x, y, g = (tree[layer]["kernel"][...] for tree in (params, after, grads))
            a, b = quotient(name, state, layer, g + coupled * x, x)
            predicted = so.effective_learning_rate(x, a, b, rate, FILTERS)
            records.append(
                Record(
                    effective=predicted.learning_rate,
                    radius=so.geometry.norm(y, FILTERS),
                    angle=so.geometry.angle(x, y, FILTERS),
                    predicted=predicted.angle,
                )
            )
        return after, state, records

    return step


def train(
    name: Name,
    decay: float,
    params: Any,
    gradient: Callable[..., tuple[jax.Array, Any]],
    data: Iterable[tuple[jax.Array, jax.Array]],
    progress: tqdm.tqdm,
) -> tuple[list[Record], np.ndarray]:
    """Trains on the batches; returns the layers' records (steps, filters) and the losses."""
    tx = make_optimizer(name, SETTINGS[name].learning_rate, decay)
    step = make_step(name, decay, tx)
    state, history, losses = tx.init(params), [], []
    for images, labels in data:
        loss, grads = gradient(params, images, labels)
        params, state, records = step(grads, state, params)
        history.append(records)
        losses.append(loss)
        progress.update()
    return jax.tree.map(lambda *values: np.stack(values), *history), np.stack(losses)


def deviation(records: list[Record]) -> float:
    """The largest relative deviation of the predicted from the measured angle."""
    tiny = np.finfo(float).tiny  # the angle of a filter may be 0
    return max(
        float(np.max(np.abs(record.predicted - record.angle) / np.maximum(record.angle, tiny)))
        for record in records
    )


def per_epoch(values: np.ndarray, epochs: int) -> np.ndarray:
    """The mean of each epoch, over its steps and the filters."""
    return values.reshape(epochs, -1).mean(1)


def summarize(decay: float, records: list[Record], losses: np.ndarray, epochs: int) -> Any:
    """The results of one run, as means over the last epoch and the filters of a layer."""
    return {
        "decay": decay,
        "training_loss": float(per_epoch(losses, epochs)[-1]),
        "largest_relative_deviation": deviation(records),
        "layers": {
            layer: {
                "effective_learning_rate": float(per_epoch(record.effective, epochs)[-1]),
                "radius": float(per_epoch(record.radius, epochs)[-1]),
                "angle_rad": float(per_epoch(record.angle, epochs)[-1]),
            }
            for layer, record in zip(LAYERS, records, strict=True)
        },
    }


def print_table(results: dict[Name, dict[str, Any]]) -> None:
    head = ["optimizer", "decay", "effective learning rate", "radius", "angle (rad)"]
    table = [[*head, "largest deviation"]]
    for name, result in results.items():
        for run in result["runs"]:
            last = run["layers"]["conv3"]
            keys = ("effective_learning_rate", "radius", "angle_rad")
            cells = [f"{run['decay']:g}", *(f"{last[key]:.3g}" for key in keys)]
            table.append([name, *cells, f"{run['largest_relative_deviation']:.1e}"])
    print("\nlast epoch, conv3")
    print_rows(*table)
    print("Deviation of the predicted from the measured angle, relative, over steps and filters.")


def equilibrium_angle(name: Name) -> float | None:
    """The equilibrium angle of Kosson et al. (2024) for random gradients, `None` if unknown."""
    rate, decay = SETTINGS[name]
    return {
        "sgd": math.sqrt(2 * rate * decay / (1 + MOMENTUM)),
        "adamw": math.sqrt(2 * rate * decay * (1 - B1) / (1 + B1)),
    }.get(name)


def plot(runs: dict[Name, list[list[Record]]], epochs: int, path: pathlib.Path) -> None:
    """Plots means over the steps of an epoch and the filters of a layer."""
    figure = Figure(figsize=(1.5 + 2.3 * len(runs), 7.4), layout="constrained")
    axes = figure.subplots(3, len(runs), sharex=True, sharey="row", squeeze=False)
    panels = {
        "effective": "effective learning rate",
        "radius": "radius of a filter",
        "angle": "angle per step (rad)",
    }
    for column, (name, pair) in zip(axes.T, runs.items(), strict=True):
        rate, decay = SETTINGS[name]
        kind = "decoupled" if name == "adamw" else "L2"
        column[0].set_title(f"{name}, learning rate {rate:g}\n{kind} decay {decay:g}", fontsize=10)
        for ax, key in zip(column, panels, strict=True):
            ax.set_yscale("log")
            ax.grid(alpha=0.3)
            for records, style in zip(pair, ("-", "--"), strict=True):
                for record, color in zip(records, LAYERS.values(), strict=True):
                    values = per_epoch(getattr(record, key), epochs)
                    ax.plot(np.arange(1, epochs + 1), values, style, color=color, lw=1.4)
        column[-1].set_xlabel("epoch")
        if (angle := equilibrium_angle(name)) is not None:
            column[-1].axhline(angle, color="0.3", ls=":")
    for ax, label in zip(axes[:, 0], panels.values(), strict=True):
        ax.set_ylabel(label)
    radii = axes[1, 0].yaxis
    radii.set_major_locator(LogLocator(subs=(1, 2, 5)))
    radii.set_major_formatter(StrMethodFormatter("{x:g}"))
    radii.set_minor_formatter(NullFormatter())
    handles = [
        *(Line2D([], [], color=color, label=layer) for layer, color in LAYERS.items()),
        Line2D([], [], color="0.3", label="without decay"),
        Line2D([], [], color="0.3", ls="--", label="with decay"),
        Line2D([], [], color="0.3", ls=":", label="equilibrium of random gradients"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    save(figure, path)


def save(figure: Figure, path: pathlib.Path) -> None:
    """Saves a PNG file with a palette, which is a quarter as large as without."""
    figure.savefig(path, dpi=90)
    with Image.open(path) as image:
        image.convert("RGB").quantize(64).save(path, optimize=True)


def main(config: Config) -> None:
    check_options(
        ("--optimizer", "none", "at least one name", len(config.optimizer) > 0),
        ("--epochs", config.epochs, "at least 1", config.epochs >= 1),
        ("--seed", config.seed, "at least 0", config.seed >= 0),
    )
    check_out(config.out, "results.json", "curves.png")
    jax.config.update("jax_enable_x64", True)
    data, _ = load()
    loss_fn, params = functional_loss(Network(nnx.Rngs(config.seed)))
    gradient = jax.jit(jax.value_and_grad(loss_fn))  # compiled once for all optimizers
    names = tuple(dict.fromkeys(config.optimizer))
    runs: dict[Name, list[list[Record]]] = {}
    results: dict[Name, dict[str, Any]] = {}
    steps = config.epochs * (len(data[0]) // BATCH_SIZE)
    with tqdm.tqdm(total=2 * len(names) * steps, unit="step") as progress:
        for name in names:
            rate, strength = SETTINGS[name]
            runs[name], results[name] = [], {"learning_rate": rate, "runs": []}
            for decay in (0.0, strength):
                progress.set_description(f"{name}, decay {decay:g}")
                same = batches(data, config.seed, config.epochs)
                records, losses = train(name, decay, params, gradient, same, progress)
                runs[name].append(records)
                results[name]["runs"].append(summarize(decay, records, losses, config.epochs))
    print_table(results)
    settings = {"epochs": config.epochs, "seed": config.seed, "batch_size": BATCH_SIZE}
    report = settings | {"device": jax.devices()[0].device_kind, "optimizers": results}
    (config.out / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(runs, config.epochs, config.out / "curves.png")
    print(f"Wrote results.json and curves.png to {config.out}.")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
