"""Results of runs in a file: a program that was stopped goes on after the last one."""

import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any


class Runs:
    """Finished runs by their key, in `runs.jsonl`; others are made when they are asked for.

    `fixed` is what all of them have in common. It is kept in `settings.json`: where it differs
    from that of the runs that are there, the program exits with a message.
    """

    def __init__(self, out: pathlib.Path, **fixed: Any) -> None:
        self.path = out / "runs.jsonl"
        self.results: dict[tuple[Any, ...], Any] = {}
        _same(out, json.loads(json.dumps(fixed)))
        if self.path.exists():
            # What stands after the last line's end was cut off when the program was killed.
            whole, _, rest = self.path.read_text().rpartition("\n")
            if rest:
                self.path.write_text(f"{whole}\n" if whole else "")
            for line in whole.splitlines():
                *key, result = json.loads(line)
                self.results[tuple(key)] = result

    def __call__(self, key: tuple[Any, ...], run: Callable[[], Any]) -> Any:
        """The result of that key, a number or a list of numbers, from the file or from `run`."""
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
