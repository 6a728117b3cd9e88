"""Measures how the learning rate that an optimizer needs depends on the weight norm.

The output of a normalized layer does not depend on the norm of its weights, but training does. If
the weight norm is multiplied by r, the gradient is divided by r, and a step of given length rotates
the weights by an r times smaller angle. To rotate them by the same angle, SGD needs r^2 times the
learning rate. An optimizer that divides by a second moment needs r times the learning rate. An
optimizer whose step is relative to the radius needs the same learning rate.

The program trains a perceptron with BatchNorm on the digits, without weight decay. The initial
weights of its normalized layers are multiplied by 2^-2 to 2^6. At each scale it tries nine learning
rates, each 4 times the one before, and more if the best rates are at the end of this range. All
other parameters are trained by the same Adam. The needed learning rate is the smallest one whose
held-out loss is within 10 % of the best. The program fits the power of the scale with which it
grows. All seeds are trained in parallel.

Finished runs are kept in `runs.jsonl`: a program that was stopped resumes after the last one. It
prints a table and writes `results.json` and `curves.png`.

    python examples/scale_law.py                              # a quarter of an hour
    python examples/scale_law.py --optimizer sgd adamsrt --seeds 5
    python examples/scale_law.py --help
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
import tqdm
import tyro
from digits import load
from flax import nnx
from helpers.classify import Dataset, finite_loss, forward, shuffled, train_step, with_adam
from helpers.options import check_options
from helpers.outputs import check_out, print_rows
from helpers.runs import Runs
from matplotlib.figure import Figure

import spherical_optax as so

Name: TypeAlias = Literal["sgd", "sgdmrt", "adam", "adams", "adamsrt", "hyperball", "rotational"]

THEORY: dict[Name, int] = {
    "sgd": 2,
    "sgdmrt": 2,
    "adam": 1,
    "adams": 1,
    "adamsrt": 1,
    "hyperball": 0,
    "rotational": 0,
}
SCALES = tuple(range(-2, 7))  # as exponents of 2
STEP = 2  # from one learning rate to the next, as an exponent of 2
RATES = 9
# The middle of the nine learning rates, as an exponent of 2. It is the same for all scales.
MIDDLE: dict[Name, int] = {"sgd": 0, "sgdmrt": 0} | dict.fromkeys(
    ("adam", "adams", "adamsrt", "hyperball", "rotational"), -6
)
TOLERANCE = 0.1
BATCH_SIZE = 64
GROUPS = so.groups_by_path({r"hidden\d/kernel": so.per_filter()})

Losses: TypeAlias = dict[int, np.ndarray]  # exponent of the learning rate to the loss per seed


@dataclasses.dataclass(frozen=True)
class Config:
    """Fits the power of the initial scale with which the needed learning rate grows."""

    optimizer: tuple[Name, ...] = tuple(THEORY)
    """Optimizers of the normalized layers."""
    epochs: int = 20
    """Passes over the 1347 digits."""
    seeds: int = 10
    """Runs per setting, with the seeds 0, 1, ..."""
    out: pathlib.Path = pathlib.Path("out/scale_law")
    """Directory for runs.jsonl, results.json and curves.png."""


class Network(nnx.Module):
    """Two hidden layers, each with BatchNorm and ReLU, and a linear layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        norm = functools.partial(nnx.BatchNorm, momentum=0.9, rngs=rngs)
        self.hidden1, self.norm1 = linear(64, 32), norm(32)
        self.hidden2, self.norm2 = linear(32, 32), norm(32)
        self.linear = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm1(self.hidden1(x)))
        return self.linear(nnx.relu(self.norm2(self.hidden2(x))))


def is_hidden(tree: Any) -> Any:
    return jax.tree.map_with_path(lambda path, _: "hidden" in jax.tree_util.keystr(path), tree)


def make_optimizer(name: Name, rate: Any, steps: int) -> optax.GradientTransformation:
    """The named optimizer for the hidden layers, and Adam for all other parameters.

    Learning rates decay along a cosine.
    """
    schedule = optax.cosine_decay_schedule(rate, steps)
    adam = optax.scale_by_adam()
    hidden = {
        "sgd": lambda: optax.sgd(schedule, momentum=0.9),
        "sgdmrt": lambda: so.sgdmrt(schedule, 0.9, groups=GROUPS),
        "adam": lambda: optax.adam(schedule),
        "adams": lambda: so.adams(schedule, groups=GROUPS),
        "adamsrt": lambda: so.adamsrt(schedule, groups=GROUPS),
        "hyperball": lambda: so.hyperball(adam, schedule, groups=GROUPS),
        "rotational": lambda: so.rotational(adam, schedule, groups=GROUPS),
    }[name]()
    return with_adam(hidden, steps, is_hidden)


