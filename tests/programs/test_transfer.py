"""transfer.py: its search finds the best learning rate of known losses."""

import json
import math

import numpy as np
import pytest
import tyro


@pytest.fixture
def transfer(load, monkeypatch, tmp_path):
    """transfer.py with given losses: parabolas of log2(rate) that diverge at large rates."""
    module = load("transfer")
    module.calls = []

    def make_run(name, size, config):
        best = {"adamh": -3.2, "adamw": -2.2 - math.log2(size.width / 32)}[name]

        def run(text, seed, rate, warmup, decay):
            power = math.log2(rate)
            module.calls.append((name, size.width, power, seed))
            if power > best + 6:
                return math.nan
            return 1 + 0.1 * (power - best - 0.1 * seed) ** 2 + (decay - 0.3) ** 2 + 0.01 * warmup

        return run

    monkeypatch.setattr(module, "make_run", make_run)
    (tmp_path / "text.txt").write_text("word " * 2000)
    return module


def run(module, tmp_path, *options):
    args = ["--text", tmp_path / "text.txt", "--out", tmp_path / "out", "--width", 32, 64, 128]
    args += ["--optimizer", "adamh", "adamw", "--seeds", 2, *options]
    module.main(tyro.cli(module.Config, args=[str(each) for each in args]))
    return json.loads((tmp_path / "out" / "results.json").read_text())


def test_finds_the_best_rates_and_their_drift(transfer, tmp_path, capsys):
    rows = run(transfer, tmp_path)["rows"]
    assert [(row["optimizer"], row["warmup"]) for row in rows] == [
        ("adamh", 0), ("adamh", 10), ("adamw", 0), ("adamw", 10)
    ]  # fmt: skip
    for row in rows:
        power = -3.2 if row["optimizer"] == "adamh" else -2.2
        drift = 1 if row["optimizer"] == "adamh" else 4
        np.testing.assert_allclose(row["best_rate"]["32"], [2**power, 2 ** (power + 0.1)])
        np.testing.assert_allclose(row["drift"], [drift, drift])
        more = np.subtract(row["loss_at_transferred_rate"], row["loss_at_own_rate"])
        if drift == 1:
            np.testing.assert_array_equal(more, 0)
        else:  # two powers too large
            seeds = np.array([0, 0.1])
            np.testing.assert_allclose(more, 0.1 * ((2.2 - seeds) ** 2 - (0.2 - seeds) ** 2))
    assert {row["weight_decay"] for row in rows} == {None, 0.3}
    assert "drift" in capsys.readouterr().out
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_goes_on_from_the_runs_that_it_has(transfer, tmp_path):
    first = run(transfer, tmp_path)
    assert len(transfer.calls) == len((tmp_path / "out" / "runs.jsonl").read_text().splitlines())
    transfer.calls.clear()
    assert run(transfer, tmp_path)["rows"] == first["rows"]
    assert transfer.calls == []
    with pytest.raises(SystemExit, match=r"--steps: expected 80, as of the runs in .*, found 7"):
        run(transfer, tmp_path, "--steps", 7)


def test_width_that_heads_do_not_divide(transfer, tmp_path):
    with pytest.raises(SystemExit, match="--width: expected at least two multiples of 32"):
        run(transfer, tmp_path, "--width", 32, 40)
