"""The statements of docs/precision.md about low precision, in fewer steps."""

import dataclasses
import json
import pathlib
import sys

import jax.numpy as jnp
import pytest

sys.path.append(str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import precision

CONFIG = precision.Config(steps=300)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.slow] * (name == "sgdmrt"))
        for name in precision.CASES
    ],
)
def rows(request):
    case = {request.param: precision.CASES[request.param]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "CASES", case)
        found = {row["precision"]: row for row in precision.measure(CONFIG)}
    return request.param, found


def test_everything_stays_finite(rows):
    assert all(row["finite"] for row in rows[1].values())


def test_moments_stay_tangent(rows):
    """Moments stay tangent up to their own rounding, for every dtype of the parameters."""
    name, found = rows
    for each, row in found.items():
        if name == "hyperball":
            assert row["tangency"] is None
        else:
            assert 0 < row["tangency in eps"] < 4, each


def test_radii_stay_where_they_belong(rows):
    """Radii do not drift with float32 parameters, nor Hyperball's in bfloat16 beyond rounding."""
    name, found = rows
    for each, row in found.items():
        if precision.PRECISIONS[each].params == jnp.float32:
            assert row["drift at most"] < (1e-6 if name == "hyperball" else 2e-3), each
        elif name == "hyperball":
            assert 0 < row["drift at most"] < float(jnp.finfo(jnp.bfloat16).eps)


def test_float32_parameters_learn_as_in_float32(rows):
    _, found = rows
    expected = found["float32"]["angle to the teacher"]
    for each, row in found.items():
        if precision.PRECISIONS[each].params == jnp.float32:
            assert abs(row["angle to the teacher"] / expected - 1) < 0.02, each


def test_steps_that_overflow_are_left_out():
    """Steps are skipped when the scaled loss has gradients that overflow."""
    case, each = precision.CASES["adamsrt"], "float16 gradients of a scaled loss"
    run = precision.train(case, precision.PRECISIONS[each]._replace(grow=5), CONFIG)
    assert 0 < run.skipped < CONFIG.steps / 5
    assert run.finite


def test_the_program(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(precision, "CASES", {"hyperball": precision.CASES["hyperball"]})
    monkeypatch.setattr(precision, "PRECISIONS", {"float32": precision.Precision()})
    precision.main(dataclasses.replace(CONFIG, steps=20, out=tmp_path))
    (row,) = json.loads((tmp_path / "precision.json").read_text())["results"]
    assert f"{row['drift at most']:.1e}" in capsys.readouterr().out
