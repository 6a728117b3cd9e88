"""Reads data sets from local files as uint8 images and integer labels.

The kind of a data set is recognized by its files:

| kind | files |
| --- | --- |
| CIFAR10, CIFAR100 | python version (`data_batch_1`, ...; `train`) or binary (`.bin`) |
| SVHN | `train_32x32.mat`, `test_32x32.mat` |
| MNIST, Fashion-MNIST, others | IDX, `train-images-idx3-ubyte` and so on, gzipped or not |
| class folders | `train/CLASS/*.jpeg`, `val/CLASS/*.jpeg` (or `test`); ImageNet if 1000 classes |
| ArrayRecord | `*train.array_record*`, `*validation.array_record*`, `label.labels.txt` |

An invalid file raises a `DataError` with its path, what was expected and what was found.
"""

import gzip
import io
import pathlib
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from . import records, unpickle
from .errors import DataError

Example = tuple[np.ndarray, int]  # uint8 (height, width, channels), and a label


class Images(Protocol):
    """A sequence of images with labels; the images may differ in size."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class Dataset(NamedTuple):
    kind: str  # "cifar10", "cifar100", "svhn", "imagenet", "mnist", "fashion-mnist" or "other"
    train: Images
    test: Images
    classes: int
    shape: tuple[int, int, int] | None  # of every image; None: sizes may differ


class Arrays(NamedTuple):
    """Images in memory, (n, height, width, channels)."""

    images: np.ndarray
    labels: np.ndarray


class ArrayImages:
    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return self.images[index], int(self.labels[index])


class FolderImages:
    """Image files, decoded on access."""

    def __init__(self, files: list[tuple[pathlib.Path, int]]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        path, label = self.files[index]
        return decode(path.read_bytes(), path), label


def decode(data: bytes, where: Any) -> np.ndarray:
    """Decodes the bytes of an image file to RGB."""
    from PIL import Image  # not needed for other kinds of data sets

    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(where, "an image", str(error)) from error


def read(path: pathlib.Path) -> Dataset:
    """Reads the data set in a folder."""
    if not path.is_dir():
        raise DataError(path, "a folder", "a file" if path.exists() else "nothing")
    for reader, recognizes in READERS:
        if recognizes(path):
            return reader(path)
    found = ", ".join(sorted(each.name for each in path.iterdir())[:5]) or "nothing"
    raise DataError(
        path, "CIFAR, SVHN, IDX, ArrayRecord files or folders train and val of class folders", found
    )


def in_memory(
    kind: str,
    classes: int,
    train: list[tuple[pathlib.Path, Arrays]],
    test: tuple[pathlib.Path, Arrays],
) -> Dataset:
    """Makes a data set from the arrays of its files, and checks labels and shapes."""
    shape = train[0][1].images.shape[1:]
    for path, (images, labels) in (*train, test):
        if len(images) == 0:
            raise DataError(path, "at least one image", "none")
        if images.shape[1:] != shape:
            raise DataError(path, f"images of shape {shape}", f"{images.shape[1:]}")
        if len(images) != len(labels):
            raise DataError(path, f"{len(images)} labels, one for each image", f"{len(labels)}")
        if labels.min() < 0 or labels.max() >= classes:
            wrong = labels[(labels < 0) | (labels >= classes)][0]
            raise DataError(path, f"labels from 0 to {classes - 1}", f"{wrong}")
    images, labels = (
        np.concatenate(parts) for parts in zip(*(each for _, each in train), strict=True)
    )
    return Dataset(kind, ArrayImages(images, labels), ArrayImages(*test[1]), classes, tuple(shape))


def load_bytes(path: pathlib.Path) -> bytes:
    """The content of a file, decompressed if it is gzipped."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except FileNotFoundError as error:
        raise DataError(path, "a file", "nothing") from error
    except IsADirectoryError as error:
        raise DataError(path, "a file", "a folder") from error
    except (OSError, EOFError, zlib.error) as error:
        expected = "a whole gzip file" if path.suffix == ".gz" else "a readable file"
        raise DataError(path, expected, str(error)) from error


# CIFAR: an image is a row of 3072 bytes, one channel after the other.


