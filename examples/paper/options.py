"""The options of the commands. `None`: from the preset, or else from the published table."""

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
    """Folder of the data set; which one it is, is seen from its files."""
    model: Model | None = None
    """Network."""
    protocol: Literal["published", "sound"] | None = None
    """"published": seed 0, an augmented validation set, accuracy as mean over batches. "sound":
    five seeds, validation as it is, accuracy over all images. None: the preset's, or published."""
    preset: Literal["small"] | None = None
    """"small": Fashion-MNIST on two cores, a narrow ResNet20 on few images."""
    values_of: Source | None = None
    """Take the published values of this data set; needed where the data have none themselves."""
    epochs: int | None = None
    """Passes over the training images."""
    schedule: Literal["steps", "cosine", "constant"] | None = None
    """Of the learning rate: times 0.1 after 1/3, 5/9 and 7/9 of the steps; to zero; or none."""
    batch_size: int | None = None
    """Images of a training step, on all devices together."""
    test_batch_size: int | None = None
    """The same for evaluation."""
    b1: float | None = None
    """Decay rate of the first moment; the momentum of SGD."""
    b2: float | None = None
    """Decay rate of the second moment."""
    width: int | None = None
    """Channels of the network's first stage."""
    train_images: int | None = None
    """Train on so many images only."""
    test_images: int | None = None
    """Test on so many images only."""
    validation: float | None = None
    """Part of the training set for validation; 0: the test set validates."""
    augmentation: Augmentation | None = None
    """What is done to training images."""
    image_size: int | None = None
    """Height and width; images of other sizes are cropped. ResNets take their ImageNet form from
    128 pixels on. None: the images' own, 224 for images in files."""
    batch_norm: Literal["global", "device"] = "global"
    """Whether statistics are those of the whole batch, or of each device's part."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations; weights and statistics stay float32."""
    seeds: tuple[int, ...] | None = None
    """A run for each; a seed sets weights, split, order and augmentation."""
    checkpoint_steps: int | None = None
    """Steps between checkpoints. None: one after each epoch."""
    log_every: int = 20
    """Steps between two looks at loss and accuracy."""
    threads: int | None = None
    """Threads that prepare batches. None: 2, or 16 for images in files."""
    keep: bool = False
    """Keep the checkpoints of finished runs."""
    distributed: bool = False
    """This is one of several processes, of a cluster that JAX can ask; they share --out."""
    coordinator: str | None = None
    """The same on machines that JAX cannot ask: address and port of process 0."""
    processes: int = 1
    """How many there are."""
    process: int = 0
    """Which this is, from 0."""
    out: pathlib.Path = OUT
    """Folder with a folder for each run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Common):
    """Trains one cell of the table, as published unless told otherwise."""

    optimizer: Optimizer
    """Optimizer."""
    learning_rate: float | None = None
    """Initial learning rate."""
    weight_decay: float | None = None
    """Decay, L2 or decoupled as the optimizer has it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(Common):
    """Trains a grid of optimizers, learning rates, decays and seeds; skips what is finished."""

    optimizers: tuple[Optimizer, ...] = PUBLISHED
    """Optimizers."""
    learning_rates: tuple[float, ...] | None = None
    """Initial learning rates. None: the published one."""
    weight_decays: tuple[float, ...] | None = None
    """Decays. None: 0 and 5e-4 / 2^k for k from 0 to 6."""
    search_seeds: tuple[int, ...] | None = None
    """Search the grid with these, and run the best setting with --seeds. None: all with --seeds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Collects results into the form of the published table, beside the published numbers."""

    out: pathlib.Path = OUT
    """Folder of the runs; gets table.md and table.json."""
    confidence: float = 0.95
    """Of the intervals of mean accuracies."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plot:
    """Draws accuracy, and per layer radius, angle and effective learning rate, of the best setting
    of each optimizer.
    """

    out: pathlib.Path = OUT
    """Folder of the runs; gets a PNG file for each column of the table."""


Command = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Table, tyro.conf.subcommand("table")]
    | Annotated[Plot, tyro.conf.subcommand("plot")]
)
