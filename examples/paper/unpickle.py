"""Reads a pickle of byte arrays, lists and dictionaries without executing code from it.

A pickle names functions to call. This reader refuses every name except those that a NumPy array
needs. It maps these to the functions below, which check their arguments. Nothing else is called.
"""

import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import DataError


class _Dtype:
    """Replaces numpy.dtype; accepts only uint8."""

    def __init__(self, name: Any, *_: Any) -> None:
        if name not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array of dtype {name!r}")

    def __setstate__(self, state: Any) -> None:
        del state  # byte order and fields, which uint8 does not have


class _Array:
    """Replaces an array until its content is read."""

    value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("an array of something else than bytes")
        if not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) != len(data):
            raise pickle.UnpicklingError(f"an array of shape {shape} with {len(data)} bytes")
        order = "F" if fortran else "C"
        self.value = np.frombuffer(data, np.uint8).reshape(shape, order=order)


class _Name:
    """Replaces a function named in the pickle; it can be called, but not modified."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("the state of a function")


def _ndarray(*_: Any) -> None:
    """Replaces numpy.ndarray, which a valid pickle names but does not call."""
    raise pickle.UnpicklingError("an array of another form")


_NDARRAY = _Name(_ndarray)


def _reconstruct(kind: Any, *_: Any) -> _Array:
    if kind is not _NDARRAY:
        raise pickle.UnpicklingError("an array of another class")
    return _Array()


def _encode(text: Any, encoding: Any) -> bytes:
    """Replaces codecs.encode, which Python 3 uses to write bytes in old protocols."""
    if type(text) is not str or encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"text in {encoding!r}")
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], _Name] = {
    ("numpy.core.multiarray", "_reconstruct"): _Name(_reconstruct),
    ("numpy._core.multiarray", "_reconstruct"): _Name(_reconstruct),
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Name(_Dtype),
    ("_codecs", "encode"): _Name(_encode),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"the name {module}.{name}")
        return _ADMITTED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("a reference to something outside")


def loads(data: bytes, where: Any) -> Any:
    """The content of the pickle. Arrays may only be values of the outermost dictionary."""
    try:
        # Strings are read as bytes: CIFAR was written by Python 2, whose strings are bytes.
        content = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise errors of any type
        raise DataError(
            where,
            "a pickle of byte arrays, lists and dictionaries",
            f"{error}" or type(error).__name__,
        ) from error
    if isinstance(content, dict):
        return {k: v.value if isinstance(v, _Array) else v for k, v in content.items()}
    return content
