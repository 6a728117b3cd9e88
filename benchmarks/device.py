"""Measures the cost of the optimizers on the accelerator of this machine, in one run.

It runs from a checkout, in an environment with JAX, Optax and Flax. It installs and downloads
nothing. If PyTorch is installed, its fused optimizers are measured as well. Without an accelerator,
the program says so and runs a tiny version on the CPU, whose times mean nothing.

There are three parts:
- "training": training steps of a ResNet18 on batches of 128 and of a transformer with 124 million
  parameters, both computing in bfloat16;
- "bare": optimizer steps alone on parameter trees, compared with Optax and PyTorch, with the
  bandwidth reached and the bytes that `make bench-compiled` predicts;
- "memory": peak memory, with one process per optimizer.

Each result is written to `device.json` at once. Measurements for which no time was left are listed
at the end.

    python3 benchmarks/device.py                  # 6 minutes at most
    python3 benchmarks/device.py --seconds 120 --parts training
"""

import argparse
import concurrent.futures
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# Leaves memory to PyTorch and to other processes.
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import trees
from flax import nnx
from helpers.classify import forward
from helpers.transformer import Size, initialise, invariant
from measure import Row, check_out, compile_step, interleave, machine, print_table, ratio
from optax import contrib
from paper.models import GROUPS as FILTERS
from paper.models import make_model
from traffic import traffic

import spherical_optax as so

ROOT = pathlib.Path(__file__).parent.parent
RATE = 1e-3
PARTS = ("training", "bare", "memory")
FEW = ("sgd, plain", "optax.adam", "adamsrt", "muonh")
BARE_ONLY = ("rotational_sgdm", "rotational_lion", "sgdp", "adamg", "adamg_star")
IS_CPU = jax.devices()[0].platform == "cpu"

# --- optimizers ---------------------------------------------------------------------------


class Spheres(NamedTuple):
    """The radially invariant groups, and a pattern for the paths of kernels that are matrices."""

    invariant: so.Groups
    matrices: str


def muon_axes(tree: Any) -> Any:
    """Which axes of a kernel Muon takes as rows, and which as columns.

    The columns are the axes (heads, k) for queries, keys and values, and the last axis for all
    other kernels.
    """

    def of_leaf(path: Any, x: Any) -> contrib.MuonDimensionNumbers:
        split = x.ndim - 1 if x.ndim != 3 or "out" in jax.tree_util.keystr(path) else 1
        return contrib.MuonDimensionNumbers(tuple(range(split)), tuple(range(split, x.ndim)))

    return jax.tree.map_with_path(of_leaf, tree)


def optimizers(spheres: Spheres) -> dict[str, optax.GradientTransformation]:
    """All optimizers. Plain SGD and Adam, with which the others are compared, come first."""
    groups, adam = spheres.invariant, optax.adam(RATE)
    layers, neurons = (
        so.groups_by_path({spheres.matrices: group}) for group in (so.per_layer(), so.per_filter())
    )
    path = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    muon = contrib.muon(RATE, muon_weight_dimension_numbers=muon_axes)
    is_matrix = lambda tree: jax.tree.map_with_path(  # noqa: E731
        lambda keys, _: bool(re.search(spheres.matrices, path(keys))), tree
    )
    return {
        "sgd, plain": optax.sgd(RATE),
        "optax.adam": adam,
        "optax.adamw": optax.adamw(RATE),
        "optax.sgd": optax.sgd(RATE, momentum=0.9),
        "optax.contrib.muon": optax.partition({True: muon, False: adam}, is_matrix),
        "adams": so.adams(RATE, groups=groups),
        "adamsrt": so.adamsrt(RATE, groups=groups),
        "sgdmrt": so.sgdmrt(RATE, groups=groups),
        "adamp": so.adamp(RATE, groups=groups),
        "adamh": so.adamh(RATE, groups=layers, other=adam),
        "muonh": so.muonh(RATE, groups=layers, other=adam, weight_dimension_numbers=muon_axes),
        "rotational_adamw": so.rotational_adamw(RATE, groups=neurons),
        "rotational_sgdm": so.rotational_sgdm(RATE, groups=neurons),
        "rotational_lion": so.rotational_lion(RATE, groups=neurons),
        "sgdp": so.sgdp(RATE, groups=groups),
        "adamg": so.adamg(RATE, groups=groups, other=adam),
        "adamg_star": so.adamg_star(RATE, 0.01, groups=groups),
    }


def names(tiny: bool, bare: bool = False) -> list[str]:
    every = list(optimizers(Spheres(True, ".")))
    if tiny:
        return [each for each in every if each in FEW]
    return every if bare else [each for each in every if each not in BARE_ONLY]


