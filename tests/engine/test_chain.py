"""Chains equal Optax's in results and state, but in two passes; optimizers are such chains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layouts import CASES, tree_of
from trajectory import run

import spherical_optax as so
from spherical_optax._engine import passes
from spherical_optax._masks import in_groups

RATE = optax.linear_schedule(0.2, 0.05, 4)
LAYOUTS = ("filters", "stacked layers", "joint blocks", "alike, joint", "no group")


def decayed(weight_decay):
    return optax.add_decayed_weights(weight_decay)


def rates(groups, rate=RATE, other=None):
    return so.scale_by_learning_rates(rate, groups=groups, other=other)


def moments(groups):
    return so.scale_by_adams(0.8, 0.9, 1e-3, groups=groups)


def masked(groups, inner):
    return optax.masked(inner, in_groups(groups, True))


def angle(factor):
    """The schedule of a rotational variant's angle with a weight decay of 0.1."""
    return lambda count: jnp.sqrt(2 * RATE(count) * 0.1 * factor)


ADAM = (0.8, 0.9, 1e-3)
OTHER = optax.sgd(0.1, 0.7)
LION = 0.5 * np.pi * ((1 - 0.8) ** 2 + 0.8**2 * (1 - 0.9) / (1 + 0.9))

# Each optimizer, and the transforms that a user would chain instead.
OPTIMIZERS = {
    "adams": (
        lambda groups: so.adams(RATE, *ADAM, groups=groups, weight_decay=0.1),
        lambda groups: (decayed(0.1), moments(groups), rates(groups)),
    ),
    "adamsw": (
        lambda groups: so.adamsw(RATE, *ADAM, groups=groups, weight_decay=0.1),
        lambda groups: (moments(groups), decayed(0.1), rates(groups)),
    ),
    "adamsrt": (
        lambda groups: so.adamsrt(RATE, *ADAM, groups=groups, weight_decay=0.1),
        lambda groups: (decayed(0.1), so.scale_by_adamsrt(*ADAM, groups=groups), rates(groups)),
    ),
    "adamsrtw": (
        lambda groups: so.adamsrtw(RATE, *ADAM, groups=groups, weight_decay=0.1),
        lambda groups: (so.scale_by_adamsrt(*ADAM, groups=groups), decayed(0.1), rates(groups)),
    ),
    "sgdmrt": (
        lambda groups: so.sgdmrt(RATE, 0.8, 0.1, groups=groups, other_learning_rate=0.3),
        lambda groups: (
            optax.identity(),
            optax.scale(0.9),
            so.transported_trace(0.8, groups=groups),
            rates(groups, other=optax.scale_by_learning_rate(0.3)),
        ),
    ),
    "adamg": (
        lambda groups: so.adamg(RATE, *ADAM, groups=groups, other=OTHER),
        lambda groups: (
            so.scale_by_adamg(*ADAM, groups=groups),
            rates(groups, other=OTHER),
            so.retract(groups, radius=1.0),
        ),
    ),
    "adamg_star": (
        lambda groups: so.adamg_star(0.1, 0.2, groups=groups),
        lambda groups: (
            so.scale_by_adamg_star(0.1, 0.2, groups=groups),
            so.retract(groups, radius=1.0),
        ),
    ),
    "adamp": (
        lambda groups: so.adamp(RATE, *ADAM, groups=groups, weight_decay=0.1),
        lambda groups: (
            so.project_if_tangent(optax.scale_by_adam(*ADAM), groups, weight_decay=0.1),
            rates(groups),
        ),
    ),
    "sgdp": (
        lambda groups: so.sgdp(RATE, 0.8, groups=groups),
        lambda groups: (
            optax.identity(),
            so.project_if_tangent(optax.trace(0.8), groups, first_moments=("trace",)),
            rates(groups),
        ),
    ),
    "hyperball": (
        lambda groups: so.hyperball(optax.trace(0.8), RATE, groups=groups, other=OTHER),
        lambda groups: (
            masked(groups, optax.trace(0.8)),
            so.normalize_updates(groups),
            rates(groups, other=OTHER),
            so.retract(groups),
        ),
    ),
    "adamh": (
        lambda groups: so.adamh(RATE, *ADAM, groups=groups, other=OTHER, radius=2.0),
        lambda groups: (
            masked(groups, optax.scale_by_adam(*ADAM)),
            so.normalize_updates(groups),
            rates(groups, other=OTHER),
            so.retract(groups, 2.0),
        ),
    ),
    "rotational": (
        lambda groups: so.rotational(
            optax.trace(0.8), RATE, groups=groups, other=OTHER, decay=0.7, eps=1e-3
        ),
        lambda groups: (
            masked(groups, optax.trace(0.8)),
            so.project_radial(groups),
            so.normalize_updates(groups, decay=0.7, eps=1e-3),
            rates(groups, other=OTHER),
            so.retract(groups),
        ),
    ),
    "rotational_adamw": (
        lambda groups: so.rotational_adamw(RATE, *ADAM, groups=groups, weight_decay=0.1),
        lambda groups: (
            masked(groups, optax.scale_by_adam(*ADAM)),
            so.project_radial(groups),
            so.normalize_updates(groups, decay=0.9, eps=1e-8),
            rates(groups, angle(0.2 / 1.8), optax.adamw(RATE, *ADAM, weight_decay=0.1)),
            so.retract(groups),
        ),
    ),
    "rotational_sgdm": (
        lambda groups: so.rotational_sgdm(RATE, 0.8, groups=groups, weight_decay=0.1),
        lambda groups: (
            masked(groups, optax.trace(0.8)),
            so.project_radial(groups),
            so.normalize_updates(groups, decay=0.9, eps=1e-8),
            rates(groups, angle(1 / 1.8), optax.chain(decayed(0.1), optax.sgd(RATE, 0.8))),
            so.retract(groups),
        ),
    ),
    "rotational_lion": (
        lambda groups: so.rotational_lion(RATE, 0.8, 0.9, groups=groups, weight_decay=0.1),
        lambda groups: (
            masked(groups, optax.scale_by_lion(0.8, 0.9)),
            so.project_radial(groups),
            so.normalize_updates(groups, decay=0.9, eps=1e-8),
            rates(groups, angle(LION), optax.lion(RATE, 0.8, 0.9, weight_decay=0.1)),
            so.retract(groups),
        ),
    ),
}