def make_starts(config: Config, images: int) -> Any:
    """Weights, statistics and batches (steps, BATCH_SIZE), stacked over the seeds."""

    def start(seed: int) -> Any:
        _, params, stats = nnx.split(Network(nnx.Rngs(seed)), nnx.Param, nnx.BatchStat)
        rng = np.random.default_rng(seed)
        epochs = [shuffled(rng, images, BATCH_SIZE) for _ in range(config.epochs)]
        return params, stats, np.concatenate(epochs)

    starts = [start(seed) for seed in range(config.seeds)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)


def make_run(
    name: Name, data: tuple[Dataset, Dataset], starts: Any
) -> Callable[[int, int], list[float]]:
    """Returns a function of scale and learning rate that trains all seeds at once.

    It compiles only once. It returns the held-out loss of each seed.
    """
    (images, digits), test_set = (
        (jnp.asarray(x.reshape(len(x), -1)), jnp.asarray(y)) for x, y in data
    )
    graph = nnx.graphdef(Network(nnx.Rngs(0)))

    def one(params: Any, stats: Any, order: jax.Array, scale: Any, rate: Any) -> jax.Array:
        params = jax.tree.map(
            lambda x, hidden: x * scale if hidden else x, params, is_hidden(params)
        )
        tx = make_optimizer(name, rate, len(order))

        def step(carry: Any, batch: jax.Array) -> Any:
            return train_step(graph, tx, carry, images[batch], digits[batch]), None

        (params, stats, _), _ = jax.lax.scan(step, (params, stats, tx.init(params)), order)
        return forward(graph, params, stats, *test_set, train=False)[0]

    train = jax.jit(jax.vmap(one, in_axes=(0, 0, 0, None, None)))

    def run(scale: int, rate: int) -> list[float]:
        found = train(*starts, 2.0**scale, 2.0**rate)
        return [finite_loss(loss) for loss in np.asarray(found).tolist()]

    return run


def lower_edge(losses: dict[int, float]) -> float:
    """The smallest learning rate whose loss is within TOLERANCE of the best.

    Between two learning rates, the logarithm of the loss is interpolated linearly.

    Args:
      losses: Mean loss by learning rate, as an exponent of 2.

    Returns:
      The learning rate as an exponent of 2. If the loss at the smallest learning rate is within
      the tolerance, that one.
    """
    powers = sorted(losses)
    limit = math.log((1 + TOLERANCE) * min(losses.values()))
    values = [math.log(losses[power]) for power in powers]
    first = next(i for i, value in enumerate(values) if value <= limit)
    if first == 0:
        return float(powers[0])
    part = (values[first - 1] - limit) / (values[first - 1] - values[first])
    return powers[first - 1] + part * (powers[first] - powers[first - 1])


def search(losses: Callable[[int], np.ndarray], middle: int) -> Losses:
    """Tries nine learning rates around the middle, then extends the range where necessary.

    It extends until neither the lower edge nor the best learning rate is at an end of the range.
    """
    half = RATES // 2 * STEP
    found = {power: losses(power) for power in range(middle - half, middle + half + 1, STEP)}
    while True:
        means = {power: float(each.mean()) for power, each in found.items()}
        best = min(means, key=means.__getitem__)
        if lower_edge(means) == min(means):
            power = min(means) - STEP
        elif best == max(means):
            power = max(means) + STEP
        else:
            return dict(sorted(found.items()))
        if abs(power - middle) > 40:
            raise SystemExit(
                f"scale_law.py: the learning rate 2^{power} is not enough: expected the lower edge "
                f"and the best within 2^40 of 2^{middle}, found the best at 2^{best}"
            )
        found[power] = losses(power)


def measure(
    name: Name, run: Callable[[int, int], list[float]], runs: Runs, progress: tqdm.tqdm
) -> dict[int, Losses]:
    """The losses at all learning rates tried, by scale as an exponent of 2."""

    def losses(scale: int, power: int) -> np.ndarray:
        progress.set_description(f"{name}, scale 2^{scale}, 2^{power}")
        progress.update()
        return np.array(runs((name, scale, power), lambda: run(scale, power)))

    return {scale: search(functools.partial(losses, scale), MIDDLE[name]) for scale in SCALES}


def fit(curves: dict[int, Losses]) -> dict[str, Any]:
    """Fits the power of the scale, with a 95 % interval by a bootstrap over the seeds.

    Args:
      curves: Losses by scale, as an exponent of 2.

    Returns:
      `power`, its interval `low` and `high`, and `edges`: the needed learning rate of each scale,
      as an exponent of 2.
    """
    scales = np.array(list(curves))

    def edges(seeds: np.ndarray) -> np.ndarray:
        means = (
            {rate: float(each[seeds].mean()) for rate, each in curve.items()}
            for curve in curves.values()
        )
        return np.array([lower_edge(each) for each in means])

    def power(seeds: np.ndarray) -> float:
        return float(scipy.stats.linregress(scales, edges(seeds)).slope)

    seeds = np.arange(len(next(iter(curves[int(scales[0])].values()))))
    interval = scipy.stats.bootstrap(
        (seeds,), power, vectorized=False, method="percentile", n_resamples=1000, rng=0
    ).confidence_interval
    return {
        "power": power(seeds),
        "low": float(interval.low),
        "high": float(interval.high),
        "edges": edges(seeds).tolist(),
    }


