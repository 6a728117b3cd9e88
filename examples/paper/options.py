"""Command-line options. `None` means the preset's value, or else that of the published table."""

import dataclasses
import pathlib
from typing import Annotated, Literal

import tyro

from .data import Augmentation
from .published import PUBLISHED, Model, Optimizer, Source

OUT = pathlib.Path("out/paper")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    data: pathlib.Path
    """Folder of the data set, which is recognized by its files."""
    model: Model | None = None
    """Network."""
    protocol: Literal["published", "sound"] | None = None
    """"published": seed 0, an augmented validation set, accuracy as the mean over batches. "sound":
    five seeds, validation images without augmentation, accuracy over all images. None: the
    preset's, or else published."""
    preset: Literal["small"] | None = None
    """"small": a narrow ResNet20 on few images, for Fashion-MNIST on two cores."""
    values_of: Source | None = None
    """Use the published values of this data set. Needed for a data set without published values."""
    epochs: int | None = None
    """Passes over the training images."""
    schedule: Literal["steps", "cosine", "constant"] | None = None
    """Schedule of the learning rate. "steps": times 0.1 after 1/3, 5/9 and 7/9 of the steps.
    "cosine": to zero along a cosine."""
    batch_size: int | None = None
    """Images per training step, over all devices."""
    test_batch_size: int | None = None
    """Images per evaluation step, over all devices."""
    b1: float | None = None
    """Decay rate of the first moment; the momentum of SGD."""
    b2: float | None = None
    """Decay rate of the second moment."""
    width: int | None = None
    """Channels of the network's first stage."""
    train_images: int | None = None
    """Number of training images to use."""
    test_images: int | None = None
    """Number of test images to use."""
    validation: float | None = None
    """Part of the training set for validation. With 0, the test set is used for validation."""
    augmentation: Augmentation | None = None
    """Augmentation of the training images."""
    image_size: int | None = None
    """Height and width; images of other sizes are cropped and resized. ResNets take their ImageNet
    form from 128 pixels on. None: the size of the images, 224 for image files."""
    batch_norm: Literal["global", "device"] = "global"
    """Whether BatchNorm's statistics are those of the whole batch or of each device's part."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of activations. Weights and statistics are always float32."""
    seeds: tuple[int, ...] | None = None
    """Seeds, with one run for each. A seed sets weights, split, order and augmentation."""
    checkpoint_steps: int | None = None
    """Steps between checkpoints. None: one after each epoch."""
    log_every: int = 20
    """Steps between updates of loss and accuracy in the progress bar."""
    threads: int | None = None
    """Threads that prepare batches. None: 2, or 16 for image files."""
    keep: bool = False
    """Keep the checkpoints of finished runs."""
    distributed: bool = False
    """Run as one of several processes of a cluster that JAX detects. All processes share --out."""
    coordinator: str | None = None
    """Run as one of several processes on machines that JAX cannot detect: address and port of
    process 0."""
    processes: int = 1
    """Number of processes. Used with --coordinator."""
    process: int = 0
    """Number of this process, from 0. Used with --coordinator."""
    out: pathlib.Path = OUT
    """Folder for the results, with a subfolder for each run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Common):
    """Trains one cell of the table, with the published values by default."""

    optimizer: Optimizer
    """Optimizer."""
    learning_rate: float | None = None
    """Initial learning rate."""
    weight_decay: float | None = None
    """Weight decay, L2 or decoupled depending on the optimizer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(Common):
    """Trains a grid of optimizers, learning rates, weight decays and seeds; skips finished runs."""

    optimizers: tuple[Optimizer, ...] = PUBLISHED
    """Optimizers."""
    learning_rates: tuple[float, ...] | None = None
    """Initial learning rates. None: the published one."""
    weight_decays: tuple[float, ...] | None = None
    """Weight decays. None: 0 and 5e-4 / 2^k for k from 0 to 6."""
    search_seeds: tuple[int, ...] | None = None
    """Seeds for searching the grid. Only the best setting then runs with --seeds. None: the whole
    grid runs with --seeds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Makes a table of the results, next to the published numbers."""

    out: pathlib.Path = OUT
    """Folder of the runs. table.md and table.json are written to it."""
    confidence: float = 0.95
    """Confidence level of the intervals of mean accuracies."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plot:
    """Plots the best setting of each optimizer: accuracy, and radius, angle and effective learning
    rate per layer.
    """

    out: pathlib.Path = OUT
    """Folder of the runs. A PNG file for each column of the table is written to it."""


Command = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Table, tyro.conf.subcommand("table")]
    | Annotated[Plot, tyro.conf.subcommand("plot")]
)