def works(name, case):
    """Whether an optimizer accepts a case: those that keep a radius need groups."""
    return case != "no group" or name in (
        "adams",
        "adamsw",
        "adamsrt",
        "adamsrtw",
        "sgdmrt",
        "adamp",
    )


def assert_equal(ours, theirs, **tolerance):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


QUICK = ("filters", "joint blocks")
PAIRS = [(n, c) for n in OPTIMIZERS for c in LAYOUTS if works(n, c)]


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(n, c, marks=[pytest.mark.slow] * (c not in QUICK)) for n, c in PAIRS],
)
def test_an_optimizer_is_its_chain_and_that_is_optaxs(name, case, x64):
    """An optimizer equals its chain, and the same transforms chained by Optax."""
    shapes, groups = CASES[case]
    params, grads = tree_of(shapes, 0), [tree_of(shapes, seed) for seed in range(1, 4)]
    make, parts = OPTIMIZERS[name]
    ends = [run(tx, params, grads) for tx in (make(groups), so.chain(*parts(groups)))]
    assert_equal(*ends, rtol=1e-12, atol=1e-12)
    assert_equal(ends[0], run(optax.chain(*parts(groups)), params, grads), rtol=1e-11, atol=1e-11)


def without_checks(state):
    """A chain's state without the empty states, such as those of checks at `init`."""
    return [each for each in state if each != optax.EmptyState()]


