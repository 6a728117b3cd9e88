"""The example programs, in short runs and with bad options."""

import contextlib
import importlib
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import tyro
from conftest import CACHED, QUICK
from flax import nnx

from spherical_optax.groups import joints_of

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(*options, program="digits.py", flags=QUICK):
    """Runs a program; pass other `flags` if it computes longer than it compiles."""
    command = [sys.executable, str(EXAMPLES / program), *options]
    environment = os.environ | CACHED | {"XLA_FLAGS": flags}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_short_run(tmp_path):
    names = ["adamsrt", "sgdmrt", "adam"]
    result = run("--optimizer", *names, "--epochs", "8", "--seeds", "2", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "conv2/kernel   (3, 3, 16, 32)  32      144" in result.stdout
    report = json.loads((tmp_path / "results.json").read_text())
    assert list(report["optimizers"]) == names
    for name, row in report["optimizers"].items():
        assert row["test_accuracy_mean"] > 0.9, name
        assert len(row["test_accuracy_per_seed"]) == 2
        assert f"{name:<9}  {row['learning_rate']:>13g}" in result.stdout
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_found_groups_are_those_of_the_rules(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    digits = importlib.import_module("digits")
    params = nnx.state(digits.Network(nnx.Rngs(0)), nnx.Param)
    found = digits.find_groups(digits.load()[0][0][:8])
    assert joints_of(found, params) == joints_of(digits.RULES, params)
    assert found.forward_passes > 0


@pytest.mark.slow
def test_the_rest_of_the_family_trains(tmp_path):
    names = ["adamg", "adamg_star", "adamp", "sgdp", "adamh"]
    names += ["rotational_adamw", "rotational_sgdm", "rotational_lion"]
    options = ["--groups", "auto", "--epochs", "10", "--seeds", "1", "--out", str(tmp_path)]
    result = run("--optimizer", *names, *options)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "results.json").read_text())
    assert list(report["optimizers"]) == names
    for name, row in report["optimizers"].items():
        assert row["test_accuracy_mean"] > 0.9, name


@pytest.mark.slow
def test_ablation(tmp_path):
    options = ["--epochs", "3", "--seeds", "2", "--learning-rates", "0.01", "0.03"]
    options += ["--weight-decays", "0", "1e-4", "--out", str(tmp_path)]
    result = run(*options, program="ablation.py")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "results.json").read_text())
    names = ["adam", "adams", "adam + transport", "adamsrt"]
    assert list(report["optimizers"]) == names
    baseline = report["optimizers"]["adam"]
    table = {line[:16].strip(): line[16:] for line in result.stdout.splitlines()}
    for name, row in report["optimizers"].items():
        best = min(row["search"], key=lambda found: found["loss"])
        assert len(row["search"]) == 4
        for key in ("learning_rate", "weight_decay"):
            assert row[key] == best[key]
        assert row["learning_rate_on_edge"]
        assert f"{row['learning_rate']:g}*" in table[name]
        for key, scale, digits in (("accuracy", 100, 2), ("loss", 1, 4)):
            values = np.array(row[key]["per_seed"])
            differences = values - np.array(baseline[key]["per_seed"])
            mean, std = scale * values.mean(), scale * values.std(ddof=1)
            change = scale * differences.mean()
            # Student's t with one degree of freedom is the Cauchy distribution.
            half = scale * differences.std(ddof=1) / 2**0.5 * math.tan(0.475 * math.pi)
            low, high = change - half, change + half
            assert f"{mean:.{digits}f} ± {std:.{digits}f}" in table[name]
            shown = f"{change:+.{digits}f} ({low:+.{digits}f}, {high:+.{digits}f})"
            assert shown in table[name]
        assert row["accuracy"]["mean"] > 0.5
    assert "on the grid's edge" in result.stdout


