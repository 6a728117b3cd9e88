"""Does the best learning rate of a narrow transformer fit a wide one?

Trains transformers of several widths on a text, with and without warm-up. The learning rate is
doubled or halved until the best rate lies between two others. The rate of embedding, head and gains
is fixed. The program prints the best rates, their drift over the widths, and the loss that the
widest model has at the best rate of the narrowest. It writes `results.json` and `curves.png`. Runs
are stored in `runs.jsonl`: if you stop the program and start it again, it continues after the last
run.

    python examples/transfer.py                               # an hour on two cores
    python examples/transfer.py --width 32 64 --seeds 1
    python examples/transfer.py --width 256 512 1024 --steps 1000 --batch 64   # for a GPU
    python examples/transfer.py --help
"""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
import statistics
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np
import optax
import tqdm
import tyro
from helpers.options import check_options
from helpers.outputs import check_out, print_rows
from helpers.runs import Runs
from helpers.text import Windows, batches, encode, read
from helpers.transformer import Size, initialise
from language import Name, make_optimizer, make_schedule, mean_loss, update
from matplotlib.figure import Figure

# Where the search of the learning rate starts, as a power of 2.
START: dict[Name, int] = {
    "adamw": -8,
    "adamh": -6,
    "muonh": -6,
    "muon": -6,
    "rotational_adamw": -6,
    "adamsrt": -6,
    "ngpt": -6,
}
COLORS = ("#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#000000")


@dataclasses.dataclass(frozen=True)
class Config:
    """Searches the best learning rate at several widths."""

    optimizer: tuple[Name, ...] = ("adamw", "adamh", "muonh", "muon", "rotational_adamw")
    """Of the blocks' matrices."""
    width: tuple[int, ...] = (32, 64, 128, 256)
    """Widths, of heads of 32."""
    layers: int = 2
    """Blocks."""
    warmup: tuple[int, ...] = (0, 10)
    """Steps in which the learning rate rises, before it falls along a cosine."""
    steps: int = 80
    """Training steps of a run."""
    batch: int = 8
    """Windows in a step."""
    context: int = 64
    """Bytes in a window."""
    weight_decay: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    """Decays of adamw and muon to choose from, at the second width and with the last warm-up."""
    other_learning_rate: float = 5e-3
    """Of embedding, head and gains, at every width."""
    seeds: int = 3
    """Runs of each setting, with the seeds 0, 1, ..."""
    text: pathlib.Path | None = None
    """A text in UTF-8. None: the King James Bible, of Debian's package bible-kjv."""
    out: pathlib.Path = pathlib.Path("out/transfer")
    """Directory for runs.jsonl, results.json and curves.png."""


Key: TypeAlias = tuple[str, int, int, float, int]  # optimizer, width, warm-up, decay, power of 2
Losses: TypeAlias = dict[Key, list[float]]  # held out, in nats, per seed


def make_run(name: Name, size: Size, config: Config) -> Callable[..., float]:
    """Training and testing at one size, compiled once for all settings."""
    graph, _ = initialise(size, 0)

    def make(rate: Any, warmup: Any, decay: Any) -> optax.GradientTransformationExtraArgs:
        schedules = (
            make_schedule(peak, warmup, config.steps) for peak in (rate, config.other_learning_rate)
        )
        return make_optimizer(name, *schedules, size, decay)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, tokens: jax.Array, *setting: Any) -> Any:
        return update(make(*setting), graph, params, state, tokens)[:2]

    test = jax.jit(functools.partial(mean_loss, graph))
    start = jax.jit(make(1.0, 0, 0.1).init)

    def run(text: Any, seed: int, rate: float, warmup: int, decay: float) -> float:
        params = initialise(size, seed)[1]
        state = start(params)
        iterator = batches(text.train, config.context, config.batch, seed)
        for _ in range(config.steps):
            params, state = step(params, state, next(iterator), rate, warmup, decay)
        windows = Windows(text.held_out, config.context)
        held_out = np.stack([windows[i] for i in range(min(128, len(windows)))])
        return float(test(params, held_out))

    return run