def compiled(tx, params):
    def step(params, state):
        grads = jax.tree.map(jnp.sin, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params)).compile()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_chain_has_the_state_and_takes_the_memory_of_its_optimizer(name):
    params = {"a": jnp.ones((512, 192)), "b": jnp.ones((512, 192)), "rest": jnp.ones(192)}
    groups = so.groups_by_path({"a|b": so.per_filter()})
    make, parts = OPTIMIZERS[name]
    optimizer, joined, apart = (
        make(groups),
        so.chain(*parts(groups)),
        optax.chain(*parts(groups)),
    )
    states = [tx.init(params) for tx in (optimizer, joined, apart)]
    assert jax.tree.structure(states[1]) == jax.tree.structure(states[2])
    structures = [jax.tree.structure(without_checks(state)) for state in states]
    assert structures[0] == structures[1]
    memory, own = (
        compiled(tx, params).memory_analysis().temp_size_in_bytes for tx in (joined, optimizer)
    )
    assert memory <= 1.02 * own


def test_parts_apart_take_more_memory():
    """Fusing saves memory; the test above would not notice if nothing was fused."""
    params = {"a": jnp.ones((512, 192)), "b": jnp.ones((512, 192))}
    parts = OPTIMIZERS["hyperball"][1](so.per_filter())
    memory = [
        compiled(make(*parts), params).memory_analysis().temp_size_in_bytes
        for make in (so.chain, optax.chain)
    ]
    assert memory[0] < 0.7 * memory[1]


@pytest.mark.parametrize(
    ("parts", "pairs"),
    [
        (OPTIMIZERS["hyperball"][1], [3]),
        (OPTIMIZERS["rotational"][1], [3]),
        (OPTIMIZERS["adamg"][1], [6]),
        (OPTIMIZERS["adamp"][1], [4]),
        (OPTIMIZERS["adamsrt"][1], [5]),
        (lambda groups: (so.transported_trace(0.9, groups=groups),), [4]),
        (lambda groups: (so.retract(groups), optax.identity(), so.retract(groups)), [3, 3]),
        (lambda groups: (so.retract(groups), so.retract(so.per_layer())), [3, 3]),
        (lambda groups: (so.project_radial(groups),), [2]),
    ],
)
def test_sums_in_one_pass_and_no_more_than_needed(parts, pairs, monkeypatch):
    asked = []

    def asking(request):
        asked.append(len(request.pairs))
        return inner_products(request)

    inner_products = passes.inner_products
    monkeypatch.setattr(passes, "inner_products", asking)
    params = tree_of({"a": (3, 4)}, 0, "float32")
    tx = so.chain(*parts(so.per_filter()))
    tx.update(params, tx.init(params), params)
    assert asked == pairs


@pytest.mark.parametrize(
    ("groups", "other"),
    [
        (so.per_filter(), so.per_filter()),
        ({"a": so.per_layer()}, {"a": so.per_layer()}),
        (so.groups_by_path({"a": True}), so.groups_by_path({"a": True})),
        (True, True),
    ],
)
def test_equal_groups_join(groups, other, monkeypatch):
    calls = []
    inner_products = passes.inner_products
    monkeypatch.setattr(
        passes, "inner_products", lambda request: calls.append(0) or inner_products(request)
    )
    params = tree_of({"a": (3, 4)}, 0, "float32")
    tx = so.chain(so.project_radial(groups), so.retract(other))
    tx.update(params, tx.init(params), params)
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore:.*entry by entry")
def test_steps_that_skip_groups_of_one_entry_do_not_join_those_that_do_not():
    groups, x = so.RadialGroup((0,)), jnp.array([1.0, 2.0])
    parts = so.transported_trace(0.9, groups=groups), so.normalize_updates(groups)
    g = jnp.array([-0.5, 1.0])
    found, expected = (
        tx.update(g, tx.init(x), x)[0] for tx in (so.chain(*parts), optax.chain(*parts))
    )
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(found, [-1.0, 2.0])


def test_a_chain_checks_what_it_is_given():
    with pytest.raises(TypeError, match=r"chain: expected a gradient transformation as a member"):
        so.chain(so.retract(so.per_layer()), so.retract)
    tx, params = so.chain(so.retract(so.per_layer()), optax.identity()), jnp.array([3.0, 4.0])
    with pytest.raises(ValueError, match="chain requires the current value of the parameters"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="chain: expected the states of 2 transformations, found"):
        tx.update(params, tx.init(params)[:1], params)


