"""The examples' programs, in short runs and with bad options."""

import json
import pathlib
import re
import subprocess
import sys

import numpy as np
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
def test_the_rest_of_the_family_trains(tmp_path):
    names = ["adamg", "adamg_star", "adamp", "sgdp", "hyperball"]
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
            error = scale * differences.std(ddof=1) / 2**0.5
            assert f"{mean:.{digits}f} ± {std:.{digits}f}" in table[name]
            assert f"{change:+.{digits}f} ± {error:.{digits}f}" in table[name]
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
    result = run("--epochs", "2", "--out", str(tmp_path), program="effective_learning_rate.py")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "results.json").read_text())
    assert list(report["optimizers"]) == names
    for name, row in report["optimizers"].items():
        without, decayed = row["runs"]
        for each in (without, decayed):
            # The theorem is exact; angles of 1e-3 lose three of float64's sixteen digits.
            assert each["largest_relative_deviation"] < 1e-11, name
            assert f"{name:<9}  {each['decay']:>8g}" in result.stdout
            assert f"{each['largest_relative_deviation']:.1e}" in result.stdout
        for layer, values in without["layers"].items():
            assert values["angle_rad"] > 1e-4, (name, layer)
            assert values["radius"] > decayed["layers"][layer]["radius"], (name, layer)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_sgd_is_adam_on_the_sphere(tmp_path):
    options = ["--learning-rate", "0.1", "0.05", "--time", "2", "--images", "64"]
    program = "sgd_is_adam_on_the_sphere.py"
    result = run(*options, "--out", str(tmp_path), program=program)
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


@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        ("digits.py", ["--epochs", "0"], "--epochs: expected at least 1, found 0"),
        ("digits.py", ["--seeds", "-1"], "--seeds: expected at least 1, found -1"),
        (
            "digits.py",
            ["--learning-rate", "-1"],
            "--learning-rate: expected a positive number, found -1.0",
        ),
        ("digits.py", ["--optimizer", "adagrad"], "adamsrt"),
        (
            "effective_learning_rate.py",
            ["--epochs", "0"],
            "--epochs: expected at least 1, found 0",
        ),
        ("effective_learning_rate.py", ["--seed", "-1"], "--seed: expected at least 0, found -1"),
        (
            "sgd_is_adam_on_the_sphere.py",
            ["--learning-rate", "0.1"],
            "--learning-rate: expected at least two different ones, found (0.1,)",
        ),
        (
            "sgd_is_adam_on_the_sphere.py",
            ["--weight-decay", "9"],
            "--weight-decay: expected a number in [0, 5), found 9.0",
        ),
        (
            "sgd_is_adam_on_the_sphere.py",
            ["--time", "0.1"],
            "--time: expected at least one step, found 0.1",
        ),
        ("distributed.py", ["--steps", "0"], "--steps: expected at least 1, found 0"),
        ("ablation.py", ["--images", "1347"], "--images: expected 32 to 1346, found 1347"),
        (
            "ablation.py",
            ["--weight-decays", "0", "-1"],
            "--weight-decays: expected numbers not below 0, found (0.0, -1.0)",
        ),
    ],
)
def test_bad_option(program, options, message, tmp_path):
    result = run(*options, "--out", str(tmp_path), program=program)
    assert result.returncode != 0
    assert message in result.stderr + result.stdout
    assert "Traceback" not in result.stderr
