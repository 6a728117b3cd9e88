"""Compares tuning learning rate and weight decay (AdamW) with tuning one angle (fixed radius).

With AdamW, the angle per step of a normalized filter depends on learning rate and weight decay, so
both must be tuned. On a sphere of fixed radius, the angle per step is the only number to tune. The
program trains the filters of a network by AdamW over a grid of learning rates and weight decays,
and by Hyperball and its rotational variant over a grid of angles, with as many angles as AdamW has
learning rates. All other parameters are trained by the same Adam. It reports the expected held-out
loss of the best of k settings drawn from the grid. Some seeds choose the best setting, other seeds
measure its loss.

The criterion was fixed before the first run. Hyperball needs fewer settings than AdamW if its loss
at k = 4 is below AdamW's at k = 16, and the whole 95 % interval of the difference is below 0. AdamW
is better if the whole interval is above 0. Otherwise nothing is shown. The criterion for the
rotational variant is the same.

By default the network is that of digits.py, trained on few digits as in ablation.py. With --images
it is the ResNet20 of examples/paper with width 4, on a data set in a format that examples/paper
reads. Finished runs are kept in `runs.jsonl`: a program that was stopped resumes after the last
one. It prints a table and writes `results.json` and `curves.png`.

    python examples/decay_removed.py                          # 20 minutes
    python examples/decay_removed.py --images /usr/share/datasets/fashion-mnist
    python examples/decay_removed.py --help
"""

import dataclasses
import functools
import itertools
import json
import pathlib
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import numpy as np
import optax
import scipy.stats
import tqdm
import tyro
from digits import RULES, STYLES, Network, load
from flax import nnx
from helpers.classify import Dataset, Task, finite_loss, make_run, with_adam
from helpers.options import check_options
from helpers.outputs import check_out, print_rows
from helpers.runs import Runs
from matplotlib.figure import Figure
from paper.errors import DataError
from paper.models import GROUPS, make_model
from paper.readers import read

import spherical_optax as so

Name: TypeAlias = Literal["adamw", "hyperball", "rotational"]
NAMES: tuple[Name, ...] = ("adamw", "hyperball", "rotational")

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)  # AdamW's learning rates, and the angles
DECAYS = (0.0, 0.01, 0.1, 1.0, 10.0)
DRAWS = 20  # the largest number of settings tried
FEW, MANY = 4, 16  # the criterion compares FEW settings on a sphere with MANY of AdamW


@dataclasses.dataclass(frozen=True)
class Config:
    """Compares tuning AdamW's learning rate and weight decay with tuning one angle."""

    images: pathlib.Path | None = None
    """Folder of an image data set with 10 classes that examples/paper can read. None: digits."""
    seeds: int | None = None
    """Reported runs per setting, with the seeds 0, 1, ... None: 20, or 2 with --images."""
    search_seeds: int | None = None
    """Runs per setting that choose the best one, with further seeds. None: as many as seeds."""
    epochs: int | None = None
    """Passes over the training images of a run. None: 20 over 320 digits, 2 over 2000 images."""
    out: pathlib.Path = pathlib.Path("out/decay_removed")
    """Directory for runs.jsonl, results.json and curves.png."""


class Setting(NamedTuple):
    rate: float  # AdamW's learning rate, or the angle per step in radians
    decay: float  # AdamW's weight decay; 0 for the others


def settings_of(name: Name) -> list[Setting]:
    decays = DECAYS if name == "adamw" else (0.0,)
    return [Setting(*each) for each in itertools.product(RATES, decays)]


def make_optimizer(
    name: Name, setting: Setting, steps: int, groups: so.Groups
) -> optax.GradientTransformation:
    """The named optimizer for the filters, and Adam for all other parameters.

    Learning rates and angles decay along a cosine.
    """
    rate = optax.cosine_decay_schedule(setting.rate, steps)
    match name:
        case "adamw":
            filters = optax.adamw(rate, weight_decay=setting.decay)
        case "hyperball":
            filters = so.hyperball(optax.scale_by_adam(), rate, groups=groups)
        case "rotational":
            filters = so.rotational(optax.scale_by_adam(), rate, groups=groups)
    return with_adam(filters, steps, lambda tree: jax.tree.map(lambda x: x.ndim == 4, tree))


def digits_task(epochs: int | None) -> Task:
    return Task(lambda seed: Network(nnx.Rngs(seed)), *load(), 320, 32, epochs or 20)


