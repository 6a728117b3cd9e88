"""Keeps the results of runs in a file, so that a stopped program can resume."""

import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any


class Runs:
    """The results of finished runs by key, stored in `runs.jsonl`; missing runs are computed.

    `fixed` holds the settings that all runs share, stored in `settings.json`. If they differ from
    the settings of the stored runs, the program exits with a message.
    """

    def __init__(self, out: pathlib.Path, **fixed: Any) -> None:
        self.path = out / "runs.jsonl"
        self.results: dict[tuple[Any, ...], Any] = {}
        _same(out, json.loads(json.dumps(fixed)))
        if self.path.exists():
            # An incomplete last line means that the program was killed while writing it.
            whole, _, rest = self.path.read_text().rpartition("\n")
            if rest:
                self.path.write_text(f"{whole}\n" if whole else "")
            for line in whole.splitlines():
                *key, result = json.loads(line)
                self.results[tuple(key)] = result

    def __call__(self, key: tuple[Any, ...], run: Callable[[], Any]) -> Any:
        """The result of a key, a number or a list of numbers: stored, or computed by `run`."""
        if key not in self.results:
            self.results[key] = run()
            with self.path.open("a") as file:
                file.write(json.dumps([*key, self.results[key]]) + "\n")
        return self.results[key]


def _same(out: pathlib.Path, fixed: dict[str, Any]) -> None:
    path = out / "settings.json"
    if not path.exists():
        path.write_text(json.dumps(fixed) + "\n")
        return
    before = json.loads(path.read_text())
    for name, found in fixed.items():
        if before.get(name) != found:
            raise SystemExit(
                f"{pathlib.Path(sys.argv[0]).name}: --{name.replace('_', '-')}: expected "
                f"{before.get(name)}, as of the runs in {out}, found {found}; take another --out."
            )
