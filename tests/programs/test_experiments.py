"""The experiments on images: kept runs, statistics of their losses, and short real runs."""

import itertools
import json
import math

import numpy as np
import pytest
import tyro
from test_paper import write_mnist


def run(module, out, *options):
    module.main(tyro.cli(module.Config, args=[str(each) for each in (*options, "--out", out)]))
    return json.loads((out / "results.json").read_text())


# Kept runs.


def test_runs_are_made_once_and_survive_a_cut(load, tmp_path):
    runs, made = load("helpers.runs"), []

    def train(result):
        made.append(result)
        return result

    kept = runs.Runs(tmp_path, steps=3, text=None)
    assert kept(("a", 0.1, 1), lambda: train(0.1 + 0.2)) == 0.1 + 0.2
    assert kept(("a", 0.1, 1), lambda: train(5.0)) == 0.1 + 0.2
    assert kept(("b", 1), lambda: train([1.0, 2.0])) == [1.0, 2.0]
    path = tmp_path / "runs.jsonl"
    path.write_text(path.read_text()[:-3])  # killed while it wrote
    again = runs.Runs(tmp_path, steps=3, text=None)
    assert again(("a", 0.1, 1), lambda: train(5.0)) == 0.1 + 0.2
    assert again(("b", 1), lambda: train([3.0])) == [3.0]
    assert made == [0.1 + 0.2, [1.0, 2.0], [3.0]]
    last = runs.Runs(tmp_path, steps=3, text=None)
    assert last.results == {("a", 0.1, 1): 0.1 + 0.2, ("b", 1): [3.0]}
    with pytest.raises(SystemExit, match=r"--steps: expected 3, as of the runs in .*, found 4"):
        runs.Runs(tmp_path, steps=4, text=None)


def test_a_single_cut_line(load, tmp_path):
    runs = load("helpers.runs")
    (tmp_path / "runs.jsonl").write_text('["a", 1')
    assert runs.Runs(tmp_path)(("a", 1), lambda: 2.0) == 2.0
    assert runs.Runs(tmp_path).results == {("a", 1): 2.0}


def test_divergence_counts_as_a_guess(load):
    finite_loss = load("helpers.classify").finite_loss
    assert finite_loss(0.5) == 0.5
    for loss in (math.nan, math.inf, 1e9):
        assert finite_loss(loss) == math.log(10)


# decay_removed.py