def cifar_images(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def read_cifar_python(path: pathlib.Path, *, fine: bool) -> Arrays:
    """Reads a file of the Python version. It is a pickle; nothing in it is executed."""
    content = unpickle.loads(load_bytes(path), path)
    name = b"fine_labels" if fine else b"labels"
    if not isinstance(content, dict) or not {b"data", name} <= content.keys():
        keys = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise DataError(path, f"a dictionary with b'data' and {name!r}", f"{keys}")
    rows, labels = content[b"data"], content[name]
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8:
        found = rows.dtype if isinstance(rows, np.ndarray) else type(rows).__name__
        raise DataError(path, "data of dtype uint8", f"{found}")
    if rows.ndim != 2 or rows.shape[1] != 3072:
        raise DataError(path, "data of shape (images, 3072)", f"{rows.shape}")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(path, "labels that are a list of integers", f"{type(labels).__name__}")
    if any(not 0 <= label < 2**31 for label in labels):
        raise DataError(path, "labels of at least 0", f"{labels}"[:40])
    return Arrays(cifar_images(rows), np.array(labels, np.int32))


def read_cifar_binary(path: pathlib.Path, *, fine: bool) -> Arrays:
    """Reads a file of the binary version.

    An image is a label byte followed by its pixels. CIFAR100 has a coarse and a fine label byte.
    """
    data = load_bytes(path)
    start = 2 if fine else 1
    if len(data) == 0 or len(data) % (start + 3072):
        raise DataError(path, f"a multiple of {start + 3072} bytes", f"{len(data)}")
    rows = np.frombuffer(data, np.uint8).reshape(-1, start + 3072)
    return Arrays(cifar_images(rows[:, start:]), rows[:, start - 1].astype(np.int32))


def read_cifar(path: pathlib.Path) -> Dataset:
    fine, binary = not has(path, "data_batch_*", "test_batch*"), has(path, "*.bin")
    reader, suffix = (read_cifar_binary, ".bin") if binary else (read_cifar_python, "")
    train = ["train"] if fine else [f"data_batch_{i}" for i in range(1, 6)]
    *train_files, test_file = (
        (file, reader(file, fine=fine))
        for file in (
            path / f"{name}{suffix}" for name in (*train, "test" if fine else "test_batch")
        )
    )
    classes = 100 if fine else 10
    return in_memory(f"cifar{classes}", classes, train_files, test_file)


# SVHN: the last axis counts the images; the digit 0 has label 10.


def read_mat(path: pathlib.Path) -> Arrays:
    import scipy.io  # not needed for other kinds of data sets

    data = load_bytes(path)
    try:
        names = [name for name, *_ in scipy.io.whosmat(io.BytesIO(data))]
        content = scipy.io.loadmat(io.BytesIO(data), variable_names=["X", "y"])
    except Exception as error:  # on damaged files scipy raises errors of any type
        raise DataError(path, "a whole MATLAB file", f"{error}" or type(error).__name__) from error
    if not {"X", "y"} <= content.keys():
        raise DataError(path, "the variables X and y", f"{names}")
    x, y = content["X"], content["y"]
    if x.dtype != np.uint8:
        raise DataError(path, "X of dtype uint8", f"{x.dtype}")
    if x.ndim != 4 or x.shape[:3] != (32, 32, 3):
        raise DataError(path, "X of shape (32, 32, 3, images)", f"{x.shape}")
    if y.dtype.kind not in "iu" or y.size != y.shape[0]:
        raise DataError(path, "y of integers in one column", f"{y.dtype} of shape {y.shape}")
    labels = y.ravel().astype(np.int32)
    if labels.size and not 1 <= labels.min() <= labels.max() <= 10:
        wrong = labels[(labels < 1) | (labels > 10)][0]
        raise DataError(path, "labels from 1 to 10", f"{wrong}")
    return Arrays(np.ascontiguousarray(x.transpose(3, 0, 1, 2)), labels % 10)


def read_svhn(path: pathlib.Path) -> Dataset:
    train, test = (
        (file, read_mat(file)) for file in (path / "train_32x32.mat", path / "test_32x32.mat")
    )
    return in_memory("svhn", 10, [train], test)


# IDX: two zero bytes, 8 (the type code of bytes), the number of axes, the length of each axis, and
# the entries.

# MNIST and Fashion-MNIST have files of the same names. Their first labels tell them apart.
FIRST_LABELS = {
    "mnist": [5, 0, 4, 1, 9, 2, 1, 3, 1, 4],
    "fashion-mnist": [9, 0, 0, 3, 0, 2, 7, 2, 5, 5],
}


def read_idx(path: pathlib.Path, axes: int) -> np.ndarray:
    data = load_bytes(path)
    start = 4 + 4 * axes
    magic = bytes([0, 0, 8, axes])
    if data[:4] != magic:
        raise DataError(
            path, f"an IDX file of bytes with {axes} axes, {magic.hex()}", f"{data[:4].hex()}"
        )
    shape = tuple(np.frombuffer(data[:start].ljust(start, b"\0"), ">u4", offset=4).tolist())
    size = start + int(np.prod([int(n) for n in shape], dtype=object))
    if len(data) != size:
        raise DataError(path, f"{size} bytes for shape {shape}", f"{len(data)}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def idx_file(path: pathlib.Path, start: str, axes: int) -> pathlib.Path:
    names = [f"{start}{dot}idx{axes}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
    return next((path / name for name in names if (path / name).exists()), path / names[0])


def read_mnist(path: pathlib.Path) -> Dataset:
    parts = []
    for name in ("train", "t10k"):
        file = idx_file(path, f"{name}-images", 3)
        images, labels = read_idx(file, 3), read_idx(idx_file(path, f"{name}-labels", 1), 1)
        parts.append((file, Arrays(images[..., None], labels.astype(np.int32))))
    first = parts[0][1].labels[:10].tolist()
    kind = next((kind for kind, labels in FIRST_LABELS.items() if labels == first), "other")
    return in_memory(kind, 10, parts[:1], parts[1])


# Class folders.

ENDINGS = (".jpeg", ".jpg", ".png")


def read_folders(path: pathlib.Path) -> Dataset:
    tests = [path / name for name in ("val", "validation", "test")]
    test = next((each for each in tests if each.is_dir()), None)
    if test is None:
        raise DataError(path, "a folder val or test beside train", "none")
    parts: list[FolderImages] = []
    classes: list[str] = []
    for root in (path / "train", test):
        names = sorted(each.name for each in root.iterdir() if each.is_dir())
        classes = classes or names
        if not names:
            raise DataError(root, "a folder for each class", "none")
        if names != classes:
            differ = sorted(set(names) ^ set(classes))
            raise DataError(root, "the class folders of train", f"others: {', '.join(differ[:5])}")
        files = []
        for label, name in enumerate(names):
            found = sorted(p for p in (root / name).iterdir() if p.suffix.lower() in ENDINGS)
            if not found:
                raise DataError(root / name, f"at least one image ({', '.join(ENDINGS)})", "none")
            files += [(file, label) for file in found]
        parts.append(FolderImages(files))
    kind = "imagenet" if len(classes) == 1000 else "other"
    return Dataset(kind, *parts, len(classes), None)


# ArrayRecord files written by TensorFlow Datasets.


class RecordImages:
    """Encoded images in ArrayRecord files, decoded on access."""

    def __init__(self, files: list[pathlib.Path], classes: int) -> None:
        self.source, self.classes = records.open_files(files), classes
        self.where = files[0].parent

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        where = f"{self.where}: record {index}"
        data, label = records.image_and_label(self.source[index], where)
        if not 0 <= label < self.classes:
            raise DataError(where, f"a label from 0 to {self.classes - 1}", f"{label}")
        return decode(data, where), label


def read_records(path: pathlib.Path) -> Dataset:
    names = path / "label.labels.txt"
    try:
        classes = len(names.read_text().split("\n")) - names.read_text().endswith("\n")
    except OSError as error:
        raise DataError(names, "a file with a line for each class", error.strerror) from error
    parts = []
    for split in (("train",), ("validation", "val", "test")):
        found = [sorted(path.glob(f"*{name}.array_record*")) for name in split]
        files = next((each for each in found if each), None)
        if files is None:
            raise DataError(path, f"files *{split[0]}.array_record*", "none")
        parts.append(RecordImages(files, classes))
    return Dataset("imagenet" if classes == 1000 else "other", *parts, classes, None)


READERS: tuple[tuple[Callable[[pathlib.Path], Dataset], Callable[[pathlib.Path], bool]], ...] = (
    (read_cifar, lambda path: has(path, "data_batch_*", "test_batch*", "train.bin", "test.bin")),
    (read_cifar, lambda path: (path / "train").is_file()),
    (read_svhn, lambda path: has(path, "*_32x32.mat")),
    (read_mnist, lambda path: has(path, "*ubyte*")),
    (read_records, lambda path: has(path, "*.array_record*")),
    (read_folders, lambda path: (path / "train").is_dir()),
)


def has(path: pathlib.Path, *patterns: str) -> bool:
    return any(True for pattern in patterns for _ in path.glob(pattern))
