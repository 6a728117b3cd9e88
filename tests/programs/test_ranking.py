"""ranking.py: its search finds the best setting of known losses."""

import json
import math

import numpy as np
import pytest
import tyro


@pytest.fixture
def ranking(load, monkeypatch, tmp_path):
    """ranking.py with given losses in place of training; they diverge at large rates.

    After half of the steps the best rate is 0.02, after all of them 0.01.
    """
    module = load("ranking")
    module.calls = []

    def make_run(name, size, config):
        assert (config.context, size.layers) == (32, 2)
        assert size.normalized == (name == "ngpt")
        best = {4: 0.02, 7: 0.01}[config.steps]

        def run(text, seed, rate, warmup, decay):
            assert warmup == {4: 1, 7: 2}[config.steps]
            module.calls.append((name, config.steps, rate, decay, seed))
            base = {"adamw": 2.0, "muonh": 1.0}.get(name, 3.0) + 0.1 * (seed % 7)
            return math.nan if rate > 0.1 else base + abs(math.log(rate / best)) - 0.1 * decay

        return run

    monkeypatch.setattr(module, "make_run", make_run)
    (tmp_path / "text.txt").write_text("word " * 2000)
    return module


def run(module, tmp_path, *options):
    args = ["--text", tmp_path / "text.txt", "--out", tmp_path / "out", "--preset", "tiny"]
    args += ["--steps", 7, "--warmup", 0.3, *options]
    module.main(tyro.cli(module.Config, args=[str(each) for each in args]))
    return json.loads((tmp_path / "out" / "results.json").read_text())["optimizers"]


def test_every_optimizer_has_six_settings(ranking):
    for name, settings in ranking.SETTINGS.items():
        assert len(set(settings)) == 6, name


def test_one_seed_chooses_and_others_are_reported(ranking, tmp_path, capsys):
    found = run(ranking, tmp_path, "--optimizer", "adamw", "muonh")
    assert found["adamw"]["rate, decay"] == [0.01, 3.0]
    assert found["muonh"]["rate, decay"] == [0.01, 0.0]
    np.testing.assert_allclose(found["adamw"]["losses"], [1.7, 1.8, 1.9])
    np.testing.assert_allclose(found["muonh"]["losses"], [1.0, 1.1, 1.2])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith(("adamw", "muonh"))]
    assert [row[0] for row in rows] == ["muonh", "adamw"]  # the best first
    # Student's t with two degrees of freedom, 4.303, times 0.1 over sqrt(3).
    assert rows[0][3:7] == ["1.1000", "(0.8516", "to", "1.3484)"]
    assert rows[0][7:11] == ["-0.7000", "(-0.7000", "to", "-0.7000)"]
    calls = len(ranking.calls)
    assert run(ranking, tmp_path, "--optimizer", "adamw", "muonh") == found
    assert len(ranking.calls) == calls  # kept


def test_two_settings_train_for_all_steps(ranking, tmp_path):
    found = run(ranking, tmp_path, "--optimizer", "muonh")["muonh"]
    calls = {steps: [call for call in ranking.calls if call[1] == steps] for steps in (4, 7)}
    assert [call[4] for call in calls[4]] == [1000] * 6
    assert [(call[2], call[4]) for call in calls[7]] == [
        (0.02, 1000),
        *[(0.01, seed) for seed in (1000, 0, 1, 2)],
    ]
    assert [rate for rate, *_ in found["finalists"]] == [0.02, 0.01]
    assert len(found["searched"]) == 6


def test_divergence_counts_as_a_guess(ranking, tmp_path):
    searched = run(ranking, tmp_path, "--optimizer", "muonh", "--seeds", 1)["muonh"]["searched"]
    assert searched[-1] == [0.16, 0.0, math.log(256)]
