"""Training that is killed at any moment and resumed, and checkpoints restored with other groups."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import spherical_optax as so

WORKER = pathlib.Path(__file__).parents[1] / "resume_worker.py"
STEPS = 10


def work(directory, kill_at=None, delay=0.0):
    """Runs the worker, and returns its lines of output.

    With `kill_at`, it is killed `delay` seconds after it prints that line.
    """
    directory.mkdir(exist_ok=True)
    command = [sys.executable, str(WORKER), str(directory), str(STEPS)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with (
        open(directory / "stderr", "w") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):
        lines = []
        for line in process.stdout:
            lines.append(line.strip())
            if lines[-1] == kill_at:
                time.sleep(delay)
                process.kill()
    expected = 0 if kill_at is None else -signal.SIGKILL
    assert process.returncode == expected, (directory / "stderr").read_text()
    return lines


def unfinished(directory):
    return [path.name for path in (directory / "checkpoints").glob("*.orbax-checkpoint-tmp*")]


def arrays(directory):
    with np.load(directory / "final.npz", allow_pickle=False) as final:
        return dict(final)


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert work(whole) == [f"{what} {n}" for n in range(STEPS) for what in ("step", "saving")]

    moments = (("saving 0", 0.0), ("saving 2", 0.0), ("saving 4", 0.02), ("step 7", 0.005))
    left, starts = [], []
    for kill_at, delay in (*moments, (None, 0.0)):
        lines = work(killed, kill_at, delay)
        starts.append(int(lines[0 if not starts or lines[0] == "step 0" else 1].split()[1]))
        left.append(unfinished(killed))
    assert lines[-1] == f"saving {STEPS - 1}"
    assert any(left)  # at least once it was killed while it wrote
    assert not left[-1]
    # At most two steps are lost: the one being written, and the one being computed.
    for start, (kill_at, _) in zip(starts[1:], moments, strict=True):
        assert start >= int(kill_at.split()[1]) - 1
    assert sorted(path.name for path in (killed / "checkpoints").iterdir()) == ["8", "9"]

    expected, found = arrays(whole), arrays(killed)
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


FILTER, ROW, LAYER = so.per_filter(), so.RadialGroup((0,)), so.per_layer()
PARAMS = {"block": {"kernel": jnp.arange(1.0, 13.0).reshape(3, 4)}, "bias": jnp.ones(2)}
STATEFUL = {
    "scale_by_adams": lambda groups: so.scale_by_adams(groups=groups),
    "scale_by_adamsrt": lambda groups: so.scale_by_adamsrt(groups=groups),
    "transport_moments": lambda groups: so.transport_moments(optax.trace(0.9), groups),
    "normalize_updates": lambda groups: so.normalize_updates(groups, decay=0.9),
    "retract": lambda groups: so.retract(groups),
    "scale_by_adamg_star": lambda groups: so.scale_by_adamg_star(0.1, 0.0, groups=groups),
    "record_sphere": lambda groups: so.record_sphere(groups),
    "record_gradient": lambda groups: so.record_gradient(groups),
}


def grouped(group):
    return so.groups_by_path({"kernel": group})


@pytest.mark.parametrize("other", [LAYER, ROW, so.per_channel_block(2)])
@pytest.mark.parametrize("name", STATEFUL)
def test_state_of_other_groups_is_refused_at_the_next_update(name, other):
    state = STATEFUL[name](grouped(FILTER)).init(PARAMS)
    rows = (5,) if name == "record_sphere" else ()
    expected, found = (re.escape(str((*rows, *group.shape((3, 4))))) for group in (other, FILTER))
    message = f"^{name}: .*expected state of shapes? .*{expected}.*found .*{found}.*other groups"
    with pytest.raises(ValueError, match=message) as error:
        STATEFUL[name](grouped(other)).update(PARAMS, state, PARAMS)
    assert "block/kernel" in str(error.value)


@pytest.mark.parametrize("other", [LAYER, ROW])
def test_a_checkpoint_of_other_groups_is_refused_by_orbax(other, tmp_path):
    """Orbax refuses a checkpoint of other groups, but without the parameter's name.

    The check in docs/scaling.md names the parameter.
    """
    params = {"kernel": jnp.ones((3, 4))}
    expected = jax.eval_shape(so.retract(grouped(other)).init, params)
    with ocp.CheckpointManager(tmp_path) as manager:
        state = so.retract(grouped(FILTER)).init(params)
        manager.save(0, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        shape = re.escape(f"{expected.target_radius['kernel'].shape}")
        message = rf"Requested shape: {shape} is not compatible with the stored shape: \(4,\)"
        with pytest.raises(ValueError, match=message):
            manager.restore(0, args=ocp.args.StandardRestore(expected))


@pytest.mark.parametrize(
    ("saved", "other"),
    [(FILTER, ROW), (LAYER, so.per_layer(joint="all"))],
)
def test_groups_of_the_same_shapes_are_not_told_apart(saved, other):
    """Groups whose state has the same shapes are not told apart, as docs/scaling.md warns."""
    params = {"kernel": jnp.ones((3, 3))}
    state = so.scale_by_adamsrt(groups=grouped(saved)).init(params)
    so.scale_by_adamsrt(groups=grouped(other)).update(params, state, params)