def print_table(rows: dict[Name, dict[str, Any]]) -> None:
    table = [["optimizer", "theory", "power of the scale", "needed at 1", "best loss"]]
    for name, row in rows.items():
        power = f"{row['power']:.2f} ({row['low']:.2f}, {row['high']:.2f})"
        at_one = f"{2 ** row['edges'][SCALES.index(0)]:.2g}"
        best = f"{min(row['best']):.3f} to {max(row['best']):.3f}"
        table.append([name, f"{THEORY[name]}", power, at_one, best])
    print()
    print_rows(*table)
    print("Least squares over the scales (95 % interval, bootstrap over the seeds). Needed: the")
    print(
        "least learning rate, or angle, within 10 % of the best loss. Best loss: over the scales."
    )


def plot(
    rows: dict[Name, dict[str, Any]], found: dict[Name, dict[int, Losses]], path: pathlib.Path
) -> None:
    columns = 4
    lines = math.ceil((len(rows) + 1) / columns)
    figure = Figure(figsize=(12, 2.9 * lines + 0.3), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    shades = [str(0.8 * (1 - i / (len(SCALES) - 1))) for i in range(len(SCALES))]
    for ax, (name, curves) in zip(axes, found.items(), strict=False):
        for shade, (scale, curve) in zip(shades, curves.items(), strict=True):
            rates = [2.0**power for power in curve]
            means = [losses.mean() for losses in curve.values()]
            ax.plot(rates, means, color=shade, lw=1.2, label=f"$2^{{{scale}}}$")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_title(f"{name}: theory {THEORY[name]}, found {rows[name]['power']:.2f}", fontsize=9)
        ax.set_xlabel("learning rate" if name != "rotational" else "angle (rad)")
    axes[0].set_ylabel("held-out loss (nats)")
    axes[0].legend(title="scale", fontsize=6, title_fontsize=7, ncols=2)
    last = axes[len(rows)]
    colors = ("#009E73", "#CC79A7", "#0072B2", "#E69F00", "#D55E00", "#117733", "#332288")
    for color, marker, (name, row) in zip(colors, "osv^D<>", rows.items(), strict=False):
        relative = np.array(row["edges"]) - row["edges"][SCALES.index(0)]
        last.plot(SCALES, relative, marker=marker, ms=4, ls="none", color=color, label=name)
    for power in sorted({THEORY[name] for name in rows}):
        last.plot(SCALES, power * np.array(SCALES), ":", color="gray", lw=1)
    last.set_xlabel("scale (power of 2)")
    last.set_ylabel("needed rate over that at 1 (power of 2)")
    last.legend(fontsize=7)
    for ax in axes:
        ax.grid(alpha=0.3)
    for ax in list(figure.axes)[len(rows) + 1 :]:
        ax.remove()
    figure.savefig(path, dpi=100)


def main(config: Config) -> None:
    check_options(
        ("--optimizer", "none", "at least one name", len(config.optimizer) > 0),
        ("--epochs", config.epochs, "at least 1", config.epochs >= 1),
        ("--seeds", config.seeds, "at least 2", config.seeds >= 2),
    )
    check_out(config.out, "runs.jsonl", "results.json", "curves.png")
    data = load()
    runs = Runs(config.out, epochs=config.epochs, seeds=config.seeds)
    starts = make_starts(config, len(data[0][0]))
    rows: dict[Name, dict[str, Any]] = {}
    found: dict[Name, dict[int, Losses]] = {}
    with tqdm.tqdm(unit="setting") as progress:
        for name in dict.fromkeys(config.optimizer):
            found[name] = measure(name, make_run(name, data, starts), runs, progress)
            best = [min(map(np.mean, curve.values())) for curve in found[name].values()]
            rows[name] = fit(found[name]) | {"best": best}
    print_table(rows)
    report = dataclasses.asdict(config) | {
        "out": None,
        "device": jax.devices()[0].device_kind,
        "scales": SCALES,
        "optimizers": {
            name: row
            | {
                "losses": {
                    scale: {rate: each.tolist() for rate, each in curve.items()}
                    for scale, curve in found[name].items()
                }
            }
            for name, row in rows.items()
        },
    }
    (config.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(rows, found, config.out / "curves.png")
    print(f"Wrote results.json and curves.png to {config.out}.")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
