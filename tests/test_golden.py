"""The optimizers reproduce trajectories of the published PyTorch code under jit."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import precision

import spherical_optax as so

GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "manifest.json").read_text())
EXACT = ("adams", "sgdmrt")  # the published code of the others adds eps to squared norms


KEYWORDS = ("momentum", "dampening", "weight_decay", "delta", "wd_ratio", "nesterov")


def optimizer_of(case):
    given = case["hyperparameters"]
    first = case["optimizer"] in ("adamg", "adamp", "sgdp")
    axes = (0,) if first else given.get("channel_dims")
    every_entry = tuple(range(len(case["shape"])))
    kwargs = {key: value for key, value in given.items() if key in KEYWORDS}
    if "betas" in given:
        kwargs["b1"], kwargs["b2"] = given["betas"]
    groups = so.RadialGroup(index_axes=every_entry if axes is None else axes)
    return getattr(so, case["optimizer"])(given["lr"], groups=groups, **kwargs)


@pytest.mark.device
@pytest.mark.filterwarnings("ignore:.*entry by entry")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_published_trajectory(case, dtype):
    path = GOLDEN / f"{case['name']}.npz"
    with precision(dtype), np.load(path, allow_pickle=False) as golden:
        tx = optimizer_of(case)
        params = jnp.asarray(golden["x0"], dtype)
        state = tx.init(params)
        update = jax.jit(tx.update)
        path = [params]
        for grads in golden["grads"]:
            updates, state = update(jnp.asarray(grads, dtype), state, params)
            params = optax.apply_updates(params, updates)
            path.append(params)
        expected = golden["params"]
        error = np.abs(np.stack(path) - expected).max() / np.abs(expected).max()
        tolerance = 1e-12 if case["optimizer"] in EXACT else 1e-7
        assert error <= (tolerance if dtype == "float64" else 1e-5)
