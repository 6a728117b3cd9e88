"""The examples in the README and the guides run, and print what they say."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def blocks(name):
    """The programs of a document, each with the text block that follows it, if any."""
    found = re.findall(r"```(\w+)\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)
    for (language, text), (after, output) in zip(found, [*found[1:], ("", "")], strict=True):
        if language == "python":
            yield text, output if after == "text" else None


EXAMPLES = [
    (name, number, *block)
    for name in ("README.md", "docs/groups.md")
    for number, block in enumerate(blocks(name), start=1)
]


@pytest.mark.parametrize(
    ("name", "number", "program", "output"), EXAMPLES, ids=[f"{e[0]}-{e[1]}" for e in EXAMPLES]
)
def test_example_runs(name, number, program, output, capsys):
    exec(compile(program, f"{name}, example {number}", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert printed == output if output is not None else True


def test_no_example_is_missed():
    assert [(name, output is not None) for name, _, _, output in EXAMPLES] == [
        ("README.md", True),
        ("README.md", False),
        ("README.md", True),
        ("docs/groups.md", True),
        ("docs/groups.md", False),
    ]
