"""Reproduces the paper's experiments: cells of its table, sweeps, the whole table, and plots.

    python -m examples.paper run --data cifar-10-batches-py --model resnet18 --optimizer adamsrt
    python -m examples.paper sweep --data /usr/share/datasets/fashion-mnist --preset small
    python -m examples.paper table
    python -m examples.paper plot
    python -m examples.paper --help

Run these commands in the root of the repository.
"""

import statistics
import sys

import jax
import tyro

from ..helpers.outputs import check_out
from .cells import run_cell, seeds_of
from .errors import DataError, stop
from .options import Command, Common, Plot, Run, Sweep, Table
from .readers import Dataset, read
from .results import make_plots, make_table, number
from .sweep import finish, sweep, with_seeds


def run(options: Run, dataset: Dataset) -> None:
    cell, seeds = run_cell(options, dataset), seeds_of(options)
    accuracies = []
    for seed, result in zip(
        seeds, finish(with_seeds([cell], seeds), dataset, options, "report"), strict=True
    ):
        accuracies.append(100 * result["test_accuracy"])
        tested = f"test accuracy {accuracies[-1]:.2f} % of epoch {result['best_epoch']}"
        if jax.process_index() == 0:
            print(f"{cell.data} {cell.model} {cell.optimizer}, seed {seed}: {tested}")
    if len(accuracies) > 1 and jax.process_index() == 0:
        print(f"mean (std): {number(statistics.mean(accuracies), statistics.stdev(accuracies))}")


def connect(options: Common) -> None:
    """Connects to the other processes, if any. Call it before JAX looks for devices."""
    if options.coordinator is not None:
        jax.distributed.initialize(
            options.coordinator,
            options.processes,
            options.process,
            coordinator_bind_address=options.coordinator,  # JAX's default: all addresses
        )
    elif options.distributed:
        jax.distributed.initialize()


def check(options: Common) -> None:
    for name, value, expected, valid in (
        ("--seeds", options.seeds, "at least one of at least 0", seeds_valid(options.seeds)),
        ("--log-every", options.log_every, "at least 1", options.log_every >= 1),
        (
            "--checkpoint-steps",
            options.checkpoint_steps,
            "at least 1",
            options.checkpoint_steps != 0,
        ),
        (
            "--process",
            options.process,
            "0 to --processes - 1",
            0 <= options.process < options.processes,
        ),
        ("--threads", options.threads, "at least 0", (options.threads or 0) >= 0),
        ("--image-size", options.image_size, "at least 1", options.image_size != 0),
    ):
        if not valid:
            raise stop(name, expected, value)


def seeds_valid(seeds: tuple[int, ...] | None) -> bool:
    return seeds is None or (len(seeds) > 0 and min(seeds) >= 0)


def main(command: Command) -> None:
    check_out(command.out)
    try:
        match command:
            case Run() | Sweep():
                check(command)
                connect(command)
                dataset = read(command.data)
                run(command, dataset) if isinstance(command, Run) else sweep(command, dataset)
            case Table():
                make_table(command)
            case Plot():
                make_plots(command)
    except DataError as error:
        raise SystemExit(f"examples.paper: {error}") from error


if __name__ == "__main__":
    sys.argv[0] = "examples.paper"  # the program's name in messages
    main(tyro.cli(Command, prog="python -m examples.paper", description=__doc__))
