"""The README's examples run, and print what it says."""

import pathlib
import re

import pytest

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
PROGRAMS = [text for language, text in BLOCKS if language == "python"]
OUTPUTS = [text for language, text in BLOCKS if language == "text"]


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_example_runs(number, capsys):
    namespace = {"__name__": "__main__"}
    exec(compile(PROGRAMS[number], f"README.md, example {number + 1}", "exec"), namespace)
    assert namespace["loss"] > 0
    printed = capsys.readouterr().out
    assert printed == (OUTPUTS[0] if number == 0 else "")


def test_there_are_examples():
    assert len(PROGRAMS) == 2
