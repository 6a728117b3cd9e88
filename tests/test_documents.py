"""The examples in the README and the guides run in order, and print what they say.

And the oldest versions that are tested are those that pyproject.toml states.
"""

import contextlib
import io
import pathlib
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def blocks(name):
    """The programs of a document, each with the text block that follows it, if any."""
    found = re.findall(r"```(\w+)\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)
    for (language, text), (after, output) in zip(found, [*found[1:], ("", "")], strict=True):
        if language == "python":
            yield text, output if after == "text" else None


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("README.md", [True, False, True]),
        ("docs/groups.md", [True, False]),
        ("docs/theory.md", [True, True, True, True]),
        ("docs/scaling.md", [True, True, False, True, True]),
    ],
)
def test_examples_run(name, shown):
    examples = list(blocks(name))
    assert [output is not None for _, output in examples] == shown
    namespace = {"__name__": "__main__"}
    for number, (program, output) in enumerate(examples, start=1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(program, f"{name}, example {number}", "exec"), namespace)
        if output is not None:
            assert printed.getvalue() == output


def test_oldest_versions_are_the_least_that_are_admitted():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    admitted = [*project["dependencies"], *project["optional-dependencies"]["examples"]]
    least = {each.replace(">=", "==") for each in admitted if ">=" in each}
    pinned = (ROOT / "tests" / "oldest.txt").read_text().splitlines()
    assert least
    assert least <= set(pinned)
