"""Ablates AdamSRT: compares Adam, each of AdamSRT's two changes alone, and both.

AdamSRT makes two changes to Adam. It keeps one second moment per group, so the division does not
change the direction of a group's gradient. It transports the moments to the new point of the group,
so the momentum has no radial part. Each change is a public transform, so the four combinations are
four chains of transforms.

Network and data are those of digits.py, but each run trains on a few hundred images: with all
images, every optimizer reaches an accuracy of 99 %. Learning rate and weight decay are searched
over the same grid for all optimizers. The search measures the loss on held-out training images,
with other seeds than those reported. A seed sets the training images, their batches and the
initial weights. The program prints a table, and writes `results.json` with the whole search.

    python examples/ablation.py
    python examples/ablation.py --images 640 --seeds 10
    python examples/ablation.py --help
"""

import dataclasses
import itertools
import json
import math
import pathlib
import statistics
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import tqdm
import tyro
from digits import RULES, Network, load
from flax import nnx
from helpers.classify import Dataset, Score, Task, make_run
from helpers.intervals import half_interval
from helpers.options import check_options
from helpers.outputs import check_out, print_rows

import spherical_optax as so

BATCH_SIZE = 32
BASELINE = "adam"
DIRECTIONS: dict[str, optax.GradientTransformation] = {
    BASELINE: optax.scale_by_adam(),
    "adams": so.scale_by_adams(groups=RULES),
    "adam + transport": so.transport_moments(optax.scale_by_adam(), RULES),
    "adamsrt": so.transport_moments(so.scale_by_adams(groups=RULES), RULES),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Compares Adam, each of AdamSRT's two changes alone, and both."""

    images: int = 320
    """Training images per run. The search measures the loss on the other training images."""
    epochs: int = 40
    """Passes over the training images of a run."""
    learning_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    """Initial learning rates to search, decayed to zero along a cosine."""
    weight_decays: tuple[float, ...] = (0.0, 1e-4, 1e-3, 1e-2)
    """Weight decays to search, as coupled L2."""
    seeds: int = 5
    """Runs that are reported, with the seeds 0, 1, ... The search uses as many further seeds."""
    out: pathlib.Path = pathlib.Path("out/ablation")
    """Directory for results.json."""


class Setting(NamedTuple):
    """The hyperparameters that the search chooses."""

    learning_rate: float
    weight_decay: float


def make_optimizer(
    direction: optax.GradientTransformation, setting: Setting, steps: int
) -> optax.GradientTransformation:
    """Builds the same chain for each direction: L2 on all weights, direction, learning rate."""
    schedule = optax.cosine_decay_schedule(setting.learning_rate, steps)
    return optax.chain(
        optax.add_decayed_weights(setting.weight_decay),
        direction,
        optax.scale_by_learning_rate(schedule),
    )


class Outcome(NamedTuple):
    setting: Setting  # the best one
    search: dict[Setting, float]  # mean loss on the held-out images
    scores: list[Score]  # on the test set, per seed


def measure(name: str, config: Config, data: tuple[Dataset, Dataset]) -> Outcome:
    """Searches the grid, then tests the best setting with other seeds."""
    task = Task(
        lambda seed: Network(nnx.Rngs(seed)), *data, config.images, BATCH_SIZE, config.epochs
    )
    run = make_run(task, lambda setting: make_optimizer(DIRECTIONS[name], setting, task.steps))
    grid = [Setting(*x) for x in itertools.product(config.learning_rates, config.weight_decays)]
    search_seeds = range(config.seeds, 2 * config.seeds)
    search = {
        setting: statistics.mean(run(setting, seed, test=False).loss for seed in search_seeds)
        for setting in tqdm.tqdm(grid, desc=name, unit="setting")
    }
    best = min(grid, key=lambda setting: np.nan_to_num(search[setting], nan=np.inf))
    return Outcome(best, search, [run(best, seed, test=True) for seed in range(config.seeds)])


def on_edge(value: float, values: tuple[float, ...]) -> bool:
    """Whether the value is at an edge of the grid; 0 is not an edge, as there is none below it."""
    return value == max(values) or value == min(values) > 0


def spread(values: list[float], baseline: list[float]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds, and the mean difference to the baseline.

    Runs are compared with the baseline's run of the same seed. The mean difference has a 95 %
    interval by Student's t.
    """
    differences = [x - y for x, y in zip(values, baseline, strict=True)]
    mean, n = statistics.mean(differences), len(values)
    half = half_interval(differences) if n > 1 else None
    return {
        "mean": statistics.mean(values),
        "std": statistics.stdev(values) if n > 1 else None,
        "difference": mean,
        "difference_interval": None if half is None else [mean - half, mean + half],
        "per_seed": values,
    }


def summarize(outcome: Outcome, baseline: Outcome, config: Config) -> dict[str, Any]:
    """The results of one direction, for results.json."""
    accuracies, losses = zip(*outcome.scores, strict=True)
    base_accuracies, base_losses = zip(*baseline.scores, strict=True)
    rate, decay = outcome.setting
    return {
        "learning_rate": rate,
        "learning_rate_on_edge": on_edge(rate, config.learning_rates),
        "weight_decay": decay,
        "weight_decay_on_edge": on_edge(decay, config.weight_decays),
        "accuracy": spread(accuracies, base_accuracies),
        "loss": spread(losses, base_losses),
        "search": [setting._asdict() | {"loss": x} for setting, x in outcome.search.items()],
    }


def cells(stats: dict[str, Any], scale: float, digits: int) -> list[str]:
    """Table cells: mean with standard deviation, and the difference with its interval."""
    mean = f"{scale * stats['mean']:.{digits}f}"
    difference = f"{scale * stats['difference']:+.{digits}f}"
    if stats["std"] is not None:
        low, high = (f"{scale * end:+.{digits}f}" for end in stats["difference_interval"])
        mean += f" ± {scale * stats['std']:.{digits}f}"
        difference += f" ({low}, {high})"
    return [mean, difference]


def print_table(results: dict[str, dict[str, Any]]) -> None:
    head = ["optimizer", "learning rate", "decay", "accuracy (%)", "difference"]
    table = [[*head, "loss (nats)", head[-1]]]
    for name, result in results.items():
        setting = [
            f"{result[key]:g}" + "*" * result[f"{key}_on_edge"]
            for key in ("learning_rate", "weight_decay")
        ]
        measured = cells(result["accuracy"], 100, 2) + cells(result["loss"], 1, 4)
        table.append([name, *setting, *measured])
    print()
    print_rows(*table)
    print("On the test set: mean ± sample standard deviation over seeds. Differences to")
    print(f"{BASELINE} with the same seed: mean (95 % interval, Student's t).")
    if "*" in "".join(value for line in table for value in line):
        print("* on the grid's edge: a wider grid might have given another value.")


def main(config: Config) -> None:
    data = load()
    most = len(data[0][0]) - 1
    rates, decays = config.learning_rates, config.weight_decays
    rates_valid = len(rates) > 0 and all(0 < rate < math.inf for rate in rates)
    decays_valid = len(decays) > 0 and all(0 <= decay < math.inf for decay in decays)
    images_valid = BATCH_SIZE <= config.images <= most
    check_options(
        ("--images", config.images, f"{BATCH_SIZE} to {most}", images_valid),
        ("--epochs", config.epochs, "at least 1", config.epochs >= 1),
        ("--learning-rates", rates, "positive numbers", rates_valid),
        ("--weight-decays", decays, "numbers not below 0", decays_valid),
        ("--seeds", config.seeds, "at least 1", config.seeds >= 1),
    )
    check_out(config.out, "results.json")
    outcomes = {name: measure(name, config, data) for name in DIRECTIONS}
    results = {
        name: summarize(outcome, outcomes[BASELINE], config) for name, outcome in outcomes.items()
    }
    print_table(results)
    settings = dataclasses.asdict(config) | {"batch_size": BATCH_SIZE}
    del settings["out"]
    report = settings | {"device": jax.devices()[0].device_kind, "optimizers": results}
    (config.out / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"Wrote results.json to {config.out}.")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
