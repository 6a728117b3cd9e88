"""Measures how the cost of a step grows with the number of parameters and of leaves.

python benchmarks/scaling.py
python benchmarks/scaling.py --parameters 1e5 1e6 --layers 10 100
"""

import dataclasses
import gc
import pathlib
from typing import Any

import numpy as np
import trees
import tyro
from measure import (
    OPTIMIZERS,
    Row,
    check_out,
    compile_step,
    interleave,
    print_table,
    ratio,
    spread,
    stepper,
    write,
)

import spherical_optax as so

NAMES = ("optax.adam", "adams", "adamsrt", "sgdmrt")


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures step and compile time as the number of parameters or of leaves grows."""

    parameters: tuple[float, ...] = (1e5, 1e6, 1e7, 1e8)
    """Numbers of parameters of trees with 10 kernels, whose widths are multiples of 16."""
    layers: tuple[int, ...] = (10, 100, 667)
    """Numbers of small layers, each with a kernel (16, 16), a scale and a bias. 667 layers have
    2001 leaves."""
    kernels: tuple[int, ...] = (10, 100, 2000)
    """Numbers of kernels in trees that contain only kernels (16, 16)."""
    rounds: int = 21
    """Steps of each optimizer."""
    budget: float = 60.0
    """Seconds per tree, after which the measurement ends with fewer rounds, but at least 3."""
    out: pathlib.Path = pathlib.Path("benchmarks/results")
    """Directory for scaling.json."""


def large(parameters: float) -> trees.Shapes:
    columns = 16 * max(1, round((parameters / 10 / 9) ** 0.5 / 16))
    return {f"layer{i}": {"kernel": (3, 3, columns, columns)} for i in range(10)}


def layers(count: int) -> trees.Shapes:
    layer = {"kernel": (16, 16), "scale": (16,), "bias": (16,)}
    return {f"layer{i}": layer for i in range(count)}


def kernels(count: int) -> trees.Shapes:
    return {f"layer{i}": {"kernel": (16, 16)} for i in range(count)}


def measure(shapes: trees.Shapes, config: Config) -> list[Row]:
    groups = so.groups_by_path({"kernel": so.per_filter()})
    grads, runs, seconds = trees.arrays(shapes, seed=1), {}, {}
    for name in NAMES * 2:  # takes the faster of two compilations, because the load varies
        tx, params = OPTIMIZERS[name](groups), trees.arrays(shapes, seed=0)
        step = compile_step(tx, params, grads)
        runs[name] = stepper(step, tx, params, grads)
        seconds[name] = min(step.seconds, seconds.get(name, step.seconds))
        del params
    times = interleave(runs, budget=config.budget, rounds=config.rounds)
    return [
        {
            "optimizer": name,
            "milliseconds": 1e3 * float(np.median(times[name])),
            "to adam": ratio(times[name], times["optax.adam"]),
            "compile seconds": seconds[name],
            "compile to adam": seconds[name] / seconds["optax.adam"],
        }
        for name in NAMES
    ]


def main(config: Config) -> None:
    check_out(config.out, "scaling.json")
    cases: dict[str, trees.Shapes] = {}
    cases |= {f"{size:g} parameters in 10 kernels": large(size) for size in config.parameters}
    cases |= {f"{count} small layers, {3 * count} leaves": layers(count) for count in config.layers}
    cases |= {f"{count} small kernels": kernels(count) for count in config.kernels}
    results: dict[str, Any] = {}
    for case, shapes in cases.items():
        results[case] = measure(shapes, config)
        gc.collect()
        table = [
            {
                "optimizer": row["optimizer"],
                "ms": round(row["milliseconds"], 3),
                "to adam": spread(row["to adam"]),
                "compile (s)": round(row["compile seconds"], 2),
                "compile to adam": f"{row['compile to adam']:.2f}",
            }
            for row in results[case]
        ]
        print_table(case, table)
    print("\nMedian (quartiles) of the rounds. Compile time: with tracing, the faster of two.")
    write(config.out, "scaling", {"rounds": config.rounds, "budget": config.budget}, results)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
