"""Measures what a constant angle per step does to BatchNorm's running statistics, and what helps.

In evaluation mode BatchNorm uses running means of its statistics. They lag behind the weights. If
the weights rotate as fast at the end of training as at the beginning, test accuracy suffers. The
program trains the network of digits.py for 150 steps by AdamW and by AdamH, at a constant learning
rate and with a cosine decay to 0. The momentum of the running statistics is 0.99, Flax's default.

The columns of the table are test accuracies:
- "evaluation mode": with the running statistics;
- "batch statistics": with the statistics of the test batch;
- "taken anew": with statistics recomputed from the training images;
- "anew, weights averaged": with recomputed statistics, and weights averaged over the last third of
  the steps.

    python examples/running_statistics.py                 # 3 minutes on two cores
    python examples/running_statistics.py --steps 600 --seeds 5
    python examples/running_statistics.py --help
"""

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np
import optax
import tqdm
import tyro
from digits import BATCH_SIZE, RULES, Network, load
from flax import nnx
from helpers.classify import Dataset, forward, shuffled, train_step, with_adam
from helpers.intervals import half_interval
from helpers.options import check_options
from helpers.outputs import check_out, print_rows

import spherical_optax as so

COLUMNS = ("evaluation mode", "batch statistics", "taken anew", "anew, weights averaged")
RATES = {"adamw": (1e-3, 1e-2), "adamh": (0.01, 0.03, 0.1)}


@dataclasses.dataclass(frozen=True)
class Config:
    """Compares test accuracy with running and with recomputed statistics."""

    steps: int = 150
    """Training steps, each on 128 images."""
    momentum: float = 0.99
    """Momentum of the running statistics."""
    seeds: int = 10
    """Runs per row of the table, with the seeds 0, 1, ..."""
    out: pathlib.Path = pathlib.Path("out/running_statistics")
    """Directory for results.json."""


def make_optimizer(name: str, rate: float, steps: int, falls: bool) -> Any:
    """The named optimizer for the filters, and Adam for all other parameters.

    Adam's learning rate always decays to 0 along a cosine.
    """
    schedule = optax.cosine_decay_schedule(rate, steps) if falls else rate
    if name == "adamw":
        filters: Any = optax.adamw(schedule, weight_decay=0.1)
    else:
        filters = so.adamh(schedule, groups=RULES)
    return with_adam(filters, steps, lambda tree: jax.tree.map(lambda x: x.ndim == 4, tree))


def make_network(seed: int, momentum: float) -> Network:
    model = Network(nnx.Rngs(seed))
    for norm in (model.norm1, model.norm2, model.norm3):
        norm.momentum = momentum
    return model


def measure(
    name: str, rate: float, falls: bool, config: Config, data: tuple[Dataset, Dataset]
) -> list[list[float]]:
    """The accuracies in %: a row for each seed, with one number per column of the table."""
    (images, labels), test = data
    tx = make_optimizer(name, rate, config.steps, falls)
    graph = nnx.graphdef(make_network(0, config.momentum))
    instant = nnx.graphdef(make_network(0, 0.0))  # its statistics are those of the last batch
    step = jax.jit(functools.partial(train_step, graph, tx))

    @functools.partial(jax.jit, static_argnames="train")
    def accuracy(params: Any, stats: Any, train: bool) -> jax.Array:
        return forward(graph, params, stats, *test, train=train)[1][1]

    @jax.jit
    def taken_anew(params: Any, stats: Any) -> Any:
        """The statistics of the training images: a pass in training mode with momentum 0."""
        return forward(instant, params, stats, images, labels, train=True)[1][0]

    rows = []
    for seed in range(config.seeds):
        _, params, stats = nnx.split(make_network(seed, config.momentum), nnx.Param, nnx.BatchStat)
        variables = (params, stats, tx.init(params))
        rng, average, averaged = np.random.default_rng(seed), params, 0
        passes = math.ceil(config.steps / (len(images) // BATCH_SIZE))
        batches = np.concatenate([shuffled(rng, len(images), BATCH_SIZE) for _ in range(passes)])
        for number, batch in enumerate(batches[: config.steps]):
            variables = step(variables, images[batch], labels[batch])
            if 3 * number >= 2 * config.steps:
                averaged += 1
                average = jax.tree.map(
                    lambda mean, x, n=averaged: mean + (x - mean) / n, average, variables[0]
                )
        params, stats, _ = variables
        found = [
            accuracy(params, stats, False),
            accuracy(params, stats, True),
            accuracy(params, taken_anew(params, stats), False),
            accuracy(average, taken_anew(average, stats), False),
        ]
        rows.append([100 * float(each) for each in found])
    return rows


def interval(values: np.ndarray) -> str:
    """The mean, and half the width of its 95 % interval (Student's t)."""
    if len(values) < 2:
        return f"{values.mean():.1f}"
    return f"{values.mean():.1f} ± {half_interval(values):.1f}"


def main(config: Config) -> None:
    check_options(
        ("--steps", config.steps, "at least 1", config.steps >= 1),
        ("--seeds", config.seeds, "at least 1", config.seeds >= 1),
        ("--momentum", config.momentum, "from 0 to 1", 0 <= config.momentum < 1),
    )
    check_out(config.out, "results.json")
    data, results = load(), []
    work = [
        (name, rate, falls)
        for name, rates in RATES.items()
        for rate in rates
        for falls in (False, True)
    ]
    for name, rate, falls in tqdm.tqdm(work, unit="row"):
        found = measure(name, rate, falls, config, data)
        results.append({"optimizer": name, "rate": rate, "cosine": falls, "accuracies": found})
    table = [["optimizer", "rate", "schedule", *COLUMNS]]
    for row in results:
        columns = np.array(row["accuracies"]).T
        kind = "cosine to 0" if row["cosine"] else "constant"
        table.append([row["optimizer"], f"{row['rate']:g}", kind, *map(interval, columns)])
    print()
    print_rows(*table)
    print("Test accuracy in %, mean over the seeds ± half of the 95 % interval (Student's t).")
    report = dataclasses.asdict(config) | {"out": None, "columns": COLUMNS, "rows": results}
    report["device"] = jax.devices()[0].device_kind
    (config.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"Wrote results.json to {config.out}.")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
