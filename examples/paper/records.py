"""Reads ArrayRecord files: the image and the label of each `tf.train.Example`.

An `Example` is a protocol buffer, which is parsed here without TensorFlow. It holds features: a map
from names to lists of bytes, floats or integers.

    Example { Features features = 1 }      Features { map<string, Feature> feature = 1 }
    Feature { BytesList = 1 | FloatList = 2 | Int64List = 3 }     *List { repeated value = 1 }
"""

import pathlib
from collections.abc import Iterator
from typing import Any

from .errors import DataError

NUMBER, BYTES = 0, 2  # wire types of variable size: varint, and length-delimited
SIZES = {1: 8, 5: 4}  # wire types of fixed size, in bytes


def open_files(files: list[pathlib.Path]) -> Any:
    """Opens the files as one sequence of records."""
    try:
        from array_record.python.array_record_data_source import ArrayRecordDataSource
    except ImportError as error:
        raise DataError(
            files[0], "the package array_record to read it", "none installed"
        ) from error
    for file in files:
        if file.stat().st_size == 0:
            raise DataError(file, "an ArrayRecord file", "an empty one")
    try:
        source = ArrayRecordDataSource([str(file) for file in files])
        if len(source) == 0:
            raise DataError(files[0], "at least one record", "none")
    except (RuntimeError, ValueError) as error:
        raise DataError(files[0], "a whole ArrayRecord file", f"{error}") from error
    return source


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Reads the number at a position, seven bits per byte; returns it and the end position."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message, each as its field number and its value (a number or bytes)."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        kind = key & 7
        if kind == NUMBER:
            value, at = varint(data, at)
        elif kind in (*SIZES, BYTES):
            length, at = (SIZES[kind], at) if kind in SIZES else varint(data, at)
            value, at = data[at : at + length], at + length
            if len(value) != length:
                raise ValueError("a field that is cut off")
        else:
            raise ValueError(f"a field of kind {kind}")
        yield key >> 3, value


def only(data: bytes, number: int) -> Iterator[Any]:
    return (value for found, value in fields(data) if found == number)


def features(example: bytes) -> dict[str, list[Any]]:
    """The features by name: lists of bytes or of integers. Lists of floats are left out."""
    found: dict[str, list[Any]] = {}
    for message in only(example, 1):
        for entry in only(message, 1):
            pair = dict(fields(entry))
            for kind, values in fields(pair.get(2, b"")):
                if kind == 1:
                    found[pair[1].decode()] = list(only(values, 1))
                elif kind == 3:
                    found[pair[1].decode()] = list(integers(values))
    return found


def integers(values: bytes) -> Iterator[int]:
    """Yields integers that are stored one per field or packed into one field."""
    for value in only(values, 1):
        if isinstance(value, int):
            yield signed(value)
            continue
        at = 0
        while at < len(value):
            number, at = varint(value, at)
            yield signed(number)


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def image_and_label(record: bytes, where: Any) -> tuple[bytes, int]:
    """The features `image` (an encoded image) and `label` of a record."""
    try:
        found = features(record)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise DataError(where, "a tf.train.Example", f"{error}") from error
    image, label = found.get("image", []), found.get("label", [])
    if (
        len(image) != 1
        or len(label) != 1
        or not isinstance(image[0], bytes)
        or not isinstance(label[0], int)
    ):
        raise DataError(where, "one image and one label", f"features {sorted(found)}")
    return image[0], label[0]
