"""Images for training and evaluation: the split, the augmentation, and batches by grain.

Random numbers depend only on the seed and on an image's place in the order. They do not depend on
the number of hosts, threads or restarts.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import grain
import numpy as np

from .readers import ArrayImages, Dataset, Example, Images

Augmentation: TypeAlias = Literal["none", "crop", "crop_flip", "resized_crop"]
Batch: TypeAlias = dict[str, np.ndarray]  # image uint8, label int32 and weight float32

PADDING = 4
AUGMENTATIONS: dict[str, Augmentation] = {
    "cifar10": "crop_flip",
    "cifar100": "crop_flip",
    "imagenet": "resized_crop",
}
MEANS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "svhn": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class Source:
    """A subset of the images, as a data source for grain."""

    def __init__(self, images: Images, indices: np.ndarray) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.images[int(self.indices[index])]


class Splits(NamedTuple):
    train: Source
    validation: Source
    test: Source


def split(
    dataset: Dataset,
    seed: int,
    validation: float,
    train_images: int | None,
    test_images: int | None,
) -> Splits:
    """Splits the training set at random into images for validation and images for training.

    If `validation` is 0, the test set is used for validation, as published for ImageNet.

    Args:
      dataset: The data set.
      seed: Seed of the split.
      validation: Part of the training set for validation.
      train_images: Number of training images to keep; `None`: all.
      test_images: Number of test images to keep; `None`: all.
    """
    order = np.random.default_rng(seed).permutation(len(dataset.train))
    held_out = round(validation * len(order))
    rest = order[held_out:]
    test = Source(dataset.test, np.arange(len(dataset.test))[:test_images])
    return Splits(
        Source(dataset.train, rest[:train_images]),
        Source(dataset.train, order[:held_out]) if held_out else test,
        test,
    )


def normalization(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel, of pixels from 0 to 1.

    They are the published ones where there are any. Other data sets of image files use those of
    ImageNet, other data sets in memory those of their training set.
    """
    if dataset.kind in MEANS or not isinstance(dataset.train, ArrayImages):
        mean, std = MEANS.get(dataset.kind, MEANS["imagenet"])
        return np.array(mean, np.float32), np.array(std, np.float32)
    # From counts of each pixel value: exact, and without a floating-point copy of the images.
    images = dataset.train.images
    counts = np.stack(
        [np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])]
    )
    share, value = counts / counts.sum(axis=1, keepdims=True), np.arange(256) / 255
    mean = share @ value
    std = np.sqrt(share @ value**2 - mean**2)
    return mean.astype(np.float32), np.maximum(std, 1e-6).astype(np.float32)


# Augmentation works on uint8 images. Padding is black before normalization, as in the published
# code.


def crop(images: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Crops each image at a random place from its padded version."""
    n, height, width, channels = images.shape
    shape = (n, height + 2 * PADDING, width + 2 * PADDING, channels)
    padded = np.zeros(shape, np.uint8)
    padded[:, PADDING:-PADDING, PADDING:-PADDING] = images
    top, left = (draws * (2 * PADDING + 1)).astype(int).T
    rows, columns = (start[:, None] + np.arange(n) for start, n in ((top, height), (left, width)))
    return padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def flip(images: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Mirrors each image with probability 1/2."""
    return np.where(draws[:, None, None, None] < 0.5, images[:, :, ::-1], images)


def resize(image: np.ndarray, size: int, box: tuple[float, ...]) -> np.ndarray:
    """Resizes a box (left, top, right, bottom) of an image to a square of the given size."""
    from PIL import Image

    pixels = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    scaled = np.asarray(pixels.resize((size, size), Image.Resampling.BILINEAR, box=box))
    return scaled.reshape(size, size, -1)


def resized_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Crops 8 to 100 % of the area at an aspect ratio of 3/4 to 4/3, and resizes the crop.

    If no crop fits in ten attempts, it takes the center crop.
    """
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            return resize(image, size, (left, top, left + w, top + h))
    return centre_crop(image, size)


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Scales the shorter side to 8/7 of the size (256 for 224), and crops the center."""
    height, width = image.shape[:2]
    side = min(height, width) * 7 / 8
    top, left = (height - side) / 2, (width - side) / 2
    return resize(image, size, (left, top, left + side, top + side))


class Loading(NamedTuple):
    """How images are loaded into batches."""

    size: int  # height and width; images of other sizes are cropped and resized
    host: int = 0
    hosts: int = 1
    threads: int = 2


def load(
    source: Source, indices: np.ndarray, rng: np.random.Generator, how: Augmentation, to: Loading
) -> Batch:
    """This host's images of a batch, augmented by random numbers of their place in the batch."""
    mine = np.arange(len(indices))[to.host :: to.hosts]
    draws = rng.random((len(indices), 4))[mine]
    images = []
    examples = [source[int(index)] for index in indices[mine]]
    for (image, _), draw in zip(examples, draws, strict=True):
        if how == "resized_crop":
            image = resized_crop(image, to.size, np.random.default_rng(int(draw[3] * 2**53)))
        elif image.shape[:2] != (to.size, to.size):
            image = centre_crop(image, to.size)
        images.append(image)
    stacked = np.stack(images)
    if how in ("crop", "crop_flip"):
        stacked = crop(stacked, draws[:, :2])
    if how in ("crop_flip", "resized_crop"):
        stacked = flip(stacked, draws[:, 2])
    labels = np.array([label for _, label in examples], np.int32)
    return {"image": stacked, "label": labels, "weight": np.ones(len(labels), np.float32)}


def in_batches(indices: Any, batch_size: int, load: Callable[..., Batch], to: Loading) -> Any:
    # Batches the indices first: grain's cost per element is larger than that of loading an image.
    dataset = indices.batch(batch_size).random_map(load)
    options = grain.ReadOptions(num_threads=to.threads, prefetch_buffer_size=2 * to.threads)
    return iter(dataset.to_iter_dataset(options))


def training_batches(
    source: Source, batch_size: int, epochs: int, seed: int, how: Augmentation, to: Loading
) -> grain.DatasetIterator:
    """This host's part of each batch, over all epochs; incomplete batches are dropped."""
    order: Any = grain.MapDataset.range(len(source)).seed(seed).shuffle()
    order = order[: len(source) // batch_size * batch_size].repeat(epochs)
    return in_batches(
        order, batch_size, lambda indices, rng: load(source, indices, rng, how, to), to
    )


def evaluation_batches(
    source: Source, batch_size: int, seed: int, how: Augmentation, to: Loading
) -> grain.DatasetIterator:
    """This host's part of each batch, in order; the last is padded with images of weight 0."""
    n = len(source)

    def fill(indices: np.ndarray, rng: np.random.Generator) -> Batch:
        batch = load(source, np.minimum(indices, n - 1), rng, how, to)
        there = indices[to.host :: to.hosts] < n
        return batch | {"weight": there.astype(np.float32)}

    places: Any = grain.MapDataset.range(math.ceil(n / batch_size) * batch_size).seed(seed)
    return in_batches(places, batch_size, fill, to)