class Trials:
    """Held-out losses, huge where training diverged; those that `runs` lacks are trained for."""

    def __init__(self, config: Config, runs: Runs, progress: tqdm.tqdm) -> None:
        self.config, self.runs, self.progress = config, runs, progress
        self.text = encode(read(config.text), "byte")
        self.compiled = functools.cache(self.compile)

    def __call__(self, key: Key) -> list[float]:
        return [self.one(key, seed) for seed in range(self.config.seeds)]

    def one(self, key: Key, seed: int) -> float:
        return self.runs((*key, seed), functools.partial(self.train, *key, seed))

    def train(
        self, name: Name, width: int, warmup: int, decay: float, power: int, seed: int
    ) -> float:
        self.progress.set_description(f"{name}, width {width}, warm-up {warmup}, 2^{power}")
        loss = self.compiled(name, width)(self.text, seed, 2.0**power, warmup, decay)
        self.progress.update()
        return loss if math.isfinite(loss) else 1e9

    def compile(self, name: Name, width: int) -> Callable[..., float]:
        c = self.config
        size = Size(c.layers, width, max(1, width // 32), 3 * width, c.context, 256)
        return make_run(name, size, c)


def search(trials: Trials, name: str, width: int, warmup: int, decay: float, start: int) -> Losses:
    """Powers of 2 from the start on, until the best mean loss has one on either side."""
    found: Losses = {}
    best = start
    # With one seed to where the best is about, then with all of them.
    for measured in (lambda key: [trials.one(key, 0)], trials):
        while True:
            means = []
            for power in (best - 1, best, best + 1):
                key = (name, width, warmup, decay, power)
                losses = measured(key)
                means.append(statistics.mean(losses))
                if measured is trials:
                    found[key] = losses
            if means[1] <= min(means) or abs(best - start) > 12:
                break
            best += -1 if means[0] < means[2] else 1
    return found


def best_power(losses: Losses, seed: int | None = None) -> float:
    """The power of 2 of the least loss, between the grid's points by a parabola through three."""
    values = {
        key[-1]: statistics.mean(each) if seed is None else each[seed]
        for key, each in losses.items()
    }
    power = min(values, key=values.__getitem__)
    if power - 1 not in values or power + 1 not in values or values[power + 1] > 1e6:
        return float(power)
    below, here, above = (values[power + i] for i in (-1, 0, 1))
    curvature = below - 2 * here + above
    return power + (below - above) / (2 * curvature) if curvature > 0 else float(power)


def measure(config: Config, trials: Trials) -> list[dict[str, Any]]:
    """A row for each optimizer and warm-up."""
    rows = []
    for name in config.optimizer:
        decay, start = 0.1, START[name]
        if name in ("adamw", "muon"):
            width = config.width[min(1, len(config.width) - 1)]
            tried = {
                each: search(trials, name, width, config.warmup[-1], each, start)
                for each in config.weight_decay
            }
            least = {
                each: min(statistics.mean(losses) for losses in found.values())
                for each, found in tried.items()
            }
            decay = min(least, key=least.__getitem__)
        for warmup in config.warmup:
            curves, at = {}, start
            for width in config.width:
                curves[width] = search(trials, name, width, warmup, decay, at)
                at = round(best_power(curves[width]))
            rows.append(summarize(config, trials, name, warmup, decay, curves))
    return rows


def summarize(
    config: Config, trials: Trials, name: str, warmup: int, decay: float, curves: dict[int, Losses]
) -> dict[str, Any]:
    seeds, widest = range(config.seeds), config.width[-1]
    best = {width: [2 ** best_power(curves[width], seed) for seed in seeds] for width in curves}
    drifts = [
        max(rates[seed] for rates in best.values()) / min(rates[seed] for rates in best.values())
        for seed in seeds
    ]
    means = {
        width: {key[-1]: statistics.mean(losses) for key, losses in curve.items()}
        for width, curve in curves.items()
    }
    transferred, own = (
        min(means[width], key=means[width].__getitem__) for width in (config.width[0], widest)
    )
    at_own, at_transferred = (
        trials((name, widest, warmup, decay, power)) for power in (own, transferred)
    )
    return {
        "optimizer": name,
        "warmup": warmup,
        "weight_decay": decay if name in ("adamw", "muon", "rotational_adamw") else None,
        "best_rate": {str(width): best[width] for width in best},
        "drift": drifts,
        "loss_at_own_rate": at_own,
        "loss_at_transferred_rate": at_transferred,
        "curves": {
            str(width): {str(key[-1]): losses for key, losses in sorted(curve.items())}
            for width, curve in curves.items()
        },
    }


def spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def print_table(rows: list[dict[str, Any]], widths: tuple[int, ...]) -> None:
    head = ["optimizer", "warm-up", *(f"best at {width}" for width in widths), "drift"]
    table = [[*head, f"loss at {widths[-1]}", f"at the rate of {widths[0]}: more"]]
    for row in rows:
        more = [
            b - a
            for a, b in zip(row["loss_at_own_rate"], row["loss_at_transferred_rate"], strict=True)
        ]
        rates = (statistics.geometric_mean(row["best_rate"][str(width)]) for width in widths)
        cells = [row["optimizer"], str(row["warmup"]), *(f"{rate:.4f}" for rate in rates)]
        loss = spread(row["loss_at_own_rate"], 3)
        table.append([*cells, spread(row["drift"], 1), loss, spread(more, 3)])
    print_rows(*table)
    print("Mean over seeds (least to largest). Drift: the largest best rate over the smallest.")


def plot(rows: list[dict[str, Any]], config: Config, path: pathlib.Path) -> None:
    names, warmups = config.optimizer, config.warmup
    height, width = (len(warmups), len(names)) if len(names) > 1 else (1, len(warmups))
    figure = Figure(figsize=(max(3.1 * width, 4.5), 2.9 * height + 0.4), layout="constrained")
    axes = figure.subplots(height, width, sharey=True, squeeze=False)
    floor = math.inf
    for ax, row in zip(axes.T.flat, rows, strict=True):
        for color, (size, curve) in zip(itertools.cycle(COLORS), row["curves"].items()):
            rates = [2.0 ** int(power) for power in curve]
            means = [statistics.mean(losses) for losses in curve.values()]
            ax.plot(rates, means, "o-", color=color, ms=3, lw=1.2, label=f"width {size}")
            best = int(np.argmin(means))
            ax.plot(rates[best], means[best], "o", color=color, ms=8, mfc="none")
            floor = min(floor, means[best])
        ax.set_xscale("log", base=2)
        ax.set_title(f"{row['optimizer']}, warm-up {row['warmup']}", fontsize=9)
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylim(floor - 0.05, floor + 0.9)
    for ax in axes[-1]:
        ax.set_xlabel("learning rate")
    for ax in axes[:, 0]:
        ax.set_ylabel("held-out loss (nats)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.savefig(path, dpi=100)


def main(config: Config) -> None:
    widths = config.width
    heads = all(width == 32 or width % 32 == 0 for width in widths) and len(widths) > 1
    check_options(
        ("--width", widths, "at least two multiples of 32", heads),
        ("--steps", config.steps, "at least 1", config.steps >= 1),
        ("--seeds", config.seeds, "at least 1", config.seeds >= 1),
        ("--optimizer", config.optimizer, "at least one name", len(config.optimizer) > 0),
        ("--warmup", config.warmup, "at least one number", len(config.warmup) > 0),
        ("--weight-decay", config.weight_decay, "some", len(config.weight_decay) > 0),
    )
    check_out(config.out, "runs.jsonl", "results.json", "curves.png")
    settings = dataclasses.asdict(config) | {"text": str(config.text), "out": None}
    fixed = ("layers", "steps", "batch", "context", "other_learning_rate", "text")
    runs = Runs(config.out, **{name: settings[name] for name in fixed})
    with tqdm.tqdm(unit="run") as progress:
        rows = measure(config, Trials(config, runs, progress))
    print_table(rows, widths)
    report = settings | {"device": jax.devices()[0].device_kind, "rows": rows}
    (config.out / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(rows, config, config.out / "curves.png")
    print(f"Wrote results.json and curves.png to {config.out}.")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
