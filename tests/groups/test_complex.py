"""With complex weights, the real and imaginary parts of a filter form one group."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so

RNG = np.random.default_rng(0)


def new(*shape):
    return jnp.asarray(RNG.normal(size=shape) + 1j * RNG.normal(size=shape), jnp.complex64)


W, GOAL, X = new(6, 3), new(6, 3), new(32, 6)
PARAMS = {"spectral": {"w": W}, "bias": jnp.ones(3)}


def unit(w):
    return w / jnp.sqrt((jnp.abs(w) ** 2).sum(0))


def loss(params):
    """A loss of the direction of each column, from 0 to 12."""
    return (jnp.abs(unit(params["spectral"]["w"]) - unit(GOAL)) ** 2).sum()


def fn(params, x):
    return x @ unit(params["spectral"]["w"]) + params["bias"]


GROUPS = {
    "a tree": {"spectral": {"w": so.per_filter()}, "bias": None},
    "a prefix": {"spectral": so.per_filter(), "bias": None},
    "rules": so.groups_by_path({"spectral/w": so.per_filter()}),
    "a label": so.groups_by_path({"(spectral/w)/": so.RadialGroup((-1,), joint=r"\1")}),
}
OPTIMIZERS = {
    "adamh": lambda groups: so.adamh(0.05, groups=groups, other=optax.adam(0.1)),
    "rotational_adamw": lambda groups: so.rotational_adamw(0.05, weight_decay=0.5, groups=groups),
    "adamsrt": lambda groups: so.adamsrt(0.1, groups=groups),
}


@pytest.mark.parametrize("form", GROUPS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loss_over_complex_weights_trains(name, form):
    schedule = optax.cosine_decay_schedule(1.0, 300)
    tx = optax.contrib.split_real_and_imaginary(
        optax.chain(OPTIMIZERS[name](GROUPS[form]), optax.scale_by_schedule(schedule))
    )
    params, state = PARAMS, tx.init(PARAMS)

    @jax.jit
    def step(params, state):
        g = jax.tree.map(jnp.conj, jax.grad(loss)(params))
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    lengths = lambda params: np.linalg.norm(params["spectral"]["w"], axis=0)  # noqa: E731
    for _ in range(300):
        params, state = step(params, state)
    assert loss(params) < 1e-4
    if name != "adamsrt":
        # Not exact, because the schedule scales updates after the retraction.
        np.testing.assert_allclose(lengths(params), lengths(PARAMS), rtol=2e-3)


def test_one_group_of_both_parts_has_one_length_and_one_moment():
    tx = optax.contrib.split_real_and_imaginary(so.adamsrt(0.1, groups=GROUPS["a tree"]))
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    nu = optax.tree.get(state, "nu")["spectral"]["w"]
    np.testing.assert_array_equal(nu.real, nu.imaginary)


def test_groups_of_complex_leaves_are_described_found_and_checked():
    table = so.describe_groups(PARAMS, GROUPS["a tree"])
    assert [line.split()[:6] for line in table.splitlines()[2:]] == [
        ["spectral/w/real", "(6,", "3)", "3", "12", "spectral/w"],
        ["spectral/w/imaginary", "(6,", "3)", "3", "12", "spectral/w"],
    ]
    found = so.find_radial_groups(fn, PARAMS, X)
    assert found == {"spectral": {"w": so.per_filter()}, "bias": None}
    assert so.describe_groups(PARAMS, found) == table
    so.check_radial_groups(fn, PARAMS, GROUPS["rules"], X)
    with pytest.raises(ValueError, match=r"spectral/w/real of shape \(6, 3\), spectral/w/imag"):
        so.check_radial_groups(fn, PARAMS, {"spectral": so.per_layer(), "bias": None}, X)
    shapes = jax.eval_shape(lambda: PARAMS)
    assert so.find_radial_groups(fn, shapes, X) == found


def test_a_complex_leaf_without_the_wrapper_is_refused_with_what_to_do():
    with pytest.raises(TypeError, match=r"spectral/w .* complex64.*split_real_and_imaginary"):
        OPTIMIZERS["adamh"](GROUPS["rules"]).init(PARAMS)
