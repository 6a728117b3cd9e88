"""Shared by the benchmarks: optimizers, interleaved timing, compiled programs, tables."""

import functools
import json
import math
import os
import pathlib
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import optax

import spherical_optax as so

sys.path.append(str(pathlib.Path(__file__).parent.parent / "examples"))
from helpers.outputs import check_out as check_out
from helpers.outputs import print_rows

Row: TypeAlias = dict[str, Any]
Make: TypeAlias = Callable[[so.Groups], optax.GradientTransformation]

RATE = 1e-3
OPTIMIZERS: dict[str, Make] = {
    "optax.adam": lambda groups: optax.adam(RATE),
    "optax.adamw": lambda groups: optax.adamw(RATE),
    "optax.sgd": lambda groups: optax.sgd(RATE, momentum=0.9),
    "optax.contrib.muon": lambda groups: optax.contrib.muon(RATE),
    "adams": lambda groups: so.adams(RATE, groups=groups),
    "adamsrt": lambda groups: so.adamsrt(RATE, groups=groups),
    "sgdmrt": lambda groups: so.sgdmrt(RATE, groups=groups),
    "adamg": lambda groups: so.adamg(RATE, groups=groups, other=optax.adam(RATE)),
    "adamp": lambda groups: so.adamp(RATE, groups=groups),
    "hyperball": lambda groups: so.adamh(RATE, groups=groups, other=optax.adam(RATE)),
    "rotational_adamw": lambda groups: so.rotational_adamw(RATE, groups=groups),
    "adamsrt, composed": lambda groups: optax.chain(
        so.transport_moments(so.scale_by_adams(groups=groups), groups),
        optax.scale_by_learning_rate(RATE),
    ),
}


def check_optimizers(program: str, names: Sequence[str]) -> None:
    """Exits with a message if a name is not in `OPTIMIZERS`."""
    unknown = [name for name in names if name not in OPTIMIZERS]
    if unknown:
        raise SystemExit(
            f"{program}: --optimizer: expected some of {list(OPTIMIZERS)}, found {unknown}"
        )


class Step(NamedTuple):
    """A compiled optimizer step. It donates parameters and state, and returns the new ones."""

    run: jax.stages.Compiled
    seconds: float
    """Time for tracing, lowering and compiling."""


def compile_step(
    tx: optax.GradientTransformation,
    params: Any,
    grads: Any,
    place: Callable[[Any], Any] = lambda tree: tree,
) -> Step:
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = place(jax.eval_shape(tx.init, params))
    start = time.perf_counter()
    compiled = step.lower(params, state, grads).compile()
    return Step(compiled, time.perf_counter() - start)


def describe_program(compiled: jax.stages.Compiled, parameters: int) -> Row:
    """XLA's numbers for a compiled program; bytes are per parameter."""
    text, sizes = compiled.as_text() or "", []
    for shape in re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", text):
        sizes.append(math.prod(int(n) for n in shape.split(",") if n))
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    return {
        "kernels": len(re.findall(r" (?:fusion|custom-call)\(", text)),
        "bytes accessed per parameter": cost.get("bytes accessed", math.nan) / parameters,
        "temporary bytes per parameter": memory.temp_size_in_bytes / parameters,
        "copies of 16384 entries and more": sum(size >= 16384 for size in sizes),
    }


def interleave(
    runs: dict[str, Callable[[], Any]],
    *,
    budget: float,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, np.ndarray]:
    """Times all runs once per round; returns the seconds of each run.

    A first round is not counted. Stops after `rounds` rounds, or after at least 3 rounds when the
    budget in seconds is spent.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for count in range(rounds + 1):
        for name, run in runs.items():
            start = clock()
            jax.block_until_ready(run())
            if count:
                times[name].append(clock() - start)
        if count >= 3 and time.perf_counter() - began > budget:
            break
    return {name: np.array(values) for name, values in times.items()}


def stepper(step: Step, tx: optax.GradientTransformation, params: Any, grads: Any) -> Any:
    """A function without arguments that takes one step from the current parameters and state."""
    carry = [jax.block_until_ready((params, tx.init(params)))]

    def run() -> Any:
        carry[0] = step.run(*carry[0], grads)
        return carry[0]

    return run


def ratio(times: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Median and quartiles, over the rounds, of the ratio of two times."""
    low, middle, high = np.quantile(times / base, (0.25, 0.5, 0.75))
    return {"median": float(middle), "low": float(low), "high": float(high)}


def spread(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} ({values['low']:.2f} to {values['high']:.2f})"


def machine() -> Row:
    """A description of the machine and the versions."""
    device = jax.devices()[0]
    model = device.device_kind
    if device.platform == "cpu":
        info = pathlib.Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else platform.processor()
    return {
        "platform": device.platform,
        "device": model,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "optax": optax.__version__,
    }


def print_table(title: str, rows: list[Row]) -> None:
    """Prints rows of strings and numbers, which all have the same keys."""
    print(f"\n{title}")
    print_rows(list(rows[0]), *([_text(value) for value in row.values()] for row in rows))


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write(out: pathlib.Path, name: str, settings: Row, results: Any) -> None:
    report = {"machine": machine(), "settings": settings, "results": results}
    path = out / f"{name}.json"
    path.write_text(json.dumps(report, indent=1, default=str) + "\n")
    print(f"\nWrote {path}.")