# --- inside a training step ---------------------------------------------------------------


class Problem(NamedTuple):
    params: Any
    loss: Callable[[Any], jax.Array]
    spheres: Spheres


def resnet18(tiny: bool) -> Problem:
    """A ResNet18 on batches of 128 images of 32 x 32, in bfloat16 except for its norms."""
    images, width = (4, 4) if tiny else (128, 64)
    model = make_model("resnet18", 0, width=width, dtype=jnp.bfloat16)
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    x = jax.random.normal(jax.random.key(0), (images, 32, 32, 3))
    y = jnp.arange(images) % 10

    def loss(params: Any) -> jax.Array:
        return forward(graph, params, stats, x, y, train=True)[0]

    return Problem(params, loss, Spheres(FILTERS, r"conv\d*(/\d+)?/kernel"))


def transformer(tiny: bool) -> Problem:
    """A transformer with 124 million parameters and QK-norm, in bfloat16.

    Its batch is eight windows of 1024 tokens.
    """
    size = (2, 64, 2, 128, 32) if tiny else (12, 896, 14, 2624, 1024)
    model = Size(*size, vocabulary=256, dtype="bfloat16")
    graph, params = initialise(model, 0)
    tokens = jax.random.randint(jax.random.key(0), (8, model.context + 1), 0, 256)

    def loss(params: Any) -> jax.Array:
        logits = nnx.merge(graph, params)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return Problem(params, loss, Spheres(invariant(model), r"(q|k|v|o|gate|up|down)/kernel"))


NETWORKS: dict[str, Callable[[bool], Problem]] = {"resnet18": resnet18, "transformer": transformer}


def start(problem: Problem, tx: optax.GradientTransformation) -> tuple[Any, Any]:
    params = jax.tree.map(jnp.array, problem.params)  # a copy, because steps donate it
    return params, tx.init(params)


