"""The benchmark programs run in short form, and their results are plausible."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from conftest import CACHED, QUICK

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


def run(program, *options, out, flags=QUICK):
    environment = os.environ | CACHED | {"XLA_FLAGS": flags}
    command = [sys.executable, str(BENCHMARKS / program), *options, "--out", str(out)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    report = json.loads((out / program.replace(".py", ".json")).read_text())
    assert {"platform", "device", "cores", "jax", "optax"} <= set(report["machine"])
    return report["results"], result.stdout


@pytest.mark.slow
def test_step(tmp_path):
    names = ["optax.adam", "adamsrt", "adamsrt, composed"]
    options = ["--tree", "resnet18", "--sweeps", "1", "--rounds", "3", "--optimizer", *names]
    results, printed = run("step.py", *options, out=tmp_path, flags="")
    assert "resnet18, 11,173,962 parameters" in printed
    adam, fused, composed = results["resnet18"]
    assert [adam["optimizer"], fused["optimizer"], composed["optimizer"]] == names
    assert adam["to adam"]["median"] == 1
    assert fused["copies of 16384 entries and more"] == 0
    # Partial results of five sums, each a sixteenth of a leaf. Older XLA allocates more.
    bound = 0.35 if jax.__version_info__ >= (0, 10, 2) else 0.5
    assert fused["temporary bytes per parameter"] <= bound * 4
    assert composed["copies of 16384 entries and more"] > 0
    assert f"{fused['to adam']['median']:.2f}" in printed


@pytest.mark.slow
def test_train(tmp_path):
    size = ["--width", "256", "--depth", "3", "--rounds", "3", "--optimizer", "adamsrt", "adamp"]
    command = ["--network", "columns", "unrolled", *size]
    results, printed = run("train.py", *command, out=tmp_path)
    [(version, networks)] = results.items()
    assert version == jax.__version__
    added = {row["optimizer"]: row for row in networks["columns"]}
    assert list(added) == ["sgd", "optax.adam", "adamsrt", "adamp"]
    assert added["sgd"]["added"]["median"] == 0
    assert added["optax.adam"]["added"]["median"] == pytest.approx(1)
    assert all(0 < row["memory"] < 1.2 for row in added.values())
    # The time for tracing grows less with the number of identical layers than Adam's does.
    assert {row["optimizer"]: row["trace to adam"] for row in networks["unrolled"]}["adamsrt"] < 8
    run("train.py", "--network", "layers", *size, out=tmp_path)
    report = json.loads((tmp_path / "train.json").read_text())
    assert list(report["results"][version]) == ["columns", "unrolled", "layers"]
    assert f"JAX {version}, columns" in printed


@pytest.mark.slow
def test_scaling(tmp_path):
    options = ["--parameters", "1e4", "--layers", "4", "--kernels", "4", "--rounds", "3"]
    results, _ = run("scaling.py", *options, out=tmp_path)
    assert len(results) == 3
    assert all(row["milliseconds"] > 0 for rows in results.values() for row in rows)


@pytest.mark.slow
def test_recorders(tmp_path):
    results, printed = run("recorders.py", "--rounds", "10", out=tmp_path)
    kinds = ["sphere", "gradient", "effective_learning_rate"]
    names = [f"record_{kind}" for kind in kinds]
    assert [row["chain"] for row in results] == ["no recorder", *names, "all"]
    assert "the demo's network, 10 rounds" in printed


@pytest.mark.slow
def test_detection(tmp_path):
    options = ["--small", "--model", "transformer"]
    results, printed = run("detection.py", *options, out=tmp_path)
    assert [row["with groups"] for row in results] == [4]
    assert "find_radial_groups" in printed


def test_unknown_optimizer(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "step.py"), "--optimizer", "adagrad"]
    result = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "--optimizer: expected some of ['optax.adam'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_device(tmp_path):
    """The tiny version of device.py runs from a checkout and writes all parts."""
    command = [sys.executable, str(BENCHMARKS / "device.py"), "--out", str(tmp_path)]
    environment = os.environ | CACHED | {"XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "No accelerator is here: a tiny form on cpu" in done.stdout
    report = json.loads((tmp_path / "device.json").read_text())
    assert {"device", "driver", "jax", "optax", "flax", "xla flags", "commit"} <= set(
        report["machine"]
    )
    results = report["results"]
    names = ["sgd, plain", "optax.adam", "adamsrt", "muonh"]
    for network in ("resnet18", "transformer"):
        rows = results["training"][network]
        assert [row["optimizer"] for row in rows] == names
        assert [rows[0]["added, to adam"], rows[1]["more than adam (%)"]] == [0, 0]
        assert rows[1]["added, to adam"] == pytest.approx(1)
        assert [row["optimizer"] for row in results["memory"][network]] == names
    bare = {row["optimizer"]: row for row in results["bare"]["resnet18"]}
    assert {"optax.adam", "optax.sgd", "adamsrt", "muonh"} <= set(bare)
    assert bare["optax.adam"]["bytes foretold"] == pytest.approx(28, rel=1e-3)
    assert bare["optax.adam"]["to adam"] == 1


def test_device_imports_nothing_that_is_not_there():
    """device.py needs only JAX, Optax, Flax, NumPy, the standard library and the checkout."""
    program = """
import sys
class Refuse:
    allowed = {allowed!r}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.allowed:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
sys.argv = ["device.py"]
sys.path.insert(0, {folder!r})
import device
"""
    missing = ["tyro", "tqdm", "matplotlib", "grain", "sklearn", "PIL", "hypothesis", "torch"]
    code = program.format(allowed=missing, folder=str(BENCHMARKS))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_device_runs_the_optimizers_of_pytorch():
    """PyTorch's optimizers take the requested number of steps on parameters of the same shapes."""
    program = """
import sys, types
import numpy as np
made = []

class Optimizer:
    def __init__(self, params, **options):
        self.params, self.options, self.steps = params, options, 0
        made.append(self)
    def step(self):
        assert all(param.grad.shape == param.shape for param in self.params)
        self.steps += 1

def full(shape, value, device, requires_grad):
    assert (device, requires_grad) == ("cpu", True)
    return types.SimpleNamespace(shape=shape, grad=None)

torch = types.ModuleType("torch")
torch.cuda = types.SimpleNamespace(is_available=lambda: False)
torch.optim = types.SimpleNamespace(Adam=Optimizer, SGD=Optimizer)
torch.full = full
torch.full_like = lambda like, value: types.SimpleNamespace(shape=like.shape)
sys.modules["torch"] = torch
sys.path.insert(0, {folder!r})
import device, trees
tree = trees.resnet18()
for run in device.torch_runs(tree, 3).values():
    run()
assert [each.steps for each in made] == [3, 3]
assert all(each.options["fused"] for each in made)
assert made[1].options["momentum"] == 0.9
assert sum(np.prod(param.shape) for param in made[0].params) == trees.count(tree.shapes)
"""
    code = program.format(folder=str(BENCHMARKS))
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
