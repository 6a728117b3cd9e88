"""The published tables as data: results, hyperparameters and protocol of every cell.

The source is the README and the code of Roburin et al., Spherical perspective on learning with
normalization layers, 2022. Accuracies are in percent, as mean and standard deviation over a number
of runs that is not stated. There are none for SGD-MRT.

Three things are remarkable. AdamW's two cells of CIFAR100 look swapped. The AdamG row cannot come
from the published code, in which a branch is inverted. AdamW's weight decay is missing for
ResNet20, so PyTorch's default of 1e-2 applies.
"""

import dataclasses
from typing import Literal, NamedTuple, TypeAlias, get_args

Optimizer: TypeAlias = Literal[
    "sgd",
    "adam",
    "adamw",
    "adamg",
    "adams",
    "adamsrt",
    "sgdmrt",
    "hyperball",
    "rotational_adamw",
]
Model: TypeAlias = Literal["resnet18", "resnet20", "vgg16"]
Source: TypeAlias = Literal["cifar10", "cifar100", "svhn", "imagenet"]

OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
PUBLISHED: tuple[Optimizer, ...] = OPTIMIZERS[:7]  # the others are added for comparison
CELLS: tuple[tuple[Source, Model], ...] = (
    ("cifar10", "resnet20"),
    ("cifar10", "resnet18"),
    ("cifar10", "vgg16"),
    ("cifar100", "resnet18"),
    ("cifar100", "vgg16"),
    ("svhn", "resnet18"),
    ("svhn", "vgg16"),
    ("imagenet", "resnet18"),
)


class Accuracy(NamedTuple):
    """Test accuracy in percent."""

    mean: float
    std: float


class Hyperparameters(NamedTuple):
    """Published hyperparameters; for SGD, `b1` is the momentum, and `b2` is not used."""

    learning_rate: float
    weight_decay: float
    b1: float
    b2: float


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a cell was trained, and how its accuracy was measured."""

    batch_size: int = 128
    test_batch_size: int = 1024
    epochs: int = 405
    milestones: tuple[float, ...] = (1 / 3, 5 / 9, 7 / 9)  # epochs 135, 225 and 315
    factor: float = 0.1  # of the learning rate, after each
    validation: float = 0.05  # part of the training set; 0: the test set is used for validation


PROTOCOLS: dict[Source, Protocol] = {
    "cifar10": Protocol(),
    "cifar100": Protocol(test_batch_size=128),
    "svhn": Protocol(),
    "imagenet": Protocol(batch_size=256, test_batch_size=512, validation=0.0),
}

_RESULTS: dict[Optimizer, str] = {
    "sgd": "92.39 .12 | 95.10 .04 | 93.56 .05 | 77.08 .18 | 73.77 .10 | 95.96 .15 | 95.95 .09"
    " | 69.86 .06",
    "adam": "90.98 .06 | 93.77 .20 | 92.83 .17 | 71.30 .36 | 68.43 .16 | 95.32 .23 | 95.57 .20"
    " | 68.52 .10",
    "adamw": "90.19 .24 | 93.61 .12 | 92.53 .25 | 67.39 .27 | 71.37 .22 | 95.38 .15 | 95.60 .08"
    " | -",
    "adamg": "91.64 .17 | 94.67 .12 | 93.41 .17 | 73.76 .34 | 70.17 .20 | 95.73 .05 | 95.70 .25"
    " | -",
    "adams": "91.15 .11 | 93.95 .23 | 92.92 .11 | 74.44 .22 | 68.73 .27 | 95.75 .09 | 95.66 .09"
    " | 68.82 .22",
    "adamsrt": "91.81 .20 | 94.92 .05 | 93.75 .06 | 75.28 .35 | 71.45 .13 | 95.84 .07 | 95.82 .05"
    " | 68.93 .19",
}

# For each cell in the order of CELLS: b2, and the weight decay in units of 1e-6.
_SETTINGS: dict[Optimizer, str] = {
    "adam": ".99 500 | .999 7.8125 | .999 31.25 | .999 125 | .99 62.5 | .999 0 | .99 0"
    " | .99 7.8125",
    "adamw": ".99 10000 | .99 62.5 | .999 250 | .99 125 | .99 15.625 | .999 7.8125 | .99 31.25 | -",
    "adams": ".99 500 | .99 15.625 | .999 31.25 | .99 125 | .99 62.5 | .99 31.25 | .99 7.8125"
    " | .99 15.625",
    "adamsrt": ".99 7.8125 | .99 7.8125 | .999 15.625 | .999 0 | .99 7.8125 | .999 7.8125"
    " | .999 250 | .999 7.8125",
    "sgd": "0 250 | 0 250 | 0 250 | 0 500 | 0 500 | 0 500 | 0 500 | 0 62.5",
    "sgdmrt": "0 31.25 | 0 250 | 0 62.5 | 0 500 | 0 125 | 0 500 | 0 31.25 | 0 62.5",
    "adamg": ".99 500 | .99 500 | .999 500 | .99 500 | .99 500 | .99 500 | .99 500 | -",
}

LEARNING_RATES: dict[Optimizer, float] = {
    "sgd": 0.1,
    "sgdmrt": 0.1,
    "adamg": 1e-2,
    "adam": 1e-3,
    "adamw": 1e-3,
    "adams": 1e-3,
    "adamsrt": 1e-3,
}
B1 = 0.9

# The grid from which the weight decays above seem to come.
DECAY_GRID: tuple[float, ...] = (0.0, *(5e-4 / 2**k for k in range(6, -1, -1)))


def _cells(row: str) -> dict[tuple[Source, Model], tuple[float, float]]:
    pairs = zip(CELLS, row.split(" | "), strict=True)
    split = {cell: text.split() for cell, text in pairs if text != "-"}
    return {cell: (float(first), float(second)) for cell, (first, second) in split.items()}


RESULTS: dict[Optimizer, dict[tuple[Source, Model], Accuracy]] = {
    name: {cell: Accuracy(*pair) for cell, pair in _cells(row).items()}
    for name, row in _RESULTS.items()
}
HYPERPARAMETERS: dict[Optimizer, dict[tuple[Source, Model], Hyperparameters]] = {
    name: {
        cell: Hyperparameters(LEARNING_RATES[name], round(decay * 1e-6, 12), B1, b2)
        for cell, (b2, decay) in _cells(row).items()
    }
    for name, row in _SETTINGS.items()
}
