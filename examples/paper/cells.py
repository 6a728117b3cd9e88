"""A cell of the table: everything that determines the result of one run.

An option that is given takes precedence over the preset, and the preset over the published table.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from . import published
from .data import AUGMENTATIONS, Augmentation
from .errors import stop
from .optimizers import Setting
from .options import Common, Run, Sweep
from .presets import PRESETS
from .published import Model, Optimizer
from .readers import Dataset

Role: TypeAlias = Literal["search", "report"]  # the run chooses a setting, or is for the table
SEEDS = {"published": (0,), "sound": (0, 1, 2, 3, 4)}
LARGE = 128  # from this image size in pixels on, ResNet18 takes its ImageNet form


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run. The same cell on the same data and devices gives the same bits."""

    data: str
    images: tuple[int, int]  # of the training and the test set
    classes: int
    channels: int
    model: Model
    width: int | None
    optimizer: Optimizer
    learning_rate: float
    weight_decay: float
    b1: float
    b2: float
    seed: int
    protocol: Literal["published", "sound"]
    epochs: int
    schedule: Literal["steps", "cosine", "constant"]
    batch_size: int
    test_batch_size: int
    validation: float
    train_images: int | None
    test_images: int | None
    augmentation: Augmentation
    image_size: int
    batch_norm: Literal["global", "device"]
    dtype: Literal["float32", "bfloat16"]

    @property
    def setting(self) -> Setting:
        return Setting(self.learning_rate, self.weight_decay, self.b1, self.b2)

    @property
    def recipe(self) -> "Cell":
        """The part that determines the compiled program: all but traced numbers and seed."""
        blank = dict.fromkeys(Setting._fields, 0.0)
        return dataclasses.replace(self, seed=0, **blank)

    @property
    def large(self) -> bool:
        return self.image_size >= LARGE

    @property
    def name(self) -> str:
        """The name of the run's folder, which is unique to the cell."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        parts = (self.data, self.model, self.optimizer, f"{self.learning_rate:g}")
        return "-".join((*parts, f"{self.weight_decay:g}", f"{self.seed}", digest))


def first(*values: Any) -> Any:
    """The first value that is not `None`."""
    return next((value for value in values if value is not None), None)


def of_optimizer(value: Any, optimizer: Optimizer) -> Any:
    """The optimizer's value if the preset has one per optimizer, else the common value."""
    return value.get(optimizer) if isinstance(value, Mapping) else value


def make_cells(
    options: Common, dataset: Dataset, optimizer: Optimizer, grid: list[tuple[Any, Any]]
) -> list[Cell]:
    """Makes a cell with seed 0 for each pair (learning rate, weight decay) of the grid.

    `None` in a pair stands for the default.
    """
    preset = PRESETS[options.preset] if options.preset else {}
    model = first(options.model, preset.get("model"))
    if model is None:
        raise stop("--model", "a model, or a preset", None)
    source: Any = first(options.values_of, dataset.kind)
    table = published.HYPERPARAMETERS.get(optimizer, {}).get((source, model))
    protocol = published.PROTOCOLS.get(source)
    size = first(options.image_size, dataset.shape[0] if dataset.shape else 224)

    def value(name: str, fallback: Any) -> Any:
        """The option, else the preset's value, else `fallback`; exits if there is none."""
        found = first(getattr(options, name), of_optimizer(preset.get(name), optimizer), fallback)
        if found is None:
            raise missing(f"--{name.replace('_', '-')}", source, model, optimizer)
        return found

    def optional(name: str) -> Any:
        return first(getattr(options, name), preset.get(name))

    common = {
        "data": dataset.kind,
        "images": (len(dataset.train), len(dataset.test)),
        "classes": dataset.classes,
        "channels": dataset.shape[2] if dataset.shape else 3,
        "model": model,
        "width": optional("width"),
        "optimizer": optimizer,
        "b1": value("b1", published.B1),
        "b2": value("b2", table and table.b2),
        "seed": 0,
        "protocol": value("protocol", "published"),
        "epochs": value("epochs", protocol and protocol.epochs),
        "schedule": value("schedule", "steps"),
        "batch_size": value("batch_size", protocol and protocol.batch_size),
        "test_batch_size": value("test_batch_size", protocol and protocol.test_batch_size),
        "train_images": optional("train_images"),
        "test_images": optional("test_images"),
        "augmentation": value("augmentation", AUGMENTATIONS.get(dataset.kind, "none")),
        "image_size": size,
        "batch_norm": options.batch_norm,
        "dtype": options.dtype,
    }
    part = protocol.validation if protocol and common["protocol"] == "published" else 0.05
    common["validation"] = value("validation", part)
    cells = []
    for rate, decay in grid:
        rate = first(rate, table and table.learning_rate)
        decay = first(decay, table and table.weight_decay)
        for name, number in (("--learning-rate", rate), ("--weight-decay", decay)):
            if number is None:
                raise missing(name, source, model, optimizer)
        cells.append(Cell(**common, learning_rate=float(rate), weight_decay=float(decay)))
    check(cells)
    return cells


