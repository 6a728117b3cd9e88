"""The examples in the README and the guides run in order, and print what they say.

And the oldest versions that are tested are those that pyproject.toml states.
"""

import contextlib
import io
import pathlib
import re
import tomllib

import jax.numpy as jnp
import pytest

import spherical_optax as so
from spherical_optax.groups import radial_units

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
        ("docs/groups.md", [True, False, False]),
        (
            "docs/recipes.md",
            [
                False,
                True,
                True,
                True,
                True,
                False,
                False,
                False,
                False,
                False,
                True,
                False,
                False,
                False,
                False,
                False,
                False,
                False,
                True,
            ],
        ),
        ("docs/theory.md", [True, True, True, True]),
        ("docs/watch.md", [True, True]),
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


def table_codes(name):
    """The code in a document's tables: what stands between backticks, cell by cell."""
    rows = [line for line in (ROOT / name).read_text().splitlines() if line.startswith("|")]
    cells = re.findall(r"`([^`]*)`", "\n".join(rows))
    return [cell.replace(r"\|", "|") for cell in cells]


BLOCK = {
    "conv": {"bias": jnp.ones(4), "kernel": jnp.ones((3, 3, 2, 4))},
    "fc": {"bias": jnp.ones(4), "kernel": jnp.ones((3, 4))},
    "query": {"bias": jnp.ones((2, 3)), "kernel": jnp.ones((4, 2, 3))},
}


@pytest.mark.parametrize(("name", "count"), [("README.md", 7), ("docs/groups.md", 3)])
def test_rules_in_tables_make_groups_of_one_module_each(name, count):
    """On a model of two blocks, each rule alone."""
    rules = [code for code in table_codes(name) if code.startswith('r"')]
    assert len(rules) == count
    params, layers = {"block0": BLOCK, "block1": BLOCK}, list(BLOCK)
    for rule in rules:
        groups = so.groups_by_path(eval(f"{{{rule}}}", vars(so) | {"n": 2}))
        found = [{divmod(i, 2) for i in unit} for unit in radial_units(groups, params)]
        module = next(number for number, layer in enumerate(layers) if layer in rule)
        leaves = (0, 1) if "bias" in rule else (1,)
        assert found == [{(module + 3 * block, leaf) for leaf in leaves} for block in (0, 1)], rule


@pytest.mark.parametrize("name", ["README.md", "docs/groups.md"])
def test_groups_in_tables_can_be_written_so(name):
    written = [c for c in table_codes(name) if c.startswith(("per_", "RadialGroup("))]
    assert len(written) >= 4
    for code in written:
        assert isinstance(eval(code, vars(so) | {"n": 2, "heads": 2}), so.RadialGroup), code


def test_oldest_versions_are_the_least_that_are_admitted():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    admitted = [*project["dependencies"], *project["optional-dependencies"]["examples"]]
    least = {each.replace(">=", "==") for each in admitted if ">=" in each}
    pinned = (ROOT / "tests" / "oldest.txt").read_text().splitlines()
    assert least
    assert least <= set(pinned)
