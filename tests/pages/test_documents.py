"""The programs in the README and the guides run in order, and print the output shown.

The oldest versions that are tested are also checked: they are those of pyproject.toml.
"""

import ast
import builtins
import contextlib
import io
import itertools
import pathlib
import re
import tomllib

import jax.numpy as jnp
import pytest

import spherical_optax as so
from spherical_optax.groups import joints_of

ROOT = pathlib.Path(__file__).parents[2]


def blocks(name):
    """The programs of a document, each with the text block right after it, or `None`."""
    found = re.findall(r"```(\w+)\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)
    for (language, text), (after, output) in itertools.pairwise([*found, ("", "")]):
        if language == "python":
            yield text, output if after == "text" else None


SHOWN = {  # the number of programs in a document, and the indices of those with output shown
    "README.md": (1, {0}),
    "docs/built.md": (3, {1, 2}),
    "docs/coming_from_adam.md": (1, {0}),
    "docs/decay.md": (1, {}),
    "docs/fine_tuning.md": (5, {1, 2, 3, 4}),
    "docs/frameworks.md": (6, {1}),
    "docs/groups.md": (3, {0}),
    "docs/index.md": (1, {0}),
    "docs/plasticity.md": (1, {}),
    "docs/recipes.md": (22, {1, 2, 3, 5, 6, 12, 21}),
    "docs/scaling.md": (6, {0, 1, 4, 5}),
    "docs/theory.md": (4, {0, 1, 2, 3}),
    "docs/watch.md": (2, {0, 1}),
    "docs/which.md": (2, {1}),
    "docs/weights.md": (5, {0, 1, 2, 3, 4}),
}
NEEDS = {"docs/frameworks.md": ("haiku", "keras")}  # installed by `make docs`


def test_all_documents_with_programs_are_known():
    found = ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
    assert {name for name in found if list(blocks(name))} == set(SHOWN)


@pytest.mark.slow  # also run by `make docs`
@pytest.mark.parametrize("name", SHOWN)
def test_examples_run(name, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package)
    examples, (count, shown) = list(blocks(name)), SHOWN[name]
    assert len(examples) == count
    assert {i for i, (_, output) in enumerate(examples) if output is not None} == set(shown)
    namespace = {"__name__": "__main__"}
    for number, (program, output) in enumerate(examples, start=1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(program, f"{name}, example {number}", "exec"), namespace)
        if output is not None:
            assert printed.getvalue() == output


def names_from_before(program):
    """The names that a program uses but does not define."""
    known, used = set(dir(builtins)), set()
    for node in ast.walk(ast.parse(program)):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                used.add(name)
            case ast.Name(id=name) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                known.add(name)
            case ast.arg(arg=name) | ast.ExceptHandler(name=name):
                known.add(name)
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                known |= {(each.asname or each.name).partition(".")[0] for each in names}
    return used - known


@pytest.mark.parametrize("name", SHOWN)
def test_programs_run_alone_or_say_that_they_go_on(name):
    for number, (program, _) in enumerate(blocks(name)):
        goes_on = program.startswith("# Goes on from the programs above.\n")
        assert goes_on == bool(names_from_before(program)), f"{name}, program {number}"


def test_every_program_is_listed_and_explains_itself():
    programs = [ROOT / "examples" / "paper" / "__main__.py"]
    for folder in ("examples", "benchmarks"):
        programs += [p for p in (ROOT / folder).glob("*.py") if "__main__" in p.read_text()]
    listed = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    for path in programs:
        called = path.relative_to(ROOT).as_posix()
        name = {"examples/paper/__main__.py": "python -m examples.paper"}.get(called, called)
        assert name in listed, name
        text = re.sub(r",?\s+\)", ")", path.read_text())
        # device.py runs without tyro.
        assert "tyro.cli(" in text or called == "benchmarks/device.py", name
        assert "description=__doc__)" in text, name  # --help shows the docstring


def table_codes(name):
    """The text between backticks in a document's tables."""
    rows = [line for line in (ROOT / name).read_text().splitlines() if line.startswith("|")]
    cells = re.findall(r"`([^`]*)`", "\n".join(rows))
    return [cell.replace(r"\|", "|") for cell in cells]


BLOCK = {
    "conv": {"bias": jnp.ones(4), "kernel": jnp.ones((3, 3, 2, 4))},
    "fc": {"bias": jnp.ones(4), "kernel": jnp.ones((3, 4))},
    "query": {"bias": jnp.ones((2, 3)), "kernel": jnp.ones((4, 2, 3))},
}


@pytest.mark.parametrize(("name", "count"), [("docs/groups.md", 4)])
def test_rules_in_tables_make_groups_of_one_module_each(name, count):
    """Each rule alone makes one group unit per module, on a model of two blocks."""
    rules = [code for code in table_codes(name) if code.startswith('r"')]
    assert len(rules) == count
    params, layers = {"block0": BLOCK, "block1": BLOCK}, list(BLOCK)
    for rule in rules:
        groups = so.groups_by_path(eval(f"{{{rule}}}", vars(so) | {"n": 2}))
        found = [{divmod(i, 2) for i in unit} for unit in joints_of(groups, params)]
        module = next(number for number, layer in enumerate(layers) if layer in rule)
        leaves = (0, 1) if "bias" in rule else (1,)
        assert found == [{(module + 3 * block, leaf) for leaf in leaves} for block in (0, 1)], rule


@pytest.mark.parametrize("name", ["docs/groups.md"])
def test_groups_in_tables_can_be_written_so(name):
    written = [c for c in table_codes(name) if c.startswith(("per_", "RadialGroup("))]
    assert len(written) >= 4
    for code in written:
        assert isinstance(eval(code, vars(so) | {"n": 2, "heads": 2}), so.RadialGroup), code


def test_reference_has_every_public_name():
    text = "\n".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    found = re.findall(r"^::: spherical_optax\.(\w+)$", text, flags=re.MULTILINE)
    assert len(found) == len(set(found))
    assert set(found) == {*so.__all__, "groups"}  # the module says what a groups argument may be


def test_every_dependency_of_the_tests_is_locked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["examples"], *extras["test"]]
    names = {re.match(r"[\w-]+", each)[0].lower() for each in wanted} - {"spherical_optax"}
    locked = (ROOT / "tests" / "locked.txt").read_text()
    assert names <= set(re.findall(r"^([\w-]+)==", locked, re.MULTILINE))


def test_oldest_versions_are_the_least_that_are_admitted():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    admitted = [*project["dependencies"], *project["optional-dependencies"]["examples"]]
    least = {each.replace(">=", "==") for each in admitted if ">=" in each}
    pinned = (ROOT / "tests" / "oldest.txt").read_text().splitlines()
    assert least
    assert least <= set(pinned)