@pytest.mark.slow
def test_find_groups():
    result = run(program="find_groups.py")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert sum("  invariant  " in line for line in lines) == 20 + 4  # convolutions; queries, keys
    assert sum("jointly invariant" in line for line in lines) == 4
    for line in (line for line in lines if line.startswith("loss of five steps")):
        losses = [float(number) for number in line.split(": ")[1].split()]
        assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_effective_learning_rate(tmp_path):
    names = ["sgd", "adam", "adamw", "adams", "adamsrt"]
    program = "effective_learning_rate.py"
    result = run("--epochs", "1", "--out", str(tmp_path), program=program, flags="")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "results.json").read_text())
    assert list(report["optimizers"]) == names
    for name, row in report["optimizers"].items():
        without, decayed = row["runs"]
        for each in (without, decayed):
            # The theorem is exact, but angles of 1e-3 lose three of float64's sixteen digits.
            assert each["largest_relative_deviation"] < 1e-11, name
            assert re.search(rf"^{name} +{each['decay']:g} ", result.stdout, re.MULTILINE)
            assert f"{each['largest_relative_deviation']:.1e}" in result.stdout
        for layer, values in without["layers"].items():
            assert values["angle_rad"] > 1e-4, (name, layer)
            assert values["radius"] > decayed["layers"][layer]["radius"], (name, layer)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_sgd_is_adam_on_the_sphere(tmp_path):
    options = ["--learning-rate", "0.1", "0.05", "--time", "2", "--images", "32"]
    program = "sgd_is_adam_on_the_sphere.py"
    result = run(*options, "--out", str(tmp_path), program=program, flags="")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["fitted_powers"]["adamg_star"] > 2.5
    assert f"{report['fitted_powers']['adamg_star']:.2f}" in result.stdout
    for row, steps in zip(report["learning_rates"], (20, 40), strict=True):
        assert row["steps"] == steps
        assert row["travelled"]["sgd"] > 0.05
        apart = row["apart"]
        assert apart["adamg_star"] < 1e-6
        assert min(apart["fixed radius"], apart["adam"]) > 1e4 * apart["adamg_star"]
        assert f"{apart['adamg_star']:.2e}" in result.stdout
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_two_processes_are_equal_to_one(tmp_path):
    result = run("--steps", "10", "--shard", "--out", str(tmp_path), program="distributed.py")
    assert result.returncode == 0, result.stderr
    losses = re.findall(r"(\d) processes: loss ([\d.]+) after 10 steps", result.stdout)
    assert losses == [("1", losses[0][1]), ("2", losses[0][1])]
    assert float(result.stdout.split("between 1 and 2: ")[1]) < 1e-12


WRITTEN = {  # the files that each program writes to --out
    "examples/ablation.py": ["results.json"],
    "examples/decay_removed.py": ["runs.jsonl", "results.json", "curves.png"],
    "examples/digits.py": ["results.json", "curves.png"],
    "examples/distributed.py": ["1.npz", "2.npz"],
    "examples/effective_learning_rate.py": ["results.json", "curves.png"],
    "examples/language.py": ["results.json", "curves.png"],
    "examples/plasticity.py": ["results.json", "why.png", "rates.png"],
    "examples/ranking.py": ["runs.jsonl", "results.json"],
    "examples/running_statistics.py": ["results.json"],
    "examples/scale_law.py": ["runs.jsonl", "results.json", "curves.png"],
    "examples/sgd_is_adam_on_the_sphere.py": ["results.json", "curves.png"],
    "examples/transfer.py": ["runs.jsonl", "results.json", "curves.png"],
    **{
        f"benchmarks/{name}.py": [f"{name}.json"]
        for name in (
            "compiled",
            "detection",
            "memory",
            "precision",
            "recorders",
            "scaling",
            "sharded",
            "step",
            "train",
        )
    },
}


def test_all_programs_that_write_are_known():
    programs = [path for folder in ("examples", "benchmarks") for path in (ROOT / folder).glob("*")]
    found = [p for p in programs if p.suffix == ".py" and "out: pathlib.Path = " in p.read_text()]
    assert {str(path.relative_to(ROOT)) for path in found} == set(WRITTEN)


