"""The accelerator of this machine gives the numbers of the CPU: `make test-device`, 90 seconds.

It needs JAX, Optax, Flax and pytest, but no network. Without an accelerator, compiled programs are
compared with operations one by one.
"""

import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import spherical_optax as so

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
from helpers.transformer import Size, initialise, invariant
from paper.models import GROUPS, make_model

pytestmark = [pytest.mark.device, pytest.mark.slow]

GROUP = {
    "filters": so.groups_by_path({"conv/kernel|dense/kernel": so.per_filter()}),
    "layers": so.groups_by_path({"conv/kernel|dense/kernel": so.per_layer()}),
    "joint": so.groups_by_path({"conv": so.per_filter(), "dense": so.per_filter(joint="dense")}),
}
ADAM = optax.adam(0.05)
OPTIMIZERS = {
    "adams": lambda groups: so.adams(0.1, groups=groups),
    "adamsrt": lambda groups: so.adamsrt(0.1, groups=groups, weight_decay=0.01),
    "adamsw": lambda groups: so.adamsw(0.1, groups=groups, weight_decay=0.01),
    "adamsrtw": lambda groups: so.adamsrtw(0.1, groups=groups, weight_decay=0.01),
    "sgdmrt": lambda groups: so.sgdmrt(0.1, 0.8, groups=groups),
    "adamg": lambda groups: so.adamg(0.1, groups=groups, other=ADAM),
    "adamg_star": lambda groups: so.adamg_star(0.1, 0.1, groups=groups),
    "adamp": lambda groups: so.adamp(0.1, groups=groups, delta=1.0),
    "sgdp": lambda groups: so.sgdp(0.1, groups=groups, delta=1.0),
    "adamh": lambda groups: so.adamh(0.1, groups=groups, other=ADAM),
    "muonh": lambda groups: so.muonh(0.1, groups=groups, other=ADAM),
    "rotational_adamw": lambda groups: so.rotational_adamw(0.1, weight_decay=0.1, groups=groups),
    "rotational_sgdm": lambda groups: so.rotational_sgdm(0.1, weight_decay=0.1, groups=groups),
    "rotational_lion": lambda groups: so.rotational_lion(0.1, weight_decay=0.1, groups=groups),
    "composed": lambda groups: so.chain(
        so.transport_moments(optax.scale_by_adam(), groups),
        so.project_radial(groups),
        so.normalize_updates(groups),
        so.scale_by_learning_rates(0.1, groups=groups, other=ADAM),
        so.retract(groups),
        so.record_sphere(groups),
    ),
}


def trees(dtype):
    """Parameters, and the gradients of three steps."""
    rng = np.random.default_rng(0)
    shapes = {
        "conv": {"kernel": (3, 3, 64, 128)},
        "dense": {"kernel": (96, 160), "bias": (160,)},
        "head": {"kernel": (160, 10)},
    }
    return [
        jax.tree.map(
            lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
            shapes,
            is_leaf=lambda node: isinstance(node, tuple),
        )
        for _ in range(4)
    ]


def trajectory(tx, dtype, device, update):
    with jax.default_device(device):
        params, *grads = trees(dtype)
        state = tx.init(params)
        for g in grads:
            updates, state = update(g, state, params)
            params = optax.apply_updates(params, updates)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def both(tx, dtype):
    """Trajectories on the device, compiled, and on the CPU, operation by operation."""
    here, cpu = jax.devices()[0], jax.local_devices(backend="cpu")[0]
    return trajectory(tx, dtype, here, jax.jit(tx.update)), trajectory(tx, dtype, cpu, tx.update)


@pytest.mark.parametrize("groups", GROUP)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_steps_are_those_of_the_cpu(name, groups):
    if name == "muonh" and groups == "joint":
        groups = "layers"  # filters joined with biases are not matrices
    found, expected = both(OPTIMIZERS[name](GROUP[groups]), "float32")
    # MuonH multiplies matrices, which an accelerator may do in TensorFloat-32.
    tolerance = 0.02 if name == "muonh" else 2e-5
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance), found, expected
    )


@pytest.mark.parametrize("name", ["adamsrt", "adamg", "adamp", "adamh", "rotational_adamw"])
def test_narrow_weights(name):
    """bfloat16 weights agree with those of the CPU to two roundings."""
    found, expected = both(OPTIMIZERS[name](GROUP["filters"]), "bfloat16")
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2**-6, atol=2**-6), found, expected
    )


def resnet20():
    graph, params, stats = nnx.split(make_model("resnet20", 0, width=4), nnx.Param, nnx.BatchStat)

    def forward(params, images):
        return nnx.merge(graph, params, stats, copy=True)(images)

    return forward, params, jax.random.normal(jax.random.key(0), (4, 16, 16, 3)), GROUPS


def transformer():
    size = Size(2, 32, 2, 64, 16, 32)
    graph, params = initialise(size, 0)

    def forward(params, tokens):
        return nnx.merge(graph, params)(tokens)

    return forward, params, jnp.arange(32).reshape(2, 16) % 32, invariant(size)


def counts(params, groups):
    """By path, the number of groups and the number of entries per group."""
    lines = so.describe_groups(params, groups).split("\ninvariant up to")[0].splitlines()
    columns = re.compile(r"^(\S+) +\(.*?\) +(\S+) +(\S+)")
    return {match[1]: match.group(2, 3) for line in lines[1:] if (match := columns.match(line))}


@pytest.mark.parametrize("model", [resnet20, transformer])
def test_detection_finds_the_groups_on_the_device(model):
    forward, params, inputs, groups = model()
    found = so.find_radial_groups(forward, params, inputs)
    wanted, there = (counts(params, each) for each in (groups, found))
    grouped = {path: each for path, each in wanted.items() if each[0] != "-"}
    assert grouped
    assert grouped == {path: there[path] for path in grouped}
