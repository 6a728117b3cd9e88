"""No program of the project unpickles files, so files cannot run code."""

import ast

import pytest
from test_documents import ROOT, blocks

FOLDERS = ("spherical_optax", "examples", "benchmarks", "tests")
UNSAFE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LOADERS = {"numpy.load": "allow_pickle", "torch.load": "weights_only"}
SAFE = {"allow_pickle": False, "weights_only": True}


def unsafe_loads(source):
    """The lines that unpickle, or would unpickle if the file contained a pickle."""
    tree, modules = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported = [(alias.asname or alias.name, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            imported = [(a.asname or a.name, f"{module}.{a.name}") for a in node.names]
        else:
            continue
        for name, full in imported:
            modules[name] = full
            if full.split(".")[0] in UNSAFE:
                yield node.lineno
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        options = {option.arg: getattr(option.value, "value", None) for option in node.keywords}
        if any(options.get(name, safe) is not safe for name, safe in SAFE.items()):
            yield node.lineno
            continue
        first, _, rest = ast.unparse(node.func).partition(".")
        called = ".".join(filter(None, (modules.get(first, first), rest)))
        if called in LOADERS and LOADERS[called] not in options:
            yield node.lineno


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib as j",
        "import numpy as np\nnp.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x', **options)",
        "from numpy import load\nload('x')",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import numpy\nnumpy.lib.npyio.NpzFile('x', allow_pickle=flag)",
    ],
)
def test_the_scan_finds(source):
    assert list(unsafe_loads(source)) == [len(source.splitlines())]


def test_the_scan_allows():
    safe = "import json, numpy as np\nnp.load('x', allow_pickle=False)\njson.load(open('x'))"
    assert not list(unsafe_loads(safe))


# The restricted unpickler, which never calls functions named in a file, and its tests.
UNPICKLING = ("examples/paper/unpickle.py", "tests/programs/test_paper.py")


def test_nothing_unpickles():
    programs = {
        str(path.relative_to(ROOT)): path.read_text()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
    }
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for number, (source, _) in enumerate(blocks(path.relative_to(ROOT)), start=1):
            programs[f"{path.name}, example {number}"] = source
    assert {"tests/pages/test_loading.py", "README.md, example 1"} <= set(programs)
    for reviewed in UNPICKLING:
        assert list(unsafe_loads(programs.pop(reviewed)))
    found = {name: list(unsafe_loads(source)) for name, source in programs.items()}
    assert not {name: lines for name, lines in found.items() if lines}
