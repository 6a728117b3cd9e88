"""Options of the programs."""

import pathlib
import sys
from typing import Any


def check_options(*options: tuple[str, Any, str, bool]) -> None:
    """Exits with a message if an option is not valid.

    Each option is its name, its value, what is expected, and whether the value is that.
    """
    program = pathlib.Path(sys.argv[0]).name
    for name, value, expected, valid in options:
        if not valid:
            raise SystemExit(f"{program}: {name}: expected {expected}, found {value}")
