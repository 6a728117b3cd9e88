"""Checks `--out` before the work starts, and prints tables. Used by examples and benchmarks."""

import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import NoReturn


def check_out(out: pathlib.Path, *names: str) -> None:
    """Creates the directory, and exits with a message if a file in it cannot be written.

    Existing files are not changed.

    Args:
      out: The directory.
      *names: Names of the files that the program will write.
    """
    files, at = [out / name for name in names], out
    try:
        for at in (*reversed(out.parents), out):
            if at.exists() and not at.is_dir():
                stop(at, "a directory", "a file")
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
        for at in files:
            if at.exists():
                if not at.is_file():
                    stop(at, "a file or nothing", "a directory")
                at.open("r+b").close()
    except OSError as error:
        stop(at, "a place to write to", error.strerror or str(error))


def stop(path: pathlib.Path, expected: str, found: str) -> NoReturn:
    program = pathlib.Path(sys.argv[0]).name
    raise SystemExit(f"{program}: --out: {path}: expected {expected}, found {found}")


def print_rows(*rows: Sequence[str]) -> None:
    """Prints a header and rows: first column left-aligned, the other columns right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        aligned = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        print("  ".join([first.ljust(widths[0]), *aligned]))
