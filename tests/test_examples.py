"""The examples' programs, in short runs and with bad options."""

import json
import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def run(*options, program="digits.py"):
    command = [sys.executable, str(EXAMPLES / program), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


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


@pytest.mark.slow
def test_found_groups_train_as_the_rules_do(tmp_path):
    common = ["--optimizer", "adamsrt", "--epochs", "2", "--seeds", "1", "--out", str(tmp_path)]
    accuracies = []
    for groups in ("rules", "auto"):
        result = run(*common, "--groups", groups)
        assert result.returncode == 0, result.stderr
        report = json.loads((tmp_path / "results.json").read_text())
        accuracies.append(report["optimizers"]["adamsrt"]["test_accuracy_per_seed"])
    assert accuracies[0] == accuracies[1]
    assert "forward passes" in result.stdout


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "--epochs: expected at least 1, found 0"),
        (["--seeds", "-1"], "--seeds: expected at least 1, found -1"),
        (["--learning-rate", "-1"], "--learning-rate: expected a positive number, found -1.0"),
        (["--optimizer", "adagrad"], "adamsrt"),
    ],
)
def test_bad_option(options, message, tmp_path):
    result = run(*options, "--out", str(tmp_path))
    assert result.returncode != 0
    assert message in result.stderr + result.stdout
    assert "Traceback" not in result.stderr
