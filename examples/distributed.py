"""Trains on digits over several processes, each with its part of every batch.

By default the program starts the processes itself, on this machine and on CPUs. On a cluster, every
host runs this program with `--process` and the coordinator's address. Parameters and optimizer
state are replicated or, with `--shard`, split over the processes. The program compares the final
parameters with those of a run in one process. All computations are in float64, because training
amplifies rounding errors.

    python examples/distributed.py
    python examples/distributed.py --processes 4 --shard
    python examples/distributed.py --help
"""

import dataclasses
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import optax
import tyro
from digits import BATCH_SIZE, RULES, Network, load
from flax import nnx
from helpers.classify import functional_loss
from helpers.options import check_options
from helpers.outputs import check_out
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import spherical_optax as so


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains the network of digits.py over several processes."""

    processes: int = 2
    """Number of processes."""
    process: int | None = None
    """Number of this process, from 0. None: start all of them here, and a single one to compare."""
    coordinator: str | None = None
    """Address and port of process 0. Pass it if you start the processes one by one."""
    bind: str | None = None
    """Address and port on which process 0 listens. None: those of the coordinator."""
    shard: bool = False
    """Whether to split parameters and state over the processes, along output channels."""
    steps: int = 40
    """Training steps."""
    learning_rate: float = 0.03
    """Learning rate of AdamSRT."""
    out: pathlib.Path = pathlib.Path("out/distributed")
    """Directory for the final parameters of each run."""


def split_channels(mesh: jax.sharding.Mesh, x: Any, *, shard: bool) -> NamedSharding:
    """Shards the last axis of kernels over all devices if its size is divisible."""
    divides = shard and x.ndim > 1 and x.shape[-1] % mesh.size == 0
    spec = PartitionSpec(*(None,) * (x.ndim - 1), "devices") if divides else PartitionSpec()
    return NamedSharding(mesh, spec)


def train(config: Config) -> tuple[Any, float]:
    """Trains; runs on every process, and returns the parameters and the last loss."""
    (images, labels), _ = load()
    images = images.astype(float)
    mesh = jax.make_mesh((jax.device_count(),), ("devices",), axis_types=(AxisType.Auto,))
    batches = NamedSharding(mesh, PartitionSpec("devices"))
    loss_fn, params = functional_loss(Network(nnx.Rngs(0)))
    params = nnx.to_pure_dict(params)
    sharding = jax.tree.map(lambda x: split_channels(mesh, x, shard=config.shard), params)

    tx = so.adamsrt(config.learning_rate, groups=RULES)
    where = so.state_sharding(tx, params, sharding)
    params = jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: x[index]),
        jax.tree.map(np.asarray, params),
        sharding,
    )
    state = jax.jit(tx.init, out_shardings=where)(params)

    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(sharding, where, None))
    rng = np.random.default_rng(0)
    for _ in range(config.steps):
        batch = rng.permutation(len(images))[:BATCH_SIZE]
        # Every process draws the whole batch, and gives its devices their part.
        x, y = (
            jax.make_array_from_callback(part.shape, batches, lambda index, part=part: part[index])
            for part in (images[batch], labels[batch])
        )
        params, state, loss = jitted(params, state, x, y)
    everywhere = jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec()), params)
    params = jax.jit(lambda params: params, out_shardings=everywhere)(params)
    return jax.tree.map(np.asarray, params), float(loss)


def worker(config: Config) -> None:
    """Runs one process."""
    jax.config.update("jax_enable_x64", True)
    if config.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            config.coordinator,
            config.processes,
            config.process,
            # By default JAX would listen on all addresses.
            coordinator_bind_address=config.bind or config.coordinator,
        )
    params, loss = train(config)
    if config.process == 0:
        leaves = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(params)}
        np.savez(config.out / f"{config.processes}.npz", **leaves)
        print(f"{config.processes} processes: loss {loss:.6f} after {config.steps} steps")


def start(config: Config, processes: int) -> None:
    """Starts the processes on this machine, and waits until they end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    options = [f"--steps={config.steps}", f"--learning-rate={config.learning_rate}"]
    options += [f"--out={config.out}", "--shard" if config.shard else "--no-shard"]
    options += [f"--processes={processes}", f"--coordinator={coordinator}"]
    command = [sys.executable, __file__, *options]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen([*command, f"--process={i}"], env=environment) for i in range(processes)
    ]
    codes = [each.wait() for each in running]
    if any(codes):
        raise SystemExit("distributed.py: a process failed")


def main(config: Config) -> None:
    process = config.process
    check_options(
        ("--processes", config.processes, "at least 1", config.processes >= 1),
        ("--steps", config.steps, "at least 1", config.steps >= 1),
        ("--learning-rate", config.learning_rate, "a positive number", config.learning_rate > 0),
        ("--bind", config.bind, "--process with it", config.bind is None or process is not None),
    )
    check_out(config.out, *(f"{processes}.npz" for processes in (1, config.processes)))
    if process is not None:
        worker(config)
        return
    for processes in dict.fromkeys((1, config.processes)):
        start(config, processes)
    with (
        np.load(config.out / "1.npz", allow_pickle=False) as one,
        np.load(config.out / f"{config.processes}.npz", allow_pickle=False) as several,
    ):
        apart = max(float(np.abs(one[name] - several[name]).max()) for name in one)
    print(f"Largest difference of a parameter between 1 and {config.processes}: {apart:.1e}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