def compile_training(problem: Problem, tx: optax.GradientTransformation) -> jax.stages.Compiled:
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(jax.grad(problem.loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return step.lower(*jax.eval_shape(lambda: start(problem, tx))).compile()


def measure_training(name: str, tiny: bool, left: Callable[[], float]) -> Iterator[Row]:
    """Times training steps.

    "added, to adam" is the time that an optimizer adds to a step with plain SGD, relative to the
    time that Adam adds.
    """
    problem = NETWORKS[name](tiny)
    every = optimizers(problem.spheres)
    txs = {each: every[each] for each in names(tiny)}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        steps = dict(
            zip(txs, pool.map(lambda tx: compile_training(problem, tx), txs.values()), strict=True)
        )
    runs = {}
    for each, tx in txs.items():
        carry = [start(problem, tx)]

        def run(compiled: Any = steps[each], carry: list[Any] = carry) -> Any:
            carry[0] = compiled(*carry[0])
            return carry[0]

        runs[each] = run
    times = interleave(runs, budget=min(30, left() / 3), rounds=3 if tiny else 100)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(problem.params))
    adds = float(np.median(times["optax.adam"] - times["sgd, plain"]))
    for each in txs:
        memory = steps[each].memory_analysis()
        yield {
            "optimizer": each,
            "milliseconds": 1e3 * float(np.median(times[each])),
            "more than adam (%)": 100 * (ratio(times[each], times["optax.adam"])["median"] - 1),
            "added, to adam": float(np.median(times[each] - times["sgd, plain"])) / adds,
            "temporary memory, to the parameters": memory.temp_size_in_bytes / size,
            "rounds": len(times[each]),
        }


# --- the bare step ------------------------------------------------------------------------


def billion() -> trees.Tree:
    """A decoder with a billion parameters."""
    return trees.transformer(layers=24, width=1792, heads=14)


TREES: dict[str, Callable[[], trees.Tree]] = {
    "resnet18": trees.resnet18,
    "transformer": trees.transformer,
    "billion": billion,
    "resnet50": trees.resnet50,
}
KERNELS = r"(conv\d|query|key|value|out|up|down)/kernel"


def arrays(shapes: Any, seed: int) -> Any:
    """Like `trees.arrays`, but computed on the device."""
    like = trees.abstract(shapes)

    @jax.jit
    def make() -> Any:
        leaves, treedef = jax.tree.flatten(like)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        made = [0.05 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
        return treedef.unflatten(made)

    return jax.block_until_ready(make())


def bandwidth(size: int) -> float:
    """The bandwidth in GB/s of a kernel that reads and writes an array."""
    x = jnp.zeros(size)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    carry = [x]

    def run() -> Any:
        carry[0] = add(carry[0])
        return carry[0]

    return 8 * size / float(np.median(interleave({"add": run}, budget=2, rounds=30)["add"])) / 1e9


def foretold() -> dict[str, dict[str, Row]]:
    """The results of `make bench-compiled` for an H100, by tree and optimizer."""
    path = ROOT / "benchmarks" / "results" / "compiled.json"
    found = json.loads(path.read_text())["results"]["h100"]
    names = {"hyperball": "adamh"}
    return {
        tree: {names.get(row["optimizer"], row["optimizer"]): row for row in rows}
        for tree, rows in found.items()
    }


def repeated(step: Callable[[], Any], times: int) -> Callable[[], Any]:
    """Runs several steps, to wait for the device only once."""

    def run() -> Any:
        for _ in range(times):
            end = step()
        return end

    return run


def jax_runs(name: str, tree: trees.Tree, grads: Any, repeat: int) -> tuple[Any, Row]:
    """A function that runs an optimizer's steps, and the memory traffic of its program."""
    tx = optimizers(Spheres(tree.groups, KERNELS))[name]
    params = arrays(tree.shapes, 0)
    step = compile_step(tx, params, grads).run
    carry, state = [params], [tx.init(params)]

    def run() -> Any:
        carry[0], state[0] = step(carry[0], state[0], grads)
        return carry[0]

    moved, kernels, _ = traffic(step.as_text() or "")
    size = trees.count(tree.shapes)
    return repeated(run, repeat), {"bytes per parameter": moved / size, "kernels": kernels}


def torch_runs(tree: trees.Tree, repeat: int) -> dict[str, Callable[[], Any]]:
    """Runs of PyTorch's fused optimizers on the same shapes; empty if it is not installed."""
    try:
        import torch
    except ImportError:
        return {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (device == "cpu") != IS_CPU:
        return {}
    shapes = jax.tree.leaves(tree.shapes, is_leaf=lambda node: isinstance(node, tuple))
    runs = {}
    for name, make in (
        ("torch.optim.Adam(fused)", functools.partial(torch.optim.Adam, lr=RATE, fused=True)),
        (
            "torch.optim.SGD(fused)",
            functools.partial(torch.optim.SGD, lr=RATE, momentum=0.9, fused=True),
        ),
    ):
        params = [torch.full(shape, 0.05, device=device, requires_grad=True) for shape in shapes]
        for param in params:
            param.grad = torch.full_like(param, 0.01)
        optimizer = make(params)

        def run(optimizer: Any = optimizer) -> Any:
            for _ in range(repeat):
                optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()

        runs[name] = run
    return runs


def measure_bare(name: str, tiny: bool, left: Callable[[], float], peak: float) -> Iterator[Row]:
    """Times bare steps: a row per optimizer, each interleaved with Adam and SGD with momentum."""
    tree = trees.transformer(2, 64, 2, 128) if tiny else TREES[name]()
    size, grads = trees.count(tree.shapes), arrays(tree.shapes, 1)
    repeat = 1 if tiny else max(1, round(2e8 / size))
    named = functools.partial(jax_runs, tree=tree, grads=grads, repeat=repeat)
    base = {each: named(each) for each in ("optax.adam", "optax.sgd")}
    known = foretold().get(name, {})
    others = [each for each in names(tiny, bare=True) if each not in (*base, "sgd, plain")]
    for each in (*base, *others, "torch"):
        if left() < 5 and not tiny:
            return
        if each == "torch":
            extra, programs = torch_runs(tree, repeat), {}
        elif each in base:
            extra, programs = {each: base[each][0]}, base[each][1]
        else:
            run, programs = named(each)
            extra = {each: run}
        runs = {other: pair[0] for other, pair in base.items()} | extra
        times = interleave(runs, budget=3, rounds=3 if tiny else 20)
        for own in extra:
            seconds = float(np.median(times[own])) / repeat
            row = {
                "optimizer": own,
                "milliseconds": 1e3 * seconds,
                "to adam": ratio(times[own], times["optax.adam"])["median"],
                "to sgd": ratio(times[own], times["optax.sgd"])["median"],
                **programs,
            }
            if programs:
                reached = programs["bytes per parameter"] * size / seconds / 1e9
                row |= {"GB/s": reached, "of the bandwidth": reached / peak}
                row["bytes foretold"] = known.get(own, {}).get("bytes per parameter")
            yield row
        del extra, runs
        gc.collect()


# --- peak memory --------------------------------------------------------------------------


def peak_of(network: str, name: str, tiny: bool) -> Row:
    """The peak memory of this process after three training steps."""
    problem = NETWORKS[network](tiny)
    tx = optimizers(problem.spheres)[name]
    carry = start(problem, tx)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(problem.params))
    compiled = compile_training(problem, tx)
    problem = problem._replace(params=None)
    for _ in range(3):
        carry = jax.block_until_ready(compiled(*carry))
    stats = jax.devices()[0].memory_stats() or {}
    found = stats.get("peak_bytes_in_use")
    return {"optimizer": name, "peak bytes": found, "to the parameters": found and found / size}


def measure_memory(network: str, tiny: bool, left: Callable[[], float]) -> Iterator[Row]:
    def ask(name: str) -> Row:
        if left() < 30 and not tiny:
            return {"optimizer": name, "peak bytes": None, "to the parameters": None}
        command = [sys.executable, __file__, "--peak", network, name]
        done = subprocess.run(
            [*command, *(["--tiny"] if tiny else [])], capture_output=True, text=True, check=False
        )
        if done.returncode:
            return {"optimizer": name, "peak bytes": None, "error": done.stderr[-300:]}
        return json.loads(done.stdout.splitlines()[-1])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        yield from pool.map(ask, names(tiny))


# --- all of it ----------------------------------------------------------------------------


class Report:
    """Writes results to a file, which is complete and valid after each of them."""

    def __init__(self, out: pathlib.Path, **settings: Any) -> None:
        self.path = out / "device.json"
        self.content: Row = {"machine": about(), "settings": settings, "results": {}}
        self.write()

    def add(self, part: str, name: str, row: Any) -> None:
        self.content["results"].setdefault(part, {}).setdefault(name, []).append(row)
        self.write()

    def write(self) -> None:
        new = self.path.with_suffix(".unfinished")
        new.write_text(json.dumps(self.content, indent=1) + "\n")
        new.rename(self.path)


def said(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    except OSError:
        return None
    return done.stdout.strip() or None


def about() -> Row:
    return machine() | {
        "flax": flax.__version__,
        "torch": importlib.metadata.version("torch") if importlib.util.find_spec("torch") else None,
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "backend": jax.devices()[0].client.platform_version,
        "xla flags": os.environ.get("XLA_FLAGS"),
        "commit": said("git", "rev-parse", "HEAD"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    parser.add_argument(
        "--seconds", type=float, default=345, help="time after which no measurement starts"
    )
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--tiny", action="store_true", help="run the tiny version, as on a CPU")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    tiny = options.tiny or IS_CPU
    if options.peak:
        print(json.dumps(peak_of(*options.peak, tiny)))
        return
    began = time.monotonic()
    left = lambda: options.seconds - (time.monotonic() - began)  # noqa: E731
    kind = jax.devices()[0].device_kind
    print(
        f"No accelerator is here: a tiny form on {kind}, whose times mean nothing."
        if IS_CPU
        else f"Measuring on {kind}.",
        flush=True,
    )
    out = pathlib.Path("out/benchmarks") if IS_CPU and "--out" not in sys.argv else options.out
    check_out(out, "device.json")
    report, missing = Report(out, tiny=tiny, seconds=options.seconds), []
    speed = bandwidth(1 << (16 if tiny else 28))
    report.add("bandwidth", "GB/s", speed)
    print(f"A kernel that reads and writes moves {speed:.0f} GB/s.", flush=True)
    bare = functools.partial(measure_bare, tiny=tiny, left=left, peak=speed)
    parts: dict[str, tuple[Callable[..., Iterator[Row]], Any]] = {
        "training": (functools.partial(measure_training, tiny=tiny, left=left), NETWORKS),
        "bare": (bare, ["resnet18"] if tiny else TREES),
        "memory": (functools.partial(measure_memory, tiny=tiny, left=left), NETWORKS),
    }
    work = [(part, name, parts[part][0]) for part in PARTS for name in parts[part][1]]
    for part, name, measure in work:
        if part not in options.parts:
            continue
        if left() < 20 and not tiny:
            missing.append(f"{part} {name}")
            continue
        rows = []
        for row in measure(name):
            rows.append(row)
            report.add(part, name, row)
        if rows:
            columns = dict.fromkeys(key for row in rows for key in row)  # PyTorch's rows have fewer
            table = [{key: row.get(key) for key in columns} for row in rows]
            print_table(f"{part}, {name}, at {time.monotonic() - began:.0f} s", table)
        gc.collect()
    if missing:
        print(f"\nNo time was left for {missing}.")
    print(f"\nWrote {report.path}.")


if __name__ == "__main__":
    main()
