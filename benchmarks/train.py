"""Measures what an optimizer adds to a training step: time, temporary memory and compile time.

Training steps are jitted and donate their arguments. "Added" is the CPU time of a step beyond that
of the same step with plain SGD, relative to what Adam adds. Temporary memory is relative to the
size of the parameters. All optimizers run interleaved. The networks:
- "columns", "layers": ten normalized layers of 1536 x 1536, with a group per column or per layer;
- "convolutions": eight convolutions of 3 x 3 with BatchNorm. Their times vary by more than an
  optimizer adds, so the time of the whole step is given, relative to Adam's;
- "unrolled": a transformer of 24 unrolled layers, whose update is only traced and compiled.

Results are kept per version of JAX.

    make bench-train
    .venv/bin/python benchmarks/train.py --network columns --optimizer adamsrt hyperball
"""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import trees
import tyro
from measure import (
    OPTIMIZERS,
    Row,
    check_optimizers,
    check_out,
    interleave,
    machine,
    print_table,
    ratio,
    spread,
)

import spherical_optax as so

Name: TypeAlias = Literal["columns", "layers", "convolutions", "unrolled"]
NAMES = ("adams", "adamsrt", "sgdmrt", "adamg", "hyperball", "rotational_adamw", "adamp")


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures what optimizers add to a training step."""

    network: tuple[Name, ...] = get_args(Name)
    """Networks. With none, only the results of earlier runs are shown."""
    optimizer: tuple[str, ...] = NAMES
    """Optimizers. Plain SGD and Adam are always included."""
    width: int = 1536
    """Width of the layers. The convolutions have a quarter as many channels."""
    depth: int = 24
    """Layers of the unrolled transformer."""
    rounds: int = 25
    """Steps of each optimizer."""
    out: pathlib.Path = pathlib.Path("benchmarks/results")
    """Directory for train.json."""


class Problem(NamedTuple):
    """The parameters of a network, their groups and the loss."""

    params: Any
    groups: so.Groups
    loss: Callable[[Any], jax.Array]


def normal(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(seed), shape)


def normalized(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    centred = x - x.mean(axes, keepdims=True)
    return jax.nn.relu(centred * jax.lax.rsqrt(x.var(axes, keepdims=True) + 1e-6))


def layers(width: int, group: so.RadialGroup, axis: int) -> Problem:
    """Ten linear layers, each followed by a normalization over an axis.

    With the batch axis, 0, the columns of a kernel are radially invariant; with axis 1, the whole
    kernel is.
    """
    params = {f"layer{n}": normal(n, (width, width), width**-0.5) for n in range(10)}
    inputs = normal(10, (8, width))

    def loss(params: Any) -> jax.Array:
        x = inputs
        for kernel in params.values():
            x = normalized(x @ kernel, (axis,))
        return jnp.square(x).mean()

    return Problem(params, dict.fromkeys(params, group), loss)


def convolutions(width: int) -> Problem:
    """Eight convolutions of 3 x 3 with BatchNorm, on two images of 8 x 8."""
    params = {f"conv{n}": normal(n, (3, 3, width, width), 0.05) for n in range(8)}
    images = normal(8, (2, 8, 8, width))

    def loss(params: Any) -> jax.Array:
        x, dimensions = images, ("NHWC", "HWIO", "NHWC")
        for kernel in params.values():
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=dimensions
            )
            x = normalized(x, (0, 1, 2))
        return jnp.square(x).mean()

    return Problem(params, dict.fromkeys(params, so.per_filter()), loss)


def step_of(tx: optax.GradientTransformation, problem: Problem) -> Callable[[Any, Any], Any]:
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(jax.grad(problem.loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return step


def measure(name: Name, config: Config) -> list[Row]:
    """Time and memory of training steps."""
    problem = {
        "columns": lambda: layers(config.width, so.per_filter(), 0),
        "layers": lambda: layers(config.width, so.per_layer(), 1),
        "convolutions": lambda: convolutions(config.width // 4),
    }[name]()
    runs, memory = {}, {}
    for each in ("sgd", "optax.adam", *config.optimizer):
        tx = optax.sgd(1e-3) if each == "sgd" else OPTIMIZERS[each](problem.groups)
        params = jax.tree.map(jnp.array, problem.params)
        carry = [params, tx.init(params)]
        compiled = jax.jit(step_of(tx, problem), donate_argnums=(0, 1)).lower(*carry).compile()
        memory[each] = compiled.memory_analysis().temp_size_in_bytes

        def run(compiled: Any = compiled, carry: list[Any] = carry) -> Any:
            carry[:] = compiled(*carry)
            return carry

        runs[each] = run
    clock = time.process_time  # CPU seconds, summed over all cores
    times = interleave(runs, budget=3600, rounds=config.rounds, clock=clock)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(problem.params))
    adam = float(np.median(times["optax.adam"] - times["sgd"]))
    rows = []
    for each in runs:
        low, middle, high = np.quantile((times[each] - times["sgd"]) / adam, (0.25, 0.5, 0.75))
        added = {"median": float(middle), "low": float(low), "high": float(high)}
        row = {"optimizer": each, "seconds": float(np.median(times[each])), "added": added}
        whole = ratio(times[each], times["optax.adam"])
        rows.append(row | {"whole step": whole, "memory": memory[each] / size})
    return rows


def compile_unrolled(config: Config) -> list[Row]:
    """Measures CPU seconds for tracing and for compiling the update of an unrolled transformer."""
    width = 256
    shapes = {
        f"layer{n}": {
            "query": {"kernel": (width, 8, width // 8)},
            "key": {"kernel": (width, 8, width // 8)},
            "value": {"kernel": (width, width)},
            "out": {"kernel": (width, width)},
            "up": {"kernel": (width, 4 * width)},
            "down": {"kernel": (4 * width, width)},
            "norm_attention": {"scale": (width,)},
            "norm_mlp": {"scale": (width,)},
        }
        for n in range(config.depth)
    }
    rules = {"query|key": so.per_head(axis=-2), "value|out|up|down": so.per_layer()}
    params, groups = trees.abstract(shapes), so.groups_by_path(rules)
    rows: list[Row] = []
    for name in ("optax.adam", *config.optimizer):
        tx = OPTIMIZERS[name](groups)
        state = jax.eval_shape(tx.init, params)
        seconds = np.full(2, np.inf)
        for _ in range(3):

            @functools.partial(jax.jit, donate_argnums=(0, 1))
            def step(params: Any, state: Any, grads: Any, tx: Any = tx) -> tuple[Any, Any]:
                updates, state = tx.update(grads, state, params)
                return optax.apply_updates(params, updates), state

            moments = [time.process_time()]
            lowered = step.lower(params, state, params)
            moments.append(time.process_time())
            lowered.compile()
            moments.append(time.process_time())
            seconds = np.minimum(seconds, np.diff(moments))
        trace, compiling = map(float, seconds)
        first = rows[0] if rows else {"trace": trace, "compile": compiling}
        rows.append(
            {
                "optimizer": name,
                "trace": trace,
                "trace to adam": trace / first["trace"],
                "compile": compiling,
                "compile to adam": compiling / first["compile"],
            }
        )
    return rows


def state_bytes(name: str) -> float:
    """Bytes of optimizer state per weight, if all weights are in groups."""
    params = {"kernel": jax.ShapeDtypeStruct((1536, 1536), jnp.float32)}
    state = jax.eval_shape(OPTIMIZERS[name](so.per_filter()).init, params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) / 1536**2


def summary(results: dict[str, dict[str, list[Row]]]) -> list[Row]:
    """How much longer a training step takes than with Adam (by medians), and the state's size."""
    found: dict[str, Row] = {}
    for version, networks in results.items():
        for network in ("columns", "layers", "convolutions"):
            seconds = {row["optimizer"]: row["seconds"] for row in networks.get(network, ())}
            for name in seconds:
                if name != "sgd":
                    percent = 100 * (seconds[name] / seconds["optax.adam"] - 1)
                    found.setdefault(name, {})[f"{network}, {version}"] = percent
    columns = list(dict.fromkeys(column for row in found.values() for column in row))
    return [
        {
            "optimizer": name,
            "state, bytes a weight": f"{state_bytes(name):.1f}",
            **{column: f"{row[column]:+.0f} %" if column in row else "-" for column in columns},
        }
        for name, row in found.items()
    ]