def missing(option: str, source: str, model: str, optimizer: str) -> SystemExit:
    return stop(
        option,
        "a value, a preset or --values-of",
        f"none published for {source} {model} {optimizer}",
    )


def check(cells: list[Cell]) -> None:
    for cell in cells:
        wanted = cell.train_images or cell.images[0]
        for name, found, expected, valid in (
            ("--epochs", cell.epochs, "at least 1", cell.epochs >= 1),
            ("--batch-size", cell.batch_size, "at least 2", cell.batch_size >= 2),
            ("--test-batch-size", cell.test_batch_size, "at least 1", cell.test_batch_size >= 1),
            ("--validation", cell.validation, "a part in [0, 1)", 0 <= cell.validation < 1),
            ("--train-images", wanted, "at least a batch", wanted >= cell.batch_size),
            ("--test-images", cell.test_images, "at least 1", cell.test_images != 0),
            ("--width", cell.width, "at least 1", cell.width is None or cell.width >= 1),
            ("--b1", cell.b1, "a number in [0, 1)", 0 <= cell.b1 < 1),
            ("--b2", cell.b2, "a number in [0, 1)", 0 <= cell.b2 < 1),
            (
                "--learning-rate",
                cell.learning_rate,
                "a positive number",
                0 < cell.learning_rate < math.inf,
            ),
            (
                "--weight-decay",
                cell.weight_decay,
                "a number above 0, which sets the angle"
                if cell.optimizer == "rotational_adamw"
                else "a number not below 0",
                0 <= cell.weight_decay < math.inf
                and (cell.weight_decay > 0 or cell.optimizer != "rotational_adamw"),
            ),
        ):
            if not valid:
                raise stop(name, expected, found)


def seeds_of(options: Common) -> tuple[int, ...]:
    preset: dict[str, Any] = PRESETS[options.preset] if options.preset else {}
    protocol = first(options.protocol, preset.get("protocol"), "published")
    return tuple(dict.fromkeys(first(options.seeds, preset.get("seeds"), SEEDS[protocol])))


def run_cell(options: Run, dataset: Dataset) -> Cell:
    preset: dict[str, Any] = PRESETS[options.preset] if options.preset else {}
    if options.preset and None in (options.learning_rate, options.weight_decay):
        # A preset has a grid. A single run takes the middle of it.
        rates, decays = (
            of_optimizer(preset.get(name, {}), options.optimizer)
            for name in ("learning_rates", "weight_decays")
        )
        rate = first(options.learning_rate, rates and rates[len(rates) // 2])
        decay = first(options.weight_decay, decays and decays[len(decays) // 2])
        return make_cells(options, dataset, options.optimizer, [(rate, decay)])[0]
    pair = (options.learning_rate, options.weight_decay)
    return make_cells(options, dataset, options.optimizer, [pair])[0]


def grid_cells(options: Sweep, dataset: Dataset, optimizer: Optimizer) -> list[Cell]:
    """The cells of an optimizer's grid: all its learning rates with all its weight decays."""
    preset: dict[str, Any] = PRESETS[options.preset] if options.preset else {}
    rates = first(
        options.learning_rates, of_optimizer(preset.get("learning_rates"), optimizer), (None,)
    )
    decays = first(
        options.weight_decays,
        of_optimizer(preset.get("weight_decays"), optimizer),
        published.DECAY_GRID[optimizer == "rotational_adamw" :],
    )
    return make_cells(options, dataset, optimizer, list(itertools.product(rates, decays)))


def search_seeds_of(options: Sweep) -> tuple[int, ...]:
    preset: dict[str, Any] = PRESETS[options.preset] if options.preset else {}
    return tuple(dict.fromkeys(first(options.search_seeds, preset.get("search_seeds"), ())))
