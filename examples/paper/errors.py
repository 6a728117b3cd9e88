"""What is wrong with a file or an option, in one line."""

from typing import Any


class DataError(Exception):
    """Where, what was expected there, and what was found."""

    def __init__(self, where: Any, expected: str, found: str) -> None:
        # The text alone, so that it survives a thread's or a process's pickling.
        super().__init__(" ".join(f"{where}: expected {expected}, found {found}".split()))


def stop(name: str, expected: str, found: Any) -> SystemExit:
    return SystemExit(f"examples.paper: {name}: expected {expected}, found {found}")
