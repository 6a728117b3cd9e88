"""Differences between a stored state and the state that the optimizer expects are named."""

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import spherical_optax as so

PARAMS = {"conv": {"kernel": jnp.ones((3, 3, 2, 4))}, "head": {"kernel": jnp.ones((4, 2))}}
FILTERS = so.groups_by_path({r"conv/kernel": so.per_filter()})
LAYER = so.groups_by_path({r"conv/kernel": so.per_layer()})


def differences(expected, stored):
    return so.state_differences(jax.eval_shape(expected.init, PARAMS), stored)


def test_nothing_differs_from_itself_in_memory_and_on_disk(tmp_path):
    for tx in (
        so.adamsrt(1e-2, groups=FILTERS),
        so.adamh(1e-2, groups=LAYER, other=optax.adam(1e-2)),
        optax.adam(1e-2),
    ):
        state = tx.init(PARAMS)
        assert differences(tx, state) == []
        path = tmp_path / str(id(tx))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, state)
            checkpointer.wait_until_finished()
            stored = checkpointer.metadata(path)
        assert differences(tx, getattr(stored, "item_metadata", stored)) == []


def test_each_array_that_differs_is_named_once():
    stored = so.adamsrt(1e-2, groups=FILTERS).init(PARAMS)
    other = so.adamsrt(1e-2, groups=LAYER)
    line = "1.nu.conv.kernel: expected float32[], found float32[4]"
    assert differences(other, stored) == [line]

    half = so.adamsrt(1e-2, groups=FILTERS, mu_dtype=jnp.bfloat16)
    wrong = differences(half, stored)
    assert "1.mu.conv.kernel: expected bfloat16[3,3,2,4], found float32[3,3,2,4]" in wrong
    assert all("bfloat16" in each for each in wrong)


def test_what_is_on_one_side_only():
    stored = optax.trace(0.9).init(PARAMS)
    expected = optax.chain(optax.trace(0.9), so.record_sphere(FILTERS))
    missing = differences(expected, (stored,))
    assert missing
    assert all(each.startswith("1.") and "found nothing" in each for each in missing)
    extra = so.state_differences((stored,), expected.init(PARAMS))
    assert len(extra) == len(missing)
    assert all("expected nothing, found float32[" in each for each in extra)
