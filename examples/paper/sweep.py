"""Runs cells one after the other, and skips finished ones."""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import tqdm

from .cells import Cell, Role, grid_cells, search_seeds_of, seeds_of
from .errors import stop
from .options import Common, Sweep
from .readers import Dataset
from .training import RESULT, train


def finish(cells: Iterable[Cell], dataset: Dataset, options: Common, role: Role) -> Iterator[Any]:
    """Yields the result of each cell: from its file if there is one, else by training."""
    for cell in cells:
        folder = options.out / f"{cell.name}{'-search' if role == 'search' else ''}"
        yield read_result(folder) or train(
            cell,
            dataset,
            folder,
            role,
            checkpoint_steps=options.checkpoint_steps,
            log_every=options.log_every,
            threads=options.threads,
            keep=options.keep,
        )


def read_result(folder: pathlib.Path) -> dict[str, Any] | None:
    path = folder / RESULT
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError as error:
        raise stop(f"{path}", "the result of a run", f"{error}") from error


def with_seeds(cells: Iterable[Cell], seeds: Iterable[int]) -> list[Cell]:
    return [dataclasses.replace(cell, seed=seed) for cell in cells for seed in seeds]


def best_of(results: list[dict[str, Any]], cells: list[Cell]) -> Cell:
    """The cell of best validation accuracy, as a mean over seeds; its seed is 0."""
    found: dict[Cell, list[float]] = {}
    for cell, result in zip(cells, results, strict=True):
        found.setdefault(dataclasses.replace(cell, seed=0), []).append(
            result["validation_accuracy"]
        )
    return max(found, key=lambda cell: statistics.mean(found[cell]))


def sweep(options: Sweep, dataset: Dataset) -> None:
    """Runs the grid, one optimizer after the other, so that each program is compiled once."""
    seeds, search_seeds = seeds_of(options), search_seeds_of(options)
    # Makes all grids before the first run: an error in the last one would show after hours.
    grids = {name: grid_cells(options, dataset, name) for name in dict.fromkeys(options.optimizers)}
    settings = sum(map(len, grids.values()))
    total = settings * len(search_seeds) + len(grids) * len(seeds)
    total = total if search_seeds else settings * len(seeds)
    with tqdm.tqdm(total=total, unit="run", disable=jax.process_index() != 0) as bar:
        for name, grid in grids.items():
            bar.set_description(name)
            if search_seeds:
                cells = with_seeds(grid, search_seeds)
                grid = [best_of(collect(cells, dataset, options, "search", bar), cells)]
            collect(with_seeds(grid, seeds), dataset, options, "report", bar)


def collect(
    cells: list[Cell], dataset: Dataset, options: Common, role: Role, bar: tqdm.tqdm
) -> list[dict[str, Any]]:
    results = []
    for result in finish(cells, dataset, options, role):
        results.append(result)
        bar.update()
    return results
