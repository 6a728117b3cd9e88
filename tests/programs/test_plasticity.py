"""plasticity.py: its tasks, its verdicts, and short real runs."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from flax import nnx


@pytest.fixture
def toy(load, monkeypatch):
    """The program with three steps per task."""
    plasticity = load("plasticity")
    for name, setting in plasticity.SETTINGS.items():
        monkeypatch.setitem(plasticity.SETTINGS, name, setting._replace(steps=3))
    return plasticity


def run(module, out, *options):
    module.main(tyro.cli(module.Config, args=[str(each) for each in (*options, "--out", out)]))
    return json.loads((out / "results.json").read_text())


# Tasks.


def test_random_labels_are_new_in_each_task(load):
    tasks = load("helpers.tasks")
    first, second = tasks.random_labels(0, 2)
    again, _ = tasks.random_labels(0, 2)
    np.testing.assert_array_equal(first.train[0], second.train[0])
    assert 0.8 < (first.train[1] != second.train[1]).mean() < 0.97
    np.testing.assert_array_equal(first.train[1], again.train[1])
    assert len(first.train[0]) == 512
    assert np.unique(first.train[0], axis=0).shape[0] == 512


def test_permuted_pixels_are_the_same_ones_for_training_and_test(load):
    tasks = load("helpers.tasks")
    first, second = tasks.permuted_pixels(0, 2)
    for whole, one, other in zip(tasks.digits(), first, second, strict=True):
        flat = [each[0].reshape(len(each[0]), 64) for each in (whole, one, other)]
        order = [np.sort(each, axis=1) for each in flat]
        np.testing.assert_array_equal(order[0], order[1])
        assert (flat[1] != flat[2]).any()
    # All images have the same permutation: each new pixel is the same old pixel in all of them.
    old, new = (each.train[0].reshape(-1, 64) for each in (tasks.digits(), first))
    old_test, new_test = (each.test[0].reshape(-1, 64) for each in (tasks.digits(), first))
    for pixel in range(64):
        source = [i for i in range(64) if (old[:, i] == new[:, pixel]).all()]
        assert any((old_test[:, i] == new_test[:, pixel]).all() for i in source)


def test_a_growing_set_keeps_what_it_had(load):
    tasks = load("helpers.tasks")
    half, whole = tasks.growing(3, 2)
    (alone,) = tasks.growing(3, 1)
    assert [len(each.train[0]) for each in (half, whole, alone)] == [500, 1000, 1000]
    np.testing.assert_array_equal(half.train[0], whole.train[0][:500])
    np.testing.assert_array_equal(alone.train[0], whole.train[0])


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("size", [2, 7, 8])
def test_the_convolution_is_that_of_flax(load, strides, size):
    convolve = load("helpers.tasks").convolve
    x = jax.random.normal(jax.random.key(1), (4, size, size, 3))
    own, theirs = (
        nnx.Conv(3, 5, kernel_size=(3, 3), strides=strides, rngs=nnx.Rngs(0), **more)
        for more in ({"conv_general_dilated": convolve}, {})
    )
    np.testing.assert_allclose(own(x), theirs(x), atol=1e-5)


def test_batches_pass_over_all_images(load):
    plasticity = load("plasticity")
    (task,) = load("helpers.tasks").growing(0, 1)
    setting = plasticity.SETTINGS["warm_start"]._replace(steps=32)
    found = plasticity.in_batches(np.random.default_rng(0), task, setting)
    assert found.shape == (32, 64)
    for first in (0, 15):  # fifteen batches to a pass
        assert len(np.unique(found[first : first + 15])) == 15 * 64
    full = plasticity.in_batches(np.random.default_rng(0), task, setting._replace(batch=None))
    assert full.shape == (32, 1000)


# Statistics and verdicts.


def cell(plasticity, outcomes, searched=0.5):
    choice = plasticity.Choice(0.1, 0.0)
    return plasticity.Cell(choice, {choice: searched}, [], np.array(outcomes), None)


def test_intervals_are_those_of_student(load):
    interval = load("plasticity").interval
    # Student's t with two degrees of freedom, 4.303, times the standard deviation over sqrt(3).
    mean, low, high = interval(np.array([1.0, 2.0, 3.0]))
    assert (mean, round(low, 3), round(high, 3)) == (2.0, -0.484, 4.484)
    assert interval(np.array([1.5])) == (1.5, -math.inf, math.inf)


@pytest.mark.parametrize(
    ("setting", "differences", "as_well", "worse"),
    [
        ("memory", [0.0, 0.05, -0.05], False, False),  # an interval of 0.12 to either side
        ("memory", [0.01, 0.02, 0.0], True, False),
        ("memory", [0.05, 0.06, 0.07], True, True),
        ("memory", [0.3, 0.31, 0.32], False, True),
        ("memory", [-1.0, -1.1, -1.2], True, False),
        ("permuted", [-0.001, -0.002, -0.0015], True, True),
        ("permuted", [-0.02, -0.021, -0.022], False, True),
        ("permuted", [0.01, 0.02, 0.03], True, False),
    ],
)
def test_verdicts(load, setting, differences, as_well, worse):
    plasticity = load("plasticity")
    base = np.array([0.5, 0.7, 0.6])
    one, other = (cell(plasticity, each) for each in (base + differences, base))
    assert plasticity.as_well(plasticity.SETTINGS[setting], one, other) == as_well
    assert plasticity.worse(plasticity.SETTINGS[setting], one, other) == worse


def test_hypotheses_ask_what_the_text_says(load):
    plasticity = load("plasticity")
    same, better, bad = ([0.5, 0.51, 0.5], [0.4, 0.41, 0.4], [1.5, 1.51, 1.5])
    cells = {
        "adamw": cell(plasticity, same, searched=0.5),
        "muon_decay": cell(plasticity, better, searched=0.4),
        "adamh": cell(plasticity, same),
        "muonh": cell(plasticity, bad),
        "adam": cell(plasticity, bad),
        "sgd": cell(plasticity, same),
        "muon": cell(plasticity, bad),
    }
    found = plasticity.verdicts("memory", cells)
    assert found["H1"] == {
        "adamh as well as adamw": True,
        "muonh as well as muon_decay": False,
        "adam worse than adamw": True,
        "sgd worse than adamw": False,
        "muon worse than muon_decay": True,
    }
    # The reference is muon_decay, which was better on the search seeds.
    assert found["H2"] == {"muonh": False, "adamh": False}
    cells["adamh, memory's angle"] = cell(plasticity, same)
    cells["muonh, memory's angle"] = cell(plasticity, better)
    # In "permuted" larger values are better, so the reference is adamw.
    other = plasticity.verdicts("permuted", cells)
    assert other["H2"] == {"adamh": True, "muonh": False}


def test_as_many_settings_for_each(load):
    plasticity = load("plasticity")
    for preset, number in (("full", 12), ("small", 6)):
        for name, contender in plasticity.CONTENDERS.items():
            found = plasticity.choices(contender, preset)
            assert len(set(found)) == number, name


def test_divergence_counts_as_a_guess(load):
    plasticity = load("plasticity")
    memory = plasticity.SETTINGS["memory"]
    result = {"loss": [0.0] * 5 + [1.0] * 9 + [math.nan]}
    assert plasticity.outcome(memory, result) == pytest.approx((9 + math.log(10)) / 10)


# Runs.


def test_a_stopped_study_goes_on(toy, tmp_path, monkeypatch):
    options = ("--settings", "memory", "--optimizers", "adam", "adamh", "--rate", 0.01)
    options = (*options, "--seeds", 2, "--tasks", 2)
    whole = run(toy, tmp_path / "whole", *options)
    made = toy.make_run

    def killed(setting, contender):
        one = made(setting, contender)

        def train(choice, seed, tasks):
            if contender is toy.CONTENDERS["adamh"] and seed == 1:
                raise KeyboardInterrupt
            return one(choice, seed, tasks)

        return train

    monkeypatch.setattr(toy, "make_run", killed)
    with pytest.raises(KeyboardInterrupt):
        run(toy, tmp_path / "cut", *options)
    kept = {path.name for path in (tmp_path / "cut" / "runs").glob("*.json")}
    assert 2 <= len(kept) < 4
    calls = []

    def counted(setting, contender):
        one = made(setting, contender)

        def train(*key):
            calls.append(key)
            return one(*key)

        return train

    monkeypatch.setattr(toy, "make_run", counted)
    assert run(toy, tmp_path / "cut", *options) == whole
    assert len(calls) == 4 - len(kept)
    for name in ("why.png", "rates.png"):
        assert (tmp_path / "cut" / name).stat().st_size > 10_000


def test_bad_options_are_named(load, tmp_path):
    plasticity = load("plasticity")
    with pytest.raises(SystemExit, match=r"--settings: expected some of \['memory', .*found golf"):
        run(plasticity, tmp_path, "--settings", "golf")
    with pytest.raises(SystemExit, match=r"--optimizers: expected some of .*, found adamz"):
        run(plasticity, tmp_path, "--optimizers", "adamz")
    with pytest.raises(SystemExit, match=r"--rate: expected a positive number, found 0"):
        run(plasticity, tmp_path, "--rate", 0)


def test_shrinking_is_between_tasks(toy):
    """Shrink-and-perturb changes the weights between tasks, so it affects the second task only."""
    setting, contender = toy.SETTINGS["memory"], toy.CONTENDERS["shrink_perturb"]
    learned = toy.make_run(setting, contender)
    kept, shrunk = (learned(toy.Choice(1e-3, s), 0, 2) for s in (1.0, 0.1))
    for key in ("loss", "radius"):
        assert kept[key][0] == shrunk[key][0]
        assert kept[key][1] != shrunk[key][1]


@pytest.mark.slow
def test_the_small_preset(toy, tmp_path, capsys):
    found = run(toy, tmp_path, "--preset", "small", "--tasks", 2)
    printed = capsys.readouterr().out
    for setting in toy.SETTINGS:
        cells = found[setting]["optimizers"]
        same = {"muonh, memory's angle", "adamh, memory's angle"}
        assert set(cells) == {*toy.SMALL} | (set() if setting == "memory" else same)
        assert all(len(each["outcomes"]) == 3 for each in cells.values())
        assert set(found[setting]["verdicts"]["H2"]) == {"muonh", "adamh"}
    assert "batch statistics" in printed
    assert "afresh, less this" in printed


@pytest.mark.slow
def test_every_optimizer_trains(toy):
    setting = toy.SETTINGS["convolution"]
    for name, contender in toy.CONTENDERS.items():
        choice = toy.choices(contender, "small")[-1]
        result = toy.make_run(setting, contender)(choice, 0, 2)
        assert jnp.isfinite(jnp.array(result["loss"])).all(), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamh", "muonh", "adam_radius", "rotational_adamw"])
def test_a_fixed_radius_stays(toy, name):
    result = toy.make_run(toy.SETTINGS["memory"], toy.CONTENDERS[name])(toy.Choice(0.01, 0), 0, 3)
    np.testing.assert_allclose(result["radius"], result["radius"][0], rtol=1e-5)
    free = toy.make_run(toy.SETTINGS["memory"], toy.CONTENDERS["adam"])(toy.Choice(0.01, 0), 0, 3)
    assert free["radius"][-1] > 1.001 * free["radius"][0]
    assert jnp.isfinite(jnp.array(result["loss"])).all()