@contextlib.contextmanager
def within(seconds):
    """Interrupts the code inside if it takes longer."""

    def interrupt(*_):
        raise TimeoutError(f"took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def program(request, monkeypatch):
    """The program as a module, with its path as `sys.argv[0]`."""
    path = ROOT / request.param
    for folder in ("examples", "benchmarks"):
        monkeypatch.syspath_prepend(ROOT / folder)
    monkeypatch.setattr(sys, "argv", [str(path)])
    return importlib.import_module(path.stem)


@pytest.mark.parametrize(("program", "names"), WRITTEN.items(), ids=WRITTEN, indirect=["program"])
def test_out_that_cannot_be_written(program, names, tmp_path):
    def message(out):
        with pytest.raises(SystemExit) as stopped, within(10):
            program.main(program.Config(out=out))
        return str(stopped.value)

    start = f"{program.__name__}.py: --out: "
    for name in names:
        out = tmp_path / f"holds {name}"
        (out / name).mkdir(parents=True)
        assert message(out) == f"{start}{out / name}: expected a file or nothing, found a directory"
    file = tmp_path / "file"
    file.write_text("kept")
    for out in (file, file / "below" / "it"):
        assert message(out) == f"{start}{file}: expected a directory, found a file"
    for out in (pathlib.Path("/proc"), pathlib.Path("/proc/none")):  # not writable, even by root
        assert message(out).startswith(f"{start}{out}: expected a place to write to, found ")
    assert file.read_text() == "kept"


@pytest.mark.parametrize("program", ["examples/distributed.py"], indirect=True)
@pytest.mark.parametrize(
    ("bind", "expected"), [(None, "127.0.0.1:1234"), ("0.0.0.0:1", "0.0.0.0:1")]
)
def test_address_on_which_the_coordinator_listens(program, bind, expected, monkeypatch):
    calls = {}
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **options: calls.update(options))
    monkeypatch.setattr(program, "train", lambda config: ({}, 0.0))
    coordinator = {"coordinator": "127.0.0.1:1234", "process": 1}
    program.worker(program.Config(**coordinator, bind=bind))
    assert calls == {"coordinator_bind_address": expected}


@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        ("examples/digits.py", ["--epochs", "0"], "--epochs: expected at least 1, found 0"),
        ("examples/digits.py", ["--seeds", "-1"], "--seeds: expected at least 1, found -1"),
        (
            "examples/digits.py",
            ["--learning-rate", "-1"],
            "--learning-rate: expected a positive number, found -1.0",
        ),
        ("examples/digits.py", ["--optimizer", "adagrad"], "adamsrt"),
        (
            "examples/effective_learning_rate.py",
            ["--epochs", "0"],
            "--epochs: expected at least 1, found 0",
        ),
        (
            "examples/effective_learning_rate.py",
            ["--seed", "-1"],
            "--seed: expected at least 0, found -1",
        ),
        (
            "examples/sgd_is_adam_on_the_sphere.py",
            ["--learning-rate", "0.1"],
            "--learning-rate: expected at least two different ones, found (0.1,)",
        ),
        (
            "examples/sgd_is_adam_on_the_sphere.py",
            ["--weight-decay", "9"],
            "--weight-decay: expected a number in [0, 5), found 9.0",
        ),
        (
            "examples/sgd_is_adam_on_the_sphere.py",
            ["--time", "0.1"],
            "--time: expected at least one step, found 0.1",
        ),
        ("examples/distributed.py", ["--steps", "0"], "--steps: expected at least 1, found 0"),
        (
            "examples/distributed.py",
            ["--bind", ":1"],
            "--bind: expected --process with it, found :1",
        ),
        ("examples/ablation.py", ["--images", "1347"], "--images: expected 32 to 1346, found 1347"),
        (
            "examples/ablation.py",
            ["--weight-decays", "0", "-1"],
            "--weight-decays: expected numbers not below 0, found (0.0, -1.0)",
        ),
    ],
    indirect=["program"],
)
def test_bad_option(program, options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped, within(10):
        program.main(tyro.cli(program.Config, args=[*options, "--out", str(tmp_path)]))
    printed = capsys.readouterr()
    assert stopped.value.code != 0
    assert message in f"{stopped.value}{printed.err}{printed.out}"


@pytest.mark.slow
def test_running_statistics(tmp_path):
    """Lagging statistics cost accuracy; recomputed ones are as good as those of the batch."""
    options = ["--steps", "40", "--seeds", "2", "--out", str(tmp_path)]
    assert run(*options, program="running_statistics.py").returncode == 0
    report = json.loads((tmp_path / "results.json").read_text())
    assert len(report["rows"]) == 10
    for row in report["rows"]:
        lagging, batch, anew, _ = np.mean(row["accuracies"], axis=0)
        assert lagging < batch - 5
        assert abs(anew - batch) < 2
