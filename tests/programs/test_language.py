"""language.py: stopped and resumed, over several devices, and with bad input."""

import functools
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tyro
from conftest import CACHED, QUICK

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
COMMON = ["--preset", "tiny", "--steps", "24", "--checkpoint-every", "4", "--log-every", "3"]
COMMON += ["--batch", "8", "--learning-rate", "0.05"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A random text whose held-out part, the last 5 %, is longer than the context."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    rng = np.random.default_rng(0)
    words = ["the ox ", "sleeps. ", "a bird ", "sings, ", "and ", "naïve "]
    path.write_text("".join(rng.choice(words, 600)), encoding="utf-8")
    return path


@pytest.fixture
def language(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["language.py"])
    return importlib.import_module("language")


def start(text, out, *options, flags=QUICK):
    command = [sys.executable, str(EXAMPLES / "language.py"), "--text", str(text)]
    command += [*COMMON, "--out", str(out), *options]
    return subprocess.Popen(
        command,
        env=os.environ | CACHED | {"XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, out):
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    return json.loads((out / "results.json").read_text()), printed


def weights(out):
    """The arrays of the last checkpoint."""
    with ocp.CheckpointManager((out / "checkpoints").absolute()) as manager:
        arrays = ocp.args.Composite(arrays=ocp.args.StandardRestore())
        return jax.tree.leaves(manager.restore(manager.latest_step(), args=arrays).arrays)


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    return *finish(start(text, out), out), weights(out)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_killed_and_started_again_it_ends_the_same(text, tmp_path, undisturbed):
    report, printed, expected = undisturbed
    assert f"{report['held_out_nats']:.4f} nats per token" in printed
    assert (len(report["losses"]), report["looks"][-1]["step"]) == (24, 24)
    assert np.mean(report["losses"][-4:]) < 0.8 * report["losses"][0]
    process = start(text, tmp_path)
    while not list((tmp_path / "checkpoints").glob("[1-9]*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(np.random.default_rng().uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "results.json").exists()
    resumed, _ = finish(start(text, tmp_path), tmp_path)
    for key in ("losses", "looks", "held_out_nats", "sample"):
        assert resumed[key] == report[key], key
    for a, b in zip(weights(tmp_path), expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_eight_devices_give_the_losses_of_one(text, tmp_path, undisturbed):
    flags = f"{QUICK} --xla_force_host_platform_device_count=8"
    process = start(text, tmp_path, "--mesh", "data=4,model=2", flags=flags)
    report, _ = finish(process, tmp_path)
    np.testing.assert_allclose(report["losses"], undisturbed[0]["losses"], atol=2e-5)
    angles = [each["looks"][-2]["angle"] for each in (report, undisturbed[0])]
    np.testing.assert_allclose(*(list(each.values()) for each in angles), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["adamh", "muonh", "adamw", "muon", "adamsrt", "rotational_adamw", "ngpt"]
)
def test_each_optimizer_lowers_the_loss(language, name):
    size = language.Size(1, 16, 2, 32, 8, 32, normalized=name == "ngpt")
    graph, params = language.initialise(size, 0)
    tx = language.make_optimizer(name, 0.02, 0.02, size)
    state = tx.init(params)
    step = jax.jit(functools.partial(language.update, tx, graph), donate_argnums=(0, 1))
    tokens, losses = jnp.arange(36).reshape(4, 9) % 7, []
    for _ in range(8):
        params, state, metrics = step(params, state, tokens)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0]
    assert metrics["angle"].keys() == metrics["radius"].keys()
    assert min(metrics["angle"].values()) > 0
    if name == "ngpt":
        np.testing.assert_allclose(list(metrics["radius"].values()), 1, rtol=1e-5)


@pytest.mark.slow
def test_parts_of_a_batch_add_up(language):
    size = language.Size(1, 16, 2, 32, 8, 32)
    graph, params = language.initialise(size, 0)
    tx = language.make_optimizer("adamw", 0.02, 0.02, size)
    tokens = jnp.arange(72).reshape(8, 9) % 7
    whole, parts = (
        language.update(tx, graph, params, tx.init(params), tokens, accumulate=n) for n in (1, 4)
    )
    np.testing.assert_allclose(parts[2]["loss"], whole[2]["loss"], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(parts[1]), jax.tree.leaves(whole[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_schedules(language):
    for kind, last in (("cosine", 0.0), ("linear", 0.0), ("constant", 2.0)):
        schedule = language.make_schedule(2.0, 4, 20, kind)
        values = [float(schedule(count)) for count in range(21)]
        np.testing.assert_allclose(values[:4], [0.4, 0.8, 1.2, 1.6], rtol=1e-6)
        np.testing.assert_allclose([values[4], values[20]], [2.0, last], rtol=1e-6, atol=1e-6)
    half = language.make_schedule(2.0, 0, 20, "linear")(10)
    np.testing.assert_allclose(half, 1.0, rtol=1e-6)


@pytest.mark.parametrize("level", ["byte", "character"])
def test_text_comes_back_from_its_tokens(language, text, level):
    words = text.read_text(encoding="utf-8")
    found = language.encode(words, level)
    both = np.concatenate([found.train, found.held_out])
    assert language.decode(both, found, level) == words
    assert both.max() < len(found.symbols)
    held_out = language.decode(found.held_out, found, level).encode()
    assert found.bytes_per_token == len(held_out) / len(found.held_out)


def test_batches_go_on_from_where_they_were(language, text):
    tokens = language.encode(text.read_text(encoding="utf-8"), "byte").train
    one, other = (language.batches(tokens, 16, 4, seed=3) for _ in range(2))
    seen = [next(one) for _ in range(5)]
    state = one.get_state()
    following = [next(one) for _ in range(60)]  # more than a pass
    other.set_state(state)
    np.testing.assert_array_equal([next(other) for _ in range(60)], following)
    starts = {batch.tobytes() for batch in seen + following}
    assert len(starts) == 65


def stopped(language, *options):
    with pytest.raises(SystemExit) as error:
        language.main(tyro.cli(language.Config, args=[*COMMON, *map(str, options)]))
    message = str(error.value)
    assert "\n" not in message
    return message


def test_bad_input_is_one_line(language, text, tmp_path, monkeypatch):
    def message(*options, given=text):
        return stopped(language, "--text", given, "--out", tmp_path / "out", *options)

    latin, short = tmp_path / "latin.txt", tmp_path / "short.txt"
    latin.write_bytes("naïve".encode("latin-1"))
    short.write_text("too short")
    assert "expected text in UTF-8, found the byte 0xef at position 2" in message(given=latin)
    assert "expected more than 32 tokens, the context, in the held-out" in message(given=short)
    assert message(given=tmp_path / "none").endswith("none: No such file or directory")
    assert "--mesh: expected such as data=4,model=2, found 8" in message("--mesh", "8")
    mesh = message("--mesh", "data=64")
    assert f"--mesh: expected at most {jax.device_count()} devices, as there are" in mesh
    assert "--batch: expected a multiple of 3 parts, found 8" in message("--accumulate", 3)
    assert "--steps: expected at least 1, found 0" in message("--steps", 0)
    assert "--learning-rate: expected a positive number" in message("--learning-rate", -1)
    monkeypatch.setattr(language, "available_memory", lambda: 1e6)
    needs = "--preset: expected to fit in 0.0 GB, found that tiny with 8 windows at once needs"
    assert needs in message()


def test_without_a_text_it_says_how_to_get_one(language, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "apt-get install bible-kjv" in stopped(language, "--out", tmp_path)


def test_a_checkpoint_of_another_configuration(language, text, tmp_path):
    """A checkpoint of another configuration is refused before its arrays are used."""
    options = ["--text", text, "--out", tmp_path]
    config = tyro.cli(language.Config, args=[*COMMON, *map(str, options)])
    run = language.Run((jnp.zeros(2),), (), language.batches(np.arange(99), 8, 2, 0), [1.0])
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        language.save(manager, config, run)
    message = stopped(language, *options, "--seed", 5)
    assert f"--seed: expected 0, as in the checkpoint in {tmp_path}, found 5" in message