@pytest.mark.parametrize("n", [1, 3, 4])
def test_expected_best_is_the_mean_over_all_draws(n, load):
    decay_removed = load("decay_removed")
    search, report = np.random.default_rng(n).normal(size=(2, n))
    found = decay_removed.expected_best(search, report, 4)
    expected = [
        np.mean([report[min(draw, key=lambda i: search[i])] for draw in draws])
        for draws in (list(itertools.product(range(n), repeat=k)) for k in range(1, 5))
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_differences_have_the_sign_and_the_interval_of_their_seeds(load):
    decay_removed = load("decay_removed")
    rng = np.random.default_rng(0)
    search = {name: rng.normal(1, 0.1, (n, 20)) for name, n in (("adamw", 6), ("hyperball", 3))}
    report = {name: each + 0.01 * rng.normal(size=each.shape) for name, each in search.items()}
    same = decay_removed.summarize(search, report)
    low, high = same["hyperball"]["difference"][1:]
    assert low < 0 < high
    assert decay_removed.verdict(same["hyperball"]["difference"]) == "nothing shown"
    for shift, words in ((-1, "fewer settings"), (1, "AdamW is better")):
        moved = report | {"hyperball": report["hyperball"] + shift}
        found = decay_removed.summarize(search, moved)
        value, low, high = found["hyperball"]["difference"]
        np.testing.assert_allclose(value, same["hyperball"]["difference"][0] + shift)
        assert low < value < high
        assert decay_removed.verdict(found["hyperball"]["difference"]) == words
        assert found["adamw"] == same["adamw"]

    # If all seeds agree, resampling changes nothing.
    constant = {name: np.repeat(each[:, :1], 20, axis=1) for name, each in search.items()}
    row = decay_removed.summarize(constant, constant)["adamw"]
    np.testing.assert_allclose(row["low"], row["loss"])
    np.testing.assert_allclose(row["high"], row["loss"])
    assert np.isclose(row["loss"][0], constant["adamw"].mean())
    assert np.all(np.diff(row["loss"]) < 0)


@pytest.fixture
def short(load, monkeypatch):
    """decay_removed.py with two learning rates and two weight decays."""
    module = load("decay_removed")
    monkeypatch.setattr(module, "RATES", (0.01, 0.1))
    monkeypatch.setattr(module, "DECAYS", (0.0, 1.0))
    return module


@pytest.mark.slow
def test_decay_removed_on_digits(short, tmp_path, capsys):
    options = ["--seeds", 2, "--epochs", 3]
    report = run(short, tmp_path, *options)
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 4 * (4 + 2 + 2)
    assert report["losses"]["adamw"]["search"] == [
        [json.loads(line)[-1] for line in lines[4 * i + 2 : 4 * i + 4]] for i in range(4)
    ]
    for name in ("adamw", "hyperball", "rotational"):
        losses = np.array(report["losses"][name]["report"])
        assert np.all(losses > 0), name
        assert losses.min() < 1.8, name  # log 10 is 2.3
        assert len({*losses.flat}) == losses.size  # decay and rate matter
    out = capsys.readouterr().out
    assert "hyperball at 4 less adamw at 16: " in out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert run(short, tmp_path, *options)["losses"] == report["losses"]
    assert (tmp_path / "runs.jsonl").read_text().splitlines() == lines
    with pytest.raises(SystemExit, match=r"--epochs: expected 3, as of the runs in .*, found 20"):
        run(short, tmp_path)


@pytest.mark.slow
def test_decay_removed_on_images(short, tmp_path, monkeypatch):
    """decay_removed.py runs on images; the digits' network replaces the slower ResNet."""
    network = lambda name, seed, **_: short.Network(short.nnx.Rngs(seed))  # noqa: E731
    monkeypatch.setattr(short, "make_model", network)
    write_mnist(tmp_path / "data", 2200, 40)
    report = run(short, tmp_path, "--images", tmp_path / "data", "--epochs", 1)
    assert np.shape(report["losses"]["rotational"]["report"]) == (2, 2)
    assert np.min(report["losses"]["hyperball"]["report"]) < 2.2


def test_decay_removed_says_what_is_wrong(short, tmp_path):
    with pytest.raises(SystemExit, match="--seeds: expected at least 2, found 1"):
        run(short, tmp_path, "--seeds", 1)
    with pytest.raises(SystemExit, match="--epochs: expected at least 1, found 0"):
        run(short, tmp_path, "--epochs", 0)
    with pytest.raises(SystemExit, match=r"decay_removed.py: --images: .*none: expected .*, found"):
        run(short, tmp_path, "--images", tmp_path / "none")
    write_mnist(tmp_path / "few", 2000, 10)
    message = (
        r"few: expected more than 2000 images .*, found 2000 of shape \(28, 28, 1\) and 10 cla"
    )
    with pytest.raises(SystemExit, match=message):
        run(short, tmp_path, "--images", tmp_path / "few")


# scale_law.py


def test_lower_edge_lies_on_the_line_between_two_rates(load):
    scale_law = load("scale_law")
    # The log of the loss falls by 1 per power of 2 down to 0 at 2^0, and rises after 2^4.
    losses = {power: math.exp(max(-power, 0) + max(power - 4, 0)) for power in range(-6, 9, 2)}
    np.testing.assert_allclose(scale_law.lower_edge(losses), -math.log(1.1))
    assert scale_law.lower_edge(dict.fromkeys((2, 4, 6), 1.0)) == 2.0


@pytest.mark.parametrize("power", [0, 1, 2])
def test_power_is_found_wherever_the_range_lies(power, load):
    scale_law = load("scale_law")
    asked = []

    def losses(rate, scale):
        asked.append((rate, scale))
        away = rate - 2.5 - power * scale
        noise = 0.1 * np.arange(-2, 3)  # of each seed
        return np.exp(np.maximum(-away + noise, 0) + np.maximum(away - 7, 0)) / 10

    curves = {
        scale: scale_law.search(lambda rate, scale=scale: losses(rate, scale), 0)
        for scale in scale_law.SCALES
    }
    assert len(asked) == len({*asked})  # nothing trained twice
    for scale, curve in curves.items():
        means = {rate: each.mean() for rate, each in curve.items()}
        assert len(curve) >= 9
        assert list(curve) == list(range(min(curve), max(curve) + 1, 2))
        assert min(curve) < scale_law.lower_edge(means) < max(curve)
        assert np.isclose(min(means.values()), 0.1, rtol=0.05), scale
    found = scale_law.fit(curves)
    assert abs(found["power"] - power) < 0.05
    assert found["low"] <= found["power"] <= found["high"]
    assert found["high"] - found["low"] < 0.1


def test_a_range_that_is_never_found_stops(load):
    scale_law = load("scale_law")
    with pytest.raises(SystemExit, match=r"learning rate 2\^\d+ is not enough"):
        scale_law.search(lambda rate: np.array([math.exp(-rate)]), 0)


@pytest.mark.slow
def test_scale_law_on_digits(load, tmp_path, monkeypatch, capsys):
    """The fitted power is 2 for SGD and 0 for Hyperball, even after few steps."""
    scale_law = load("scale_law")
    monkeypatch.setattr(scale_law, "SCALES", (-1, 0, 2))
    options = ["--optimizer", "sgd", "hyperball", "--seeds", 2, "--epochs", 3]
    report = run(scale_law, tmp_path, *options)
    rows = report["optimizers"]
    assert abs(rows["sgd"]["power"] - 2) < 0.1
    assert abs(rows["hyperball"]["power"]) < 0.1
    assert "sgd " in capsys.readouterr().out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "runs.jsonl").read_text()
    assert run(scale_law, tmp_path, *options)["optimizers"] == rows
    assert (tmp_path / "runs.jsonl").read_text() == lines
    with pytest.raises(SystemExit, match="--seeds: expected at least 2, found 1"):
        run(scale_law, tmp_path, "--seeds", 1)


