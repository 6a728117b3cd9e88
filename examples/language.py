"""Trains a small transformer on a text, with the optimizers that people train with today.

The model is a decoder-only transformer with RMSNorm and QK-norm. The text is the King James Bible
from Debian's package bible-kjv, or any text in UTF-8. The program can be stopped at any time. When
it is started again, it resumes from its last checkpoint and ends with the same losses and weights,
bit for bit. At the end it prints the held-out loss and a sample, and writes `results.json` and
`curves.png`.

    python examples/language.py                              # AdamH, three minutes on two cores
    python examples/language.py --optimizer muonh --text book.txt --level character
    python examples/language.py --preset large --compute bfloat16 --batch 64 --accumulate 4
    python examples/language.py --mesh data=4,model=2        # over eight devices
    python examples/language.py --help
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tqdm
import tyro
from flax import nnx
from helpers.options import check_options
from helpers.outputs import check_out
from helpers.text import Text, Windows, batches, encode, read
from helpers.transformer import MATRICES, NEURONS, WIDTH, Size, count, initialise, invariant
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib.figure import Figure

import spherical_optax as so

Name: TypeAlias = Literal["adamh", "muonh", "adamw", "muon", "adamsrt", "rotational_adamw", "ngpt"]

# Layers, width, heads, hidden units, context length.
PRESETS = {
    "tiny": (2, 32, 2, 96, 32),
    "small": (4, 128, 4, 384, 128),
    "medium": (8, 320, 5, 960, 256),
    "large": (12, 576, 9, 1728, 512),
    "gpt2": (12, 896, 14, 2624, 1024),
}

# Found in a few short runs. To compare optimizers, tune the learning rate of each.
LEARNING_RATES: dict[Name, float] = {
    "adamh": 0.02,
    "muonh": 0.02,
    "adamw": 5e-3,
    "muon": 0.02,
    "adamsrt": 5e-3,
    "rotational_adamw": 5e-3,
    "ngpt": 1e-2,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a transformer on a text."""

    optimizer: Name = "adamh"
    """Optimizer of the blocks' matrices. Adam trains embedding, head and norm scales; ngpt trains
    all parameters."""
    text: pathlib.Path | None = None
    """Path of a text in UTF-8. None: the King James Bible of Debian's package bible-kjv."""
    level: Literal["byte", "character"] = "byte"
    """Whether a token is a byte or a character."""
    preset: Literal["tiny", "small", "medium", "large", "gpt2"] = "small"
    """Size of the model: 0.04, 1, 11, 52 or 124 million parameters."""
    steps: int = 400
    """Training steps."""
    batch: int = 16
    """Windows of text per step."""
    accumulate: int = 1
    """Number of parts of a batch that are run one after another, to save memory."""
    learning_rate: float | None = None
    """Peak learning rate of the matrices. None: a rate that works for the default model."""
    other_learning_rate: float = 5e-3
    """Peak learning rate of embedding, head and norm scales. Not used by ngpt."""
    weight_decay: float = 0.1
    """Weight decay of the matrices with adamw, muon and rotational_adamw. With rotational_adamw it
    sets the angle."""
    warmup: int = 20
    """Steps in which the learning rate rises to its peak. nGPT needs none."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Schedule of the learning rate after the warmup; cosine and linear decay to 0."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """dtype of the computation. Parameters and optimizer state are always float32."""
    mesh: str = "data=1"
    """Number of devices for the batch (data) and for heads and hidden units (model), such as
    data=4,model=2."""
    seed: int = 0
    """Seed of the initial weights and the batches."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between updates of the progress bar, and between recorded angles and radii."""
    resume: bool = True
    """Whether to resume from the last checkpoint in out. If not, checkpoints there are removed."""
    out: pathlib.Path = pathlib.Path("out/language")
    """Directory for checkpoints, results.json and curves.png."""


# The options that may change when a run resumes from a checkpoint.
FREE = ("mesh", "checkpoint_every", "log_every", "resume", "out")


def groups_of(name: Name, size: Size) -> so.Groups:
    """The groups of the optimizer, whose angles and radii are recorded."""
    special = {"adamsrt": invariant(size), "rotational_adamw": NEURONS, "ngpt": WIDTH}
    return special.get(name, MATRICES)


