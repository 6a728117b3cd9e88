"""One optimizer step on the parameter trees of known networks, against Optax's Adam.

Compiled with parameters and state donated. Each optimizer runs interleaved with Adam and
momentum SGD; ratios are those within a round.

    python benchmarks/step.py
    python benchmarks/step.py --tree resnet18 --rounds 11
"""

import dataclasses
import gc
import pathlib
from typing import Any, get_args

import jax
import numpy as np
import trees
import tyro
from measure import (
    OPTIMIZERS,
    Row,
    compile_step,
    describe_program,
    interleave,
    print_table,
    ratio,
    spread,
    stepper,
    write,
)

REFERENCES = ("optax.adam", "optax.sgd")


@dataclasses.dataclass(frozen=True)
class Config:
    """Time, compile time and compiled program of one optimizer step."""

    tree: tuple[trees.Name, ...] = get_args(trees.Name)
    """Parameter trees."""
    optimizer: tuple[str, ...] = tuple(OPTIMIZERS)
    """Optimizers, by the names in the table."""
    rounds: int = 31
    """Steps of each."""
    budget: float = 40.0
    """Seconds for each comparison, after which it ends with fewer rounds, 3 at least."""
    out: pathlib.Path = pathlib.Path("benchmarks/results")
    """Directory for step.json."""


def measure(name: str, tree: trees.Tree, config: Config) -> Row:
    """One optimizer beside Adam and momentum SGD."""
    parameters, runs, programs = trees.count(tree.shapes), {}, {}
    grads = trees.arrays(tree.shapes, seed=1)
    for each in dict.fromkeys((*REFERENCES, name)):
        tx, params = OPTIMIZERS[each](tree.groups), trees.arrays(tree.shapes, seed=0)
        programs[each] = compile_step(tx, params, grads)
        runs[each] = stepper(programs[each], tx, params, grads)
        del params
    times = interleave(runs, budget=config.budget, rounds=config.rounds)
    adam, sgd = (times[reference] for reference in REFERENCES)
    return {
        "optimizer": name,
        "milliseconds": 1e3 * float(np.median(times[name])),
        "to adam": ratio(times[name], adam),
        "to sgd": ratio(times[name], sgd),
        "compile to adam": programs[name].seconds / programs["optax.adam"].seconds,
        "rounds": len(adam),
        **describe_program(programs[name].run, parameters),
    }


def fits(tree: trees.Tree) -> bool:
    """Whether three optimizers' parameters and states, and the gradients, fit in memory."""
    memory = pathlib.Path("/proc/meminfo")
    if jax.default_backend() != "cpu" or not memory.exists():
        return True
    available = next(
        1024 * int(line.split()[1])
        for line in memory.read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    return 4 * trees.count(tree.shapes) * (3 * 3 + 1) < 0.7 * available


def table(rows: list[Row]) -> list[Row]:
    return [
        {
            "optimizer": row["optimizer"],
            "ms": round(row["milliseconds"], 2),
            "to adam": spread(row["to adam"]),
            "to sgd": spread(row["to sgd"]),
            "compile": f"{row['compile to adam']:.1f}",
            "kernels": row["kernels"],
            "bytes": f"{row['bytes accessed per parameter']:.0f}",
            "temporary": f"{row['temporary bytes per parameter']:.2f}",
            "copies": row["copies of 16384 entries and more"],
        }
        for row in rows
    ]


def main(config: Config) -> None:
    unknown = [name for name in config.optimizer if name not in OPTIMIZERS]
    if unknown:
        raise SystemExit(
            f"step.py: --optimizer: expected some of {list(OPTIMIZERS)}, found {unknown}"
        )
    results: dict[str, Any] = {}
    for name in config.tree:
        tree = trees.TREES[name]()
        if not fits(tree):
            print(f"\n{name}: skipped, not enough memory")
            continue
        results[name] = []
        for optimizer in config.optimizer:
            results[name].append(measure(optimizer, tree, config))
            gc.collect()
        count = f"{trees.count(tree.shapes):,}"
        print_table(f"{name}, {count} parameters", table(results[name]))
    print(
        "\nRatios: median (quartiles) of the rounds, to optax.adam and to optax.sgd with momentum;"
        "\ncompile time to that of optax.adam; bytes accessed and temporary, per parameter, as XLA"
        "\nreports them (float32); copies of 16384 entries and more in the compiled program."
    )
    settings = {"rounds": config.rounds, "budget": config.budget}
    write(config.out, "step", settings, results)


if __name__ == "__main__":
    main(tyro.cli(Config))
