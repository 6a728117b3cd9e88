"""Masks of weight decay, and learning rates of leaves with and without groups."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trajectory import run

import spherical_optax as so

GROUPS = {"a": so.per_filter(), "b": None, "c": None}
INNER = optax.scale_by_adam
DECAYED = {
    "adams": so.adams,
    "adamsw": so.adamsw,
    "adamsrt": so.adamsrt,
    "adamsrtw": so.adamsrtw,
    "sgdmrt": so.sgdmrt,
    "adamp": so.adamp,
    "sgdp": so.sgdp,
    "rotational_adamw": so.rotational_adamw,
    "rotational_sgdm": so.rotational_sgdm,
    "rotational_lion": so.rotational_lion,
}


def params_of():
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 3), "b": (3,), "c": (3,)}
    return {name: jnp.asarray(rng.normal(size=shape), "float32") for name, shape in shapes.items()}


def first_update(tx):
    params = params_of()
    return tx.update(jax.tree.map(lambda x: x**2, params), tx.init(params), params)[0]


@pytest.mark.parametrize("name", DECAYED)
def test_other_leaves_have_a_learning_rate_of_their_own(name):
    make = DECAYED[name]
    fast, slow = (first_update(make(rate, groups=GROUPS)) for rate in (0.1, 0.01))
    found = first_update(make(0.1, groups=GROUPS, other_learning_rate=0.01))
    np.testing.assert_array_equal(found["a"], fast["a"])
    np.testing.assert_array_equal(found["b"], slow["b"])
    assert np.abs(fast["b"] - slow["b"]).max() > 1e-3
    with pytest.raises(ValueError, match=rf"{name}: expected other_learning_rate in \[0, inf\)"):
        make(0.1, groups=GROUPS, other_learning_rate=-1.0)


@pytest.mark.parametrize("name", DECAYED)
def test_a_masked_leaf_does_not_decay(name):
    """Without gradients, only weight decay moves leaves; it never moves rotational groups."""
    params = params_of()
    zeros = jax.tree.map(jnp.zeros_like, params)
    for decays in ({"a": True, "b": True, "c": False}, {"a": False, "b": True, "c": False}):
        tx = DECAYED[name](0.1, groups=GROUPS, weight_decay=0.1, mask=decays)
        updates, _ = tx.update(zeros, tx.init(params), params)
        moved = {key: bool(np.any(update)) for key, update in updates.items()}
        assert moved == {**decays, "a": decays["a"] and "rotational" not in name}


def test_decay_of_one_leaf_of_a_joint_group():
    """AdamP's weight decay follows the mask leaf by leaf within a joint group."""
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    zeros, mask = jax.tree.map(jnp.zeros_like, params), {"kernel": True, "bias": False}
    tx = so.project_if_tangent(
        optax.scale(1.0), so.per_layer(joint="fc"), weight_decay=0.5, wd_ratio=1.0, mask=mask
    )
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_array_equal(updates["kernel"], np.full((2, 3), 0.5))
    np.testing.assert_array_equal(updates["bias"], np.zeros(3))


MASKS = {
    "tree": {"layer": {"kernel": True, "bias": False}, "scale": False},
    "prefix": {"layer": True, "scale": np.bool_(False)},
    "function": lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
}


@pytest.mark.parametrize("form", MASKS)
def test_masks_are_those_of_optax(form):
    params = {"layer": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "scale": jnp.ones(3)}
    given = {"weight_decay": 0.1, "mask": MASKS[form]}
    ours = run(so.adamsw(0.1, groups=dict.fromkeys(params), **given), params, [params] * 2)
    theirs = run(optax.adamw(0.1, **given), params, [params] * 2)
    for a, b in zip(ours, theirs, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", ["adamsw", "adamp"])
@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ({"a": True, "b": True}, ValueError, r"found nothing for c of shape \(3,\); put True or"),
        (
            {"a": True, "b": True, "c": False, "d": False},
            ValueError,
            r"expected mask to be a pytree prefix of the parameters, found \['d'\], which no",
        ),
        ({"a": 1.0, "b": True, "c": True}, TypeError, "True or False in mask for a, found 1.0 of"),
        (False, ValueError, r"a function, found False for all.*none, set weight_decay=0\. Under"),
    ],
    ids=["missing", "unknown", "no boolean", "one for all"],
)
def test_a_mask_that_does_not_fit(name, mask, error, message):
    tx = DECAYED[name](0.1, groups=GROUPS, weight_decay=0.1, mask=mask)
    with pytest.raises(error, match=message):
        tx.init(params_of())


@pytest.mark.parametrize("name", ["adamsw", "adamp"])
def test_a_mask_that_was_called_with_a_step(name):
    """The error says that `inject_hyperparams` calls a mask function with a step."""
    make = optax.inject_hyperparams(DECAYED[name], static_args=("groups",))
    tx = make(0.1, groups=GROUPS, weight_decay=0.1, mask=MASKS["function"])
    with pytest.raises(ValueError, match=r"in static_args\. Otherwise it is called with a step"):
        tx.init(params_of())
    make = optax.inject_hyperparams(DECAYED[name], static_args=("groups", "mask"))
    make(0.1, groups=GROUPS, weight_decay=0.1, mask=MASKS["function"]).init(params_of())