def make_optimizer(
    name: Name,
    rate: optax.ScalarOrSchedule,
    other_rate: optax.ScalarOrSchedule,
    size: Size,
    weight_decay: jax.typing.ArrayLike = 0.1,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of that name, followed by a recorder of angle and radius of its groups."""
    groups, b2 = groups_of(name, size), 0.95
    adam = optax.adam(other_rate, b2=b2)

    def labels(tree: Any) -> Any:
        is_matrix = re.compile(r"'(q|k|v|o|gate|up|down)'\]\['kernel'").search
        return jax.tree.map_with_path(
            lambda path, _: "matrices" if is_matrix(jax.tree_util.keystr(path)) else "rest", tree
        )

    def with_adam(tx: optax.GradientTransformation) -> optax.GradientTransformation:
        return optax.partition({"matrices": tx, "rest": adam}, labels)

    match name:
        case "adamw":
            tx = with_adam(optax.adamw(rate, b2=b2, weight_decay=weight_decay))
        case "muon":
            tx = with_adam(optax.contrib.muon(rate, weight_decay=weight_decay))
        case "adamsrt":
            tx = with_adam(so.adamsrt(rate, b2=b2, groups=groups))
        case "rotational_adamw":
            tx = so.rotational_adamw(
                rate,
                b2=b2,
                groups=groups,
                other_learning_rate=other_rate,
                weight_decay=weight_decay,
                mask=lambda tree: jax.tree.map(lambda _: False, tree),
            )
        case "adamh":
            tx = so.adamh(rate, b2=b2, groups=groups, other=adam)
        case "muonh":
            tx = so.muonh(rate, groups=groups, other=adam)
        case "ngpt":
            tx = optax.chain(optax.adam(rate, b2=b2), so.retract(groups, 1.0))
    return so.chain(tx, so.record_sphere(groups))


def make_schedule(peak: Any, warmup: Any, steps: int, kind: str = "cosine") -> optax.Schedule:
    """Linear warmup to the peak, then the decay of the given kind over the remaining steps."""

    def schedule(count: Any) -> jax.Array:
        left = jnp.clip((steps - count) / jnp.maximum(1, steps - warmup), 0, 1)
        falling = {"cosine": (1 - jnp.cos(jnp.pi * left)) / 2, "linear": left, "constant": 1.0}
        return peak * jnp.minimum((count + 1) / (warmup + 1), falling[kind])

    return schedule


def mean_loss(graph: Any, params: Any, tokens: jax.Array) -> jax.Array:
    """The mean cross-entropy of the next token, in nats."""
    logits = nnx.merge(graph, params)(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def update(
    tx: optax.GradientTransformation,
    graph: Any,
    params: Any,
    state: Any,
    tokens: jax.Array,
    accumulate: int = 1,
) -> tuple[Any, Any, dict[str, Any]]:
    """Takes a step; its metrics are the loss, and mean angle and radius of each leaf's groups."""
    loss_and_grads = jax.value_and_grad(functools.partial(mean_loss, graph))
    if accumulate == 1:
        loss, grads = loss_and_grads(params, tokens)
    else:

        def add(total: Any, part: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, loss_and_grads(params, part)), None

        # Each part contains windows from every device.
        parts = tokens.reshape(-1, accumulate, tokens.shape[1]).swapaxes(0, 1)
        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(add, zero, parts)
        loss, grads = jax.tree.map(lambda x: x / accumulate, total)
    updates, state = tx.update(grads, state, params)
    groups = {
        jax.tree_util.keystr(path, simple=True, separator="/"): so.SphereMetrics(*rows)
        for path, rows in jax.tree.leaves_with_path(optax.tree.get(state, "sphere"))
    }
    metrics = {
        "loss": loss,
        "angle": {path: sphere.step_angle.mean() for path, sphere in groups.items()},
        "radius": {path: sphere.radius_after.mean() for path, sphere in groups.items()},
    }
    return optax.apply_updates(params, updates), state, metrics


def make_mesh(text: str) -> jax.sharding.Mesh:
    """Makes the mesh that a text such as data=4,model=2 describes."""
    sizes = {"data": 1, "model": 1}
    for part in text.split(","):
        axis, _, number = part.partition("=")
        if axis not in sizes or not number.isdecimal() or int(number) < 1:
            raise SystemExit(f"language.py: --mesh: expected such as data=4,model=2, found {text}")
        sizes[axis] = int(number)
    if math.prod(sizes.values()) > jax.device_count():
        raise SystemExit(
            f"language.py: --mesh: expected at most {jax.device_count()} devices, as there are, "
            f"found {text}"
        )
    devices = jax.devices()[: math.prod(sizes.values())]
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def sharding_of(mesh: jax.sharding.Mesh, params: Any) -> Any:
    """Shards attention heads, hidden units and the output tokens over the mesh axis `model`."""

    def place(path: Any, x: Any) -> NamedSharding:
        name, spec = jax.tree_util.keystr(path, simple=True, separator="/"), PartitionSpec()
        if name.endswith(("o/kernel", "down/kernel")):
            spec = PartitionSpec("model", None)
        elif name.endswith("kernel"):
            spec = PartitionSpec(None, "model")
        axis = next((i for i, each in enumerate(spec) if each), None)
        fits = axis is None or x.shape[axis] % mesh.shape["model"] == 0
        return NamedSharding(mesh, spec if fits else PartitionSpec())

    return jax.tree.map_with_path(place, params)


def check_memory(config: Config, size: Size, devices: int) -> None:
    """Exits if a step does not fit in memory.

    Counts parameters, gradients, optimizer state and the activations of a batch.
    """
    windows = config.batch / config.accumulate
    activations = size.layers * (12 * size.width + 4 * size.hidden + size.heads * size.context)
    activations = activations * (2 if size.dtype == "bfloat16" else 4) + 12 * size.vocabulary
    needed = 4 * 4 * count(size) + windows * size.context * activations / devices
    stats = jax.devices()[0].memory_stats() or {}
    there = stats.get("bytes_limit") or available_memory()
    if needed > there:
        raise SystemExit(
            f"language.py: --preset: expected to fit in {there / 1e9:.1f} GB, found that "
            f"{config.preset} with {windows:g} windows at once needs about {needed / 1e9:.1f} GB. "
            "Use a smaller --preset, a smaller --batch, or a larger --accumulate."
        )


def available_memory() -> float:
    """The memory available on this machine, in bytes."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+)", pathlib.Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    if found:
        return 1024.0 * int(found[1])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


@dataclasses.dataclass
class Run:
    """The current state of a training run.

    Attributes:
      params: The parameters.
      state: The optimizer's state.
      iterator: The iterator of the batches.
      losses: The loss of each step, in nats.
      looks: Mean angle and radius of each leaf's groups, at the logged steps.
    """

    params: Any
    state: Any
    iterator: grain.DatasetIterator
    losses: list[float] = dataclasses.field(default_factory=list)
    looks: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def described(config: Config) -> dict[str, Any]:
    """The options that determine the result of a run."""
    options = dataclasses.asdict(config) | {"text": str(config.text)}
    return {name: value for name, value in options.items() if name not in FREE}


def save(manager: ocp.CheckpointManager, config: Config, run: Run) -> None:
    rest = {"config": described(config), "iterator": run.iterator.get_state()}
    rest |= {"losses": run.losses, "looks": run.looks}
    arrays = ocp.args.StandardSave((run.params, run.state))
    composite = ocp.args.Composite(arrays=arrays, rest=ocp.args.JsonSave(rest))
    manager.save(len(run.losses), args=composite)


def restore(manager: ocp.CheckpointManager, config: Config, run: Run) -> None:
    """Restores the last checkpoint, if there is one; exits if its configuration differs."""
    latest = manager.latest_step()
    if latest is None:
        return
    rest = manager.restore(latest, args=ocp.args.Composite(rest=ocp.args.JsonRestore())).rest
    for name, value in described(config).items():
        if (saved := rest["config"].get(name)) != value:
            raise SystemExit(
                f"language.py: --{name.replace('_', '-')}: expected {saved}, as in the checkpoint "
                f"in {config.out}, found {value}. Use another --out, or --no-resume to start over."
            )
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, (run.params, run.state))
    arrays = ocp.args.Composite(arrays=ocp.args.StandardRestore(target))
    run.params, run.state = manager.restore(latest, args=arrays).arrays
    run.iterator.set_state(rest["iterator"])
    run.losses, run.looks = rest["losses"], rest["looks"]


Step: TypeAlias = Callable[[Any, Any, jax.Array], tuple[Any, Any, dict[str, Any]]]


def train(
    config: Config,
    run: Run,
    step: Step,
    place: Callable[[np.ndarray], jax.Array],
    manager: ocp.CheckpointManager,
) -> None:
    """Runs the remaining steps; fetches metrics from the devices only every few steps."""
    pending: list[Any] = []
    progress = tqdm.tqdm(total=config.steps, initial=len(run.losses), unit="step")
    while (done := len(run.losses) + len(pending)) < config.steps:
        run.params, run.state, metrics = step(run.params, run.state, place(next(run.iterator)))
        pending.append(metrics)
        done += 1
        saving = done % config.checkpoint_every == 0 or done == config.steps
        if saving or done % config.log_every == 0:
            progress.update(len(pending))
            found = jax.tree.map(float, jax.device_get(pending))
            run.losses += [each["loss"] for each in found]
            if done % config.log_every == 0 or done == config.steps:
                look = {name: found[-1][name] for name in ("angle", "radius")}
                run.looks.append({"step": done} | look)
                angle = np.mean(list(look["angle"].values()))
                progress.set_postfix(loss=f"{run.losses[-1]:.3f}", angle=f"{angle:.4f}")
            pending.clear()
        if saving:
            save(manager, config, run)
    progress.close()


def evaluate(graph: Any, params: Any, tokens: np.ndarray, size: Size, batch: int) -> float:
    """The mean loss over all windows of the held-out part, in nats per token."""
    windows = Windows(tokens, size.context)
    loss = jax.jit(functools.partial(mean_loss, graph))
    parts = [range(i, min(i + batch, len(windows))) for i in range(0, len(windows), batch)]
    totals = [len(part) * loss(params, np.stack([windows[i] for i in part])) for part in parts]
    return float(sum(jax.device_get(totals))) / len(windows)


def sample(
    graph: Any, params: Any, prompt: np.ndarray, length: int, size: Size, temperature: float = 0.8
) -> np.ndarray:
    """The prompt and the tokens sampled after it, each from at most one context of tokens."""

    @jax.jit
    def draw(params: Any, context: jax.Array, last: jax.Array, key: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(context[None])[0, last]
        return jax.random.categorical(key, logits / temperature)

    tokens, keys = list(prompt), jax.random.split(jax.random.key(0), length)
    for key in keys:
        seen = tokens[-size.context :]
        context = np.zeros(size.context, np.int32)
        context[: len(seen)] = seen
        tokens.append(int(draw(params, context, len(seen) - 1, key)))
    return np.array(tokens)


def decode(tokens: np.ndarray, text: Text, level: str) -> str:
    if level == "byte":
        return bytes(tokens.tolist()).decode(errors="replace")
    return "".join(text.symbols[token] for token in tokens)


def plot(run: Run, layers: int, held_out: float, path: pathlib.Path) -> None:
    """Plots loss, angle and radius; angle and radius are means over the leaves of a layer."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    loss, angle, radius = figure.subplots(1, 3)
    loss.plot(np.arange(1, len(run.losses) + 1), run.losses, color="#0072B2", lw=0.8)
    loss.axhline(held_out, color="#D55E00", ls="--", lw=1, label=f"held out, {held_out:.3f}")
    loss.set_ylabel("loss (nats per token)")
    loss.legend()
    steps = [look["step"] for look in run.looks]
    names = [f"blocks/{i}/" for i in range(layers)]
    names += sorted({path.split("/")[0] for path in run.looks[0]["angle"]} - {"blocks"})
    for ax, key, label in (
        (angle, "angle", "mean angle per step (rad)"),
        (radius, "radius", "mean radius, relative to the first"),
    ):
        for i, name in enumerate(names):
            shade = 0.8 * (1 - i / max(1, layers - 1))
            color = f"C{i}" if i >= layers else f"{shade:.3f}"
            values = np.array(
                [
                    np.mean([value for path, value in look[key].items() if path.startswith(name)])
                    for look in run.looks
                ]
            )
            values = values / values[0] if key == "radius" else values
            ax.plot(steps, values, color=color, label=name.strip("/"))
        ax.set_ylabel(label)
    angle.set_yscale("log")
    low, high = radius.get_ylim()
    radius.set_ylim(min(low, 0.95), max(high, 1.05))  # a constant radius should look constant
    for ax in (loss, angle, radius):
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
    handles, labels = angle.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(8, len(labels)))
    figure.savefig(path, dpi=100)


