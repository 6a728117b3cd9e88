"""Times one optimizer step on the parameter trees of known networks, compared with Optax's Adam.

Steps are compiled with parameters and state donated. Each optimizer runs interleaved with Adam and
SGD with momentum, and ratios are taken within a round. Everything is measured several times,
minutes apart, because memory bandwidth depends on what else runs on the machine.

    python benchmarks/step.py
    python benchmarks/step.py --tree resnet18 --sweeps 1
"""

import dataclasses
import gc
import pathlib
from typing import Any, NamedTuple, get_args

import jax
import numpy as np
import trees
import tyro
from measure import (
    OPTIMIZERS,
    Row,
    check_optimizers,
    check_out,
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
    """Measures time, compile time and compiled program of one optimizer step."""

    tree: tuple[trees.Name, ...] = get_args(trees.Name)
    """Parameter trees."""
    optimizer: tuple[str, ...] = tuple(OPTIMIZERS)
    """Optimizers, by their names in the table."""
    sweeps: int = 3
    """Number of times that all optimizers are measured."""
    rounds: int = 15
    """Steps of each optimizer per sweep."""
    budget: float = 15.0
    """Seconds per comparison, after which it ends with fewer rounds, but at least 3."""
    out: pathlib.Path = pathlib.Path("benchmarks/results")
    """Directory for step.json."""


class Measured(NamedTuple):
    """One sweep of an optimizer, Adam and SGD with momentum."""

    seconds: np.ndarray
    """Seconds per step (rows: the optimizer, Adam, SGD with momentum; columns: rounds)."""
    compile_to_adam: float
    program: Row


def measure(name: str, tree: trees.Tree, config: Config) -> Measured:
    runs, programs = {}, {}
    grads = trees.arrays(tree.shapes, seed=1)
    for each in dict.fromkeys((*REFERENCES, name)):
        tx, params = OPTIMIZERS[each](tree.groups), trees.arrays(tree.shapes, seed=0)
        programs[each] = compile_step(tx, params, grads)
        runs[each] = stepper(programs[each], tx, params, grads)
        del params
    times = interleave(runs, budget=config.budget, rounds=config.rounds)
    return Measured(
        np.stack([times[each] for each in (name, *REFERENCES)]),
        programs[name].seconds / programs["optax.adam"].seconds,
        describe_program(programs[name].run, trees.count(tree.shapes)),
    )


def summary(name: str, sweeps: list[Measured]) -> Row:
    """Summarizes all rounds of all sweeps."""
    own, adam, sgd = np.concatenate([sweep.seconds for sweep in sweeps], axis=1)
    return {
        "optimizer": name,
        "milliseconds": 1e3 * float(np.median(own)),
        "to adam": ratio(own, adam),
        "to sgd": ratio(own, sgd),
        "compile to adam": float(np.median([sweep.compile_to_adam for sweep in sweeps])),
        "rounds": len(own),
        **sweeps[0].program,
    }


def fits(tree: trees.Tree) -> bool:
    """Whether parameters and states of three optimizers, and the gradients, fit in memory."""
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
    check_optimizers("step.py", config.optimizer)
    check_out(config.out, "step.json")
    results: dict[str, Any] = {}
    for name in config.tree:
        tree = trees.TREES[name]()
        if not fits(tree):
            print(f"\n{name}: skipped, not enough memory")
            continue
        found: dict[str, list[Measured]] = {optimizer: [] for optimizer in config.optimizer}
        for _ in range(config.sweeps):
            for optimizer, sweeps in found.items():
                sweeps.append(measure(optimizer, tree, config))
                gc.collect()
        results[name] = [summary(optimizer, sweeps) for optimizer, sweeps in found.items()]
        count = f"{trees.count(tree.shapes):,}"
        print_table(f"{name}, {count} parameters", table(results[name]))
    print(
        "\nRatios to optax.adam and to optax.sgd with momentum: median (quartiles) of the rounds."
        "\nCompile: relative to optax.adam. Bytes accessed and temporary bytes: per parameter, as"
        "\nXLA reports them (float32). Copies: of at least 16384 entries in the compiled program."
    )
    settings = {"sweeps": config.sweeps, "rounds": config.rounds, "budget": config.budget}
    write(config.out, "step", settings, results)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