def images_task(folder: pathlib.Path, epochs: int | None) -> Task:
    """The first 3000 training images, 2000 of them per run, and the first 1000 test images.

    The 1000 training images that a run does not use measure the search.
    """
    try:
        found = read(folder)
        small = found.shape is not None and found.shape[0] <= 32
        if not (small and found.classes == 10 and len(found.train) > 2000):
            raise DataError(
                folder,
                "more than 2000 images of one size, at most 32 pixels high, of 10 classes",
                f"{len(found.train)} of shape {found.shape} and {found.classes} classes",
            )
    except DataError as error:
        raise SystemExit(f"decay_removed.py: --images: {error}") from error

    def first(images: Any, number: int) -> Dataset:
        chosen = [images[i] for i in range(min(number, len(images)))]
        pixels, labels = (np.stack(each) for each in zip(*chosen, strict=True))
        return (pixels.astype(np.float32) / 255 - 0.3) / 0.3, labels.astype(np.int32)

    train, test = first(found.train, 3000), first(found.test, 1000)
    channels = train[0].shape[-1]

    def network(seed: int) -> nnx.Module:
        return make_model("resnet20", seed, channels=channels, width=4)

    return Task(network, train, test, 2000, 32, epochs or 2)


def measure(
    name: Name,
    task: Task,
    groups: so.Groups,
    runs: Runs,
    seeds: tuple[int, int],
    progress: tqdm.tqdm,
) -> np.ndarray:
    """The losses (settings, seeds): first those of the reported seeds, then of the search seeds."""
    run = make_run(task, functools.partial(make_optimizer, name, steps=task.steps, groups=groups))

    def loss(setting: Setting, seed: int) -> float:
        progress.set_description(f"{name} {setting.rate:g} {setting.decay:g}")
        progress.update()
        test = seed < seeds[0]
        return runs((name, *setting, seed), lambda: finite_loss(run(setting, seed, test=test).loss))

    return np.array(
        [[loss(setting, seed) for seed in range(sum(seeds))] for setting in settings_of(name)]
    )


def expected_best(search: np.ndarray, report: np.ndarray, draws: int = DRAWS) -> np.ndarray:
    """The expected loss of the best of k settings drawn at random, for k = 1, ..., draws.

    The search loss decides which of the drawn settings is best; the reported loss is averaged. Sort
    the n settings by search loss. Among k settings drawn with replacement, the best is the i-th
    with probability ((n - i + 1) / n)^k - ((n - i) / n)^k.

    Args:
      search: Mean loss of each setting over the search seeds (n,).
      report: Mean loss of each setting over the reported seeds (n,).
      draws: The largest k.

    Returns:
      The expected losses (draws,).
    """
    n = len(search)
    ordered = report[np.argsort(search, kind="stable")]
    beyond = np.arange(n, -1, -1) / n  # probability that a draw is not among the first i
    chances = -np.diff(beyond ** np.arange(1, draws + 1)[:, None], axis=1)
    return chances @ ordered


def summarize(search: dict[Name, np.ndarray], report: dict[Name, np.ndarray]) -> dict[str, Any]:
    """Curves and differences with 95 % intervals, by a bootstrap over the seeds.

    Args:
      search: The losses of each optimizer (settings, search seeds).
      report: The losses of each optimizer (settings, reported seeds).

    Returns:
      For each optimizer the expected `loss` for each k, with its interval `low` and `high`. For
      Hyperball and rotational also `difference`: their loss at k = FEW minus AdamW's loss at
      k = MANY, followed by its interval.
    """
    spheres = [name for name in search if name != "adamw"]

    def statistic(chosen: np.ndarray, reported: np.ndarray) -> np.ndarray:
        curves = {
            name: expected_best(search[name][:, chosen].mean(1), report[name][:, reported].mean(1))
            for name in search
        }
        differences = [curves[name][FEW - 1] - curves["adamw"][MANY - 1] for name in spheres]
        return np.concatenate([*curves.values(), differences])

    seeds = [np.arange(each["adamw"].shape[1]) for each in (search, report)]
    interval = scipy.stats.bootstrap(
        seeds, statistic, vectorized=False, method="percentile", n_resamples=2000, rng=0
    ).confidence_interval
    ends = [*range(DRAWS, DRAWS * len(search) + 1, DRAWS)]
    values, lows, highs = (
        np.split(each, ends) for each in (statistic(*seeds), interval.low, interval.high)
    )
    summary: dict[str, Any] = {
        name: {"loss": value.tolist(), "low": low.tolist(), "high": high.tolist()}
        for name, value, low, high in zip(search, values, lows, highs, strict=False)
    }
    for name, value, low, high in zip(spheres, values[-1], lows[-1], highs[-1], strict=True):
        summary[name]["difference"] = [float(value), float(low), float(high)]
    return summary