def check(config: Config) -> None:
    """Exits with a message if an option is invalid."""
    rate, other = config.learning_rate, config.other_learning_rate
    check_options(
        *(
            (f"--{name.replace('_', '-')}", value, "at least 1", value >= 1)
            for name in ("steps", "batch", "accumulate", "checkpoint_every", "log_every")
            for value in [getattr(config, name)]
        ),
        ("--warmup", config.warmup, "at least 0", config.warmup >= 0),
        ("--seed", config.seed, "at least 0", config.seed >= 0),
        ("--weight-decay", config.weight_decay, "above 0", 0 < config.weight_decay < math.inf),
        ("--learning-rate", rate, "a positive number", rate is None or 0 < rate < math.inf),
        ("--other-learning-rate", other, "a positive number", 0 < other < math.inf),
        (
            "--batch",
            config.batch,
            f"a multiple of {config.accumulate} parts",
            config.batch % config.accumulate == 0,
        ),
    )


def main(config: Config) -> None:
    check(config)
    mesh = make_mesh(config.mesh)
    windows = config.batch // config.accumulate
    check_options(
        (
            "--batch",
            config.batch,
            f"a multiple of {mesh.shape['data']} devices in each of {config.accumulate} parts",
            windows % mesh.shape["data"] == 0,
        )
    )
    check_out(config.out, "results.json", "curves.png")
    text = encode(read(config.text), config.level)
    layers, width, heads, hidden, context = PRESETS[config.preset]
    size = Size(
        layers,
        width,
        heads,
        hidden,
        context,
        len(text.symbols),
        normalized=config.optimizer == "ngpt",
        dtype=config.compute,
    )
    shortest = min(len(text.train), len(text.held_out))
    if shortest <= context:
        raise SystemExit(
            f"language.py: --text: expected more than {context} tokens, the context, in the "
            f"held-out 5 %, found {len(text.held_out)}; take a longer text."
        )
    check_memory(config, size, mesh.size)

    rate = config.learning_rate or LEARNING_RATES[config.optimizer]
    schedules = [
        make_schedule(peak, config.warmup, config.steps, config.schedule)
        for peak in (rate, config.other_learning_rate)
    ]
    tx = make_optimizer(config.optimizer, *schedules, size, config.weight_decay)
    graph, params = initialise(size, config.seed)
    parts = sharding_of(mesh, params)
    where = so.state_sharding(tx, params, parts)
    params = jax.device_put(params, parts)
    state = jax.jit(tx.init, out_shardings=where)(params)
    step = jax.jit(
        functools.partial(update, tx, graph, accumulate=config.accumulate),
        donate_argnums=(0, 1),
        out_shardings=(parts, where, None),
    )
    on_devices = NamedSharding(mesh, PartitionSpec("data"))
    run = Run(params, state, batches(text.train, context, config.batch, config.seed))
    print(f"{count(size):,} parameters, {len(text.train):,} tokens to train on", flush=True)

    folder = (config.out / "checkpoints").absolute()
    if not config.resume:
        shutil.rmtree(folder, ignore_errors=True)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
    start = time.perf_counter()
    with ocp.CheckpointManager(folder, options=options) as manager:
        restore(manager, config, run)
        train(config, run, step, lambda x: jax.device_put(x, on_devices), manager)
    seconds = time.perf_counter() - start

    nats = evaluate(graph, run.params, text.held_out, size, config.batch)
    bits = nats / math.log(2) / text.bytes_per_token
    drawn = decode(sample(graph, run.params, text.held_out[:16], 300, size), text, config.level)
    print(f"Held-out loss: {nats:.4f} nats per token, {bits:.4f} bits per byte. A sample:\n{drawn}")
    report = described(config) | {
        "learning_rate": rate,
        "mesh": config.mesh,
        "device": jax.devices()[0].device_kind,
        "parameters": count(size),
        "seconds": seconds,
        "held_out_nats": nats,
        "held_out_bits_per_byte": bits,
        "sample": drawn,
        "losses": run.losses,
        "looks": run.looks,
    }
    (config.out / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(run, layers, nats, config.out / "curves.png")
    print(f"Wrote results.json and curves.png to {config.out}.")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
