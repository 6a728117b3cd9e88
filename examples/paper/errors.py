"""One-line errors for invalid files and options."""

from typing import Any


class DataError(Exception):
    """An invalid file: where, what was expected there, and what was found."""

    def __init__(self, where: Any, expected: str, found: str) -> None:
        # Only text, so that the error can be pickled between threads and processes.
        super().__init__(" ".join(f"{where}: expected {expected}, found {found}".split()))


def stop(name: str, expected: str, found: Any) -> SystemExit:
    return SystemExit(f"examples.paper: {name}: expected {expected}, found {found}")