def test_extra_arguments_reach_all_members_and_other():
    """The loss value reaches a member of the chain, and `other`."""

    def by_value():
        def update(updates, state, params=None, *, value, **extra_args):
            return jax.tree.map(lambda u: value * u, updates), state

        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

    params = {"a": jnp.array([3.0, 4.0]), "b": jnp.ones(2)}
    groups = {"a": so.per_layer(), "b": None}
    tx = so.chain(
        by_value(),
        so.project_radial(groups),
        so.scale_by_learning_rates(0.1, groups=groups, other=by_value()),
        so.retract(groups),
    )
    updates, _ = tx.update(params, tx.init(params), params, value=jnp.asarray(3.0))
    np.testing.assert_allclose(updates["b"], 9.0)


def test_what_is_nearly_radial():
    """A nearly radial direction rotates by the right angle; a radial one does not rotate.

    The tangent part of a radial direction is only rounding error.
    """
    x = np.random.default_rng(0).normal(size=64)
    across = np.random.default_rng(1).normal(size=64)
    across -= across @ x / (x @ x) * x
    across *= np.linalg.norm(x) / np.linalg.norm(across)
    params = jnp.asarray(x, "float32")
    groups = so.per_layer()
    tx = so.rotational(optax.trace(0.0), 0.1, groups=groups)
    for part, tolerance in ((1.0, 1e-5), (1e-2, 1e-2)):
        grads = jnp.asarray(x + part * across, "float32")
        updates, _ = tx.update(grads, tx.init(params), params)
        angle = so.geometry.angle(params, params + updates, groups)
        np.testing.assert_allclose(angle, np.arctan(0.1), rtol=tolerance)
    dead = tree_of({"w": (64, 32)}, 2, "float32")
    tx = so.rotational(optax.trace(0.0), 0.1, groups=so.per_filter())
    grads = jax.tree.map(lambda leaf: 0.3 * leaf, dead)
    updates, _ = tx.update(grads, tx.init(dead), dead)
    np.testing.assert_allclose(updates["w"], 0, atol=1e-5)


@pytest.mark.parametrize(
    ("tx", "of_all"),
    [
        (so.project_radial(so.per_filter()), True),
        (so.normalize_updates(so.per_filter()), False),
        (so.normalize_updates(so.per_filter(), decay=0.9), False),
        (so.retract(so.per_filter()), True),
        (so.retract(so.per_filter(), 1.0, "geodesic"), True),
        (so.hyperball(optax.trace(0.9), 0.1, groups=so.per_filter()), True),
        (so.adamg(0.1, groups=so.per_filter()), True),
    ],
)
def test_nan_stays_visible_and_in_its_group(tx, of_all):
    params, grads = (tree_of({"w": (3, 4)}, seed, "float32") for seed in range(2))
    grads = {"w": grads["w"].at[0, 1].set(jnp.nan)}
    updates, _ = tx.update(grads, tx.init(params), params)
    bad = jnp.isnan(updates["w"])
    assert bad[:, 1].all() if of_all else bad[0, 1]
    assert not bad[:, np.array([0, 2, 3])].any()


@pytest.mark.parametrize("name", ["adamsrt", "hyperball", "rotational"])
def test_joints_that_are_alike_are_traced_once(name, monkeypatch):
    made = []
    inner_products = passes.inner_products
    monkeypatch.setattr(
        passes, "inner_products", lambda request: made.append(0) or inner_products(request)
    )
    params = {str(n): jnp.ones((4, 3)) for n in range(5)} | {"other": jnp.ones((4, 2))}
    tx = OPTIMIZERS[name][0](so.per_filter())
    state = jax.eval_shape(tx.init, params)
    made.clear()
    jax.eval_shape(tx.update, params, state, params)
    assert len(made) == 2
