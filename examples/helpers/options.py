"""Validation of the programs' command-line options."""

import pathlib
import sys
from typing import Any


def check_options(*options: tuple[str, Any, str, bool]) -> None:
    """Exits with a message if an option is invalid.

    Args:
      *options: Tuples of name, value, description of valid values, and whether the value is valid.
    """
    program = pathlib.Path(sys.argv[0]).name
    for name, value, expected, valid in options:
        if not valid:
            raise SystemExit(f"{program}: {name}: expected {expected}, found {value}")