def show(version: str, network: str, rows: list[Row]) -> None:
    if network == "unrolled":
        print_table(f"JAX {version}, {network}: seconds for tracing and compiling", rows)
        return
    what = "whole step" if network == "convolutions" else "added"
    table = [
        {
            "optimizer": row["optimizer"],
            "CPU ms": round(1e3 * row["seconds"], 1),
            f"{what}, to adam": spread(row[what]),
            "temporary memory": f"{row['memory']:.2f}",
        }
        for row in rows
    ]
    print_table(f"JAX {version}, {network}", table)


def main(config: Config) -> None:
    check_out(config.out, "train.json")
    check_optimizers("train.py", config.optimizer)
    path, version = config.out / "train.json", jax.__version__
    report = json.loads(path.read_text()) if path.exists() else {}
    results = {
        name: compile_unrolled(config) if name == "unrolled" else measure(name, config)
        for name in config.network
    }
    before = report.get("results", {}).get(version, {})
    report.setdefault("results", {})[version] = before | results
    settings = {name: getattr(config, name) for name in ("width", "depth", "rounds")}
    if results:
        path.write_text(json.dumps(report | {"machine": machine(), "settings": settings}, indent=1))
    if rows := summary(report["results"]):
        print_table("A training step beside one with Adam, and the optimizer's state", rows)
    for each, networks in report["results"].items():
        for name, rows in networks.items():
            show(each, name, rows)
    print("\nAdded: medians (quartiles) of the rounds." + (f" Wrote {path}." if results else ""))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
