"""Compares optimizers on the language model of language.py, with searched rates and decays.

Each optimizer has six settings: six learning rates, or three rates with two decays each. All six
train for half of the steps, the best two for all of them, and the better of the two is reported
with three other seeds. Model, text, warm-up and cosine are the same for all. The table has the
held-out loss with its 95 % interval, and the difference to AdamW, seed by seed. Runs are stored in
`runs.jsonl`: if you stop the program and start it again, it continues after the last run.

    python examples/ranking.py                               # three hours on two cores
    python examples/ranking.py --steps 200                   # half of that
    python examples/ranking.py --optimizer muonh muon --seeds 2
    python examples/ranking.py --help
"""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
import tyro
from helpers.intervals import half_interval
from helpers.options import check_options
from helpers.outputs import check_out, print_rows
from helpers.runs import Runs
from helpers.text import encode, read
from helpers.transformer import Size
from language import PRESETS, Name
from transfer import Config as RunConfig
from transfer import make_run

SEARCH_SEED = 1000
FINALISTS = 2


class Found(NamedTuple):
    """The best setting of an optimizer, the losses of its search, and the losses reported."""

    best: tuple[float, float]
    searched: dict[tuple[float, float], float]  # after half of the steps
    finalists: dict[tuple[float, float], float]
    losses: np.ndarray


def doubled(first: float) -> list[tuple[float, float]]:
    return [(first * 2**k, 0.0) for k in range(6)]


def decayed(rates: tuple[float, ...], decays: tuple[float, ...]) -> list[tuple[float, float]]:
    return list(itertools.product(rates, decays))


# Learning rates and decays. Shorter runs with the seed of the search chose these ranges.
SETTINGS: dict[Name, list[tuple[float, float]]] = {
    "adamw": decayed((2.5e-3, 5e-3, 1e-2), (1.0, 3.0)),
    "muon": decayed((0.02, 0.04, 0.08), (0.3, 1.0)),
    "adamsrt": doubled(1.25e-3),
    # Learning rates at a decay of 0.1; rate and decay set the angle together.
    "rotational_adamw": [(rate, 0.1) for rate, _ in doubled(2.5e-3)],
    "adamh": doubled(5e-3),
    "muonh": doubled(5e-3),
    "ngpt": doubled(2.5e-3),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Compares optimizers on the model of language.py, each with its best setting."""

    optimizer: tuple[Name, ...] = tuple(SETTINGS)
    """Optimizers of the blocks' matrices."""
    preset: str = "small"
    """The model, as in language.py."""
    steps: int = 400
    """Training steps of a run. The search begins with half of them."""
    batch: int = 16
    """Windows of text per step."""
    warmup: float = 0.05
    """Part of the steps in which the learning rate rises, before it falls along a cosine."""
    other_learning_rate: float = 5e-3
    """Learning rate of embedding, head and gains."""
    seeds: int = 3
    """Runs that are reported, with the seeds 0, 1, ..."""
    text: pathlib.Path | None = None
    """A text in UTF-8. None: the King James Bible, of Debian's package bible-kjv."""
    out: pathlib.Path = pathlib.Path("out/ranking")
    """Directory for runs.jsonl and results.json."""


def measure(config: Config, name: Name, runs: Runs, text: Any, progress: tqdm.tqdm) -> Found:
    """The best setting for one seed, and its losses for the others."""
    layers, width, heads, hidden, context = PRESETS[config.preset]
    size = Size(layers, width, heads, hidden, context, 256, name == "ngpt")

    @functools.cache
    def compiled(steps: int) -> Callable[..., float]:
        made = RunConfig(
            steps=steps,
            batch=config.batch,
            context=context,
            other_learning_rate=config.other_learning_rate,
        )
        return make_run(name, size, made)

    def loss(steps: int, setting: tuple[float, float], seed: int) -> float:
        progress.set_description(f"{name} {setting[0]:g} {setting[1]:g}")
        rate, decay = setting
        warmup = int(config.warmup * steps)
        key = (name, steps, rate, decay, seed)
        found = runs(key, lambda: compiled(steps)(text, seed, rate, warmup, decay))
        progress.update()
        return found if math.isfinite(found) else math.log(256)

    half = (config.steps + 1) // 2
    searched = {setting: loss(half, setting, SEARCH_SEED) for setting in SETTINGS[name]}
    finalists = sorted(searched, key=searched.__getitem__)[:FINALISTS]
    whole = {setting: loss(config.steps, setting, SEARCH_SEED) for setting in finalists}
    best = min(whole, key=whole.__getitem__)
    reported = np.array([loss(config.steps, best, seed) for seed in range(config.seeds)])
    return Found(best, searched, whole, reported)


def interval(values: np.ndarray) -> str:
    """The mean and Student's 95 % interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.4f}"
    half = half_interval(values)
    return f"{mean:.4f} ({mean - half:.4f} to {mean + half:.4f})"


def print_table(found: dict[Name, Found]) -> None:
    rows = [
        ["optimizer", "rate", "decay", "held-out loss (nats per byte)", "less adamw's", "seed 0"]
    ]
    for name in sorted(found, key=lambda name: found[name].losses.mean()):
        (rate, decay), losses = found[name].best, found[name].losses
        row = [name, f"{rate:g}", f"{decay:g}" if decay else "-", interval(losses)]
        less = interval(losses - found["adamw"].losses) if "adamw" in found else "-"
        rows.append([*row, less, f"{losses[0]:.4f}"])
    print()
    print_rows(*rows)
    print("Mean over the seeds (95 % interval, Student's t). Another seed chose rate and decay.")


def main(config: Config) -> None:
    check_options(
        ("--preset", config.preset, f"one of {list(PRESETS)}", config.preset in PRESETS),
        ("--steps", config.steps, "at least 1", config.steps >= 1),
        ("--warmup", config.warmup, "in [0, 1)", 0 <= config.warmup < 1),
        ("--seeds", config.seeds, "at least 1", config.seeds >= 1),
        ("--optimizer", "none", "at least one name", len(config.optimizer) > 0),
    )
    check_out(config.out, "runs.jsonl", "results.json")
    settings = dataclasses.asdict(config) | {"text": str(config.text)}
    fixed = ("preset", "batch", "warmup", "other_learning_rate", "text")
    runs = Runs(config.out, **{name: settings[name] for name in fixed})
    text, found = encode(read(config.text), "byte"), dict[Name, Found]()
    total = sum(len(SETTINGS[name]) + FINALISTS + config.seeds for name in config.optimizer)
    with tqdm.tqdm(total=total, unit="run") as progress:
        for name in config.optimizer:
            found[name] = measure(config, name, runs, text, progress)
    print_table(found)
    report = settings | {
        "out": None,
        "device": jax.devices()[0].device_kind,
        "optimizers": {
            name: {
                "rate, decay": each.best,
                "losses": each.losses.tolist(),
                "searched": [[*setting, loss] for setting, loss in each.searched.items()],
                "finalists": [[*setting, loss] for setting, loss in each.finalists.items()],
            }
            for name, each in found.items()
        },
    }
    (config.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"Wrote results.json to {config.out}.")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