def verdict(difference: list[float]) -> str:
    _, low, high = difference
    return "fewer settings" if high < 0 else "AdamW is better" if low > 0 else "nothing shown"


def print_table(summary: dict[str, Any]) -> None:
    table = [["settings tried", *summary]]
    for k in (1, 2, FEW, 8, MANY, DRAWS):
        cells = (
            f"{row['loss'][k - 1]:.4f} ({row['low'][k - 1]:.4f}, {row['high'][k - 1]:.4f})"
            for row in summary.values()
        )
        table.append([f"{k}", *cells])
    print()
    print_rows(*table)
    print("Expected held-out loss in nats (95 % interval, bootstrap over the seeds).")
    for name, row in summary.items():
        if "difference" in row:
            value, low, high = row["difference"]
            print(
                f"{name} at {FEW} less adamw at {MANY}: {value:+.4f} ({low:+.4f}, {high:+.4f}): "
                f"{verdict(row['difference'])}."
            )


def plot(summary: dict[str, Any], report: dict[Name, np.ndarray], path: pathlib.Path) -> None:
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draws = np.arange(1, DRAWS + 1)
    colors = {"adamw": STYLES["adamw"][0], "hyperball": STYLES["adamh"][0]}
    for name, row in summary.items():
        color = colors.get(name, STYLES["rotational_adamw"][0])
        left.plot(draws, row["loss"], color=color, label=name)
        left.fill_between(draws, row["low"], row["high"], color=color, alpha=0.15, lw=0)
        means = report[name].mean(1).reshape(len(RATES), -1).T
        decays = DECAYS if name == "adamw" else ("",)
        for i, (decay, losses) in enumerate(zip(decays, means, strict=True)):
            label = f"{name}, decay {decay:g}" if name == "adamw" else name
            style = ("-", "--", "-.", ":", (0, (1, 5)))[i]
            right.plot(RATES, losses, marker="o", ms=3, ls=style, color=color, label=label)
    left.set_xlabel("settings tried")
    left.set_ylabel("expected held-out loss of the best (nats)")
    left.set_xticks((1, 4, 8, 12, 16, 20))
    right.set_xlabel("learning rate, or angle (rad)")
    right.set_ylabel("held-out loss (nats)")
    right.set_xscale("log")
    right.set_yscale("log")
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    figure.savefig(path, dpi=100)


def main(config: Config) -> None:
    seeds = config.seeds if config.seeds is not None else 20 if config.images is None else 2
    search_seeds = config.search_seeds if config.search_seeds is not None else seeds
    check_options(
        ("--seeds", config.seeds, "at least 2", seeds >= 2),
        ("--search-seeds", config.search_seeds, "at least 2", search_seeds >= 2),
        ("--epochs", config.epochs, "at least 1", config.epochs is None or config.epochs >= 1),
    )
    check_out(config.out, "runs.jsonl", "results.json", "curves.png")
    images, groups = config.images, RULES if config.images is None else GROUPS
    task = digits_task(config.epochs) if images is None else images_task(images, config.epochs)
    runs = Runs(config.out, images=images and str(images), epochs=task.epochs, seeds=seeds)
    search: dict[Name, np.ndarray] = {}
    report: dict[Name, np.ndarray] = {}
    total = (seeds + search_seeds) * sum(len(settings_of(name)) for name in NAMES)
    with tqdm.tqdm(total=total, unit="run") as progress:
        for name in NAMES:
            found = measure(name, task, groups, runs, (seeds, search_seeds), progress)
            report[name], search[name] = np.split(found, [seeds], axis=1)
    summary = summarize(search, report)
    print_table(summary)
    content = {
        "device": jax.devices()[0].device_kind,
        "images": images and str(images),
        "epochs": task.epochs,
        "seeds": seeds,
        "search_seeds": search_seeds,
        "rates": RATES,
        "decays": DECAYS,
        "optimizers": summary,
        "losses": {
            name: {"search": search[name].tolist(), "report": report[name].tolist()}
            for name in NAMES
        },
    }
    (config.out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    plot(summary, report, config.out / "curves.png")
    print(f"Wrote results.json and curves.png to {config.out}.")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