def test_every_optimizer_of_the_scale_law_has_its_symmetry(load):
    """At scale a and rate a^power, a step rotates the hidden layers by the same angle as at 1."""
    import jax
    import jax.numpy as jnp

    scale_law = load("scale_law")
    rng = np.random.default_rng(0)
    shapes = {"hidden1": {"kernel": (6, 4)}, "linear": {"kernel": (4, 2)}}
    draw = lambda s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    is_shape = lambda s: isinstance(s, tuple)  # noqa: E731
    params, grads = (jax.tree.map(draw, shapes, is_leaf=is_shape) for _ in range(2))
    x = params["hidden1"]["kernel"]
    g = grads["hidden1"]["kernel"]
    g -= x * jnp.sum(g * x, 0) / jnp.sum(x * x, 0)  # tangent, as for an invariant layer

    def angles(name, scale, rate):
        tx = scale_law.make_optimizer(name, rate, 100)
        p = params | {"hidden1": {"kernel": scale * x}}
        updates, _ = tx.update(grads | {"hidden1": {"kernel": g / scale}}, tx.init(p), p)
        moved = p["hidden1"]["kernel"] + updates["hidden1"]["kernel"]
        cosines = jnp.sum(moved * x, 0) / jnp.linalg.norm(moved, axis=0)
        np.testing.assert_allclose(np.abs(updates["linear"]["kernel"]), 0.01, rtol=1e-4)
        return jnp.arccos(cosines / jnp.linalg.norm(x, axis=0))

    for name, power in scale_law.THEORY.items():
        one = angles(name, 1.0, 0.05)
        assert np.all(one > 1e-3), name
        np.testing.assert_allclose(angles(name, 8.0, 0.05 * 8.0**power), one, rtol=1e-2)
