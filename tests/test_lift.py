"""Steps lifted together: equal to the transformations one after another, in one pass for sums."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layouts import CASES, tree_of
from trajectory import run

import spherical_optax as so
from spherical_optax._masks import in_groups
from spherical_optax.transforms import _alike, _lift

SCHEDULE = optax.linear_schedule(0.2, 0.05, 4)


def masked(groups, angle, other):
    return (
        optax.masked(optax.scale_by_learning_rate(angle), in_groups(groups, True)),
        optax.masked(other, in_groups(groups, False)),
    )


def rotational(groups):
    others = optax.chain(optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(0.3))
    return optax.chain(
        optax.trace(0.8),
        so.project_radial(groups),
        so.normalize_updates(groups, decay=0.7, eps=1e-3),
        *masked(groups, SCHEDULE, others),
        so.retract(groups),
    )


PAIRS = {
    "hyperball": (
        lambda groups: so.hyperball(
            optax.trace(0.8), SCHEDULE, groups=groups, other_learning_rate=SCHEDULE
        ),
        lambda groups: optax.chain(
            optax.trace(0.8),
            so.normalize_updates(groups),
            optax.chain(*masked(groups, SCHEDULE, optax.scale_by_learning_rate(SCHEDULE))),
            so.retract(groups),
        ),
    ),
    "hyperball, other rate": (
        lambda groups: so.hyperball(
            optax.trace(0.8), 0.2, groups=groups, other_learning_rate=SCHEDULE
        ),
        lambda groups: optax.chain(
            optax.trace(0.8),
            so.normalize_updates(groups),
            optax.chain(*masked(groups, 0.2, optax.scale_by_learning_rate(SCHEDULE))),
            so.retract(groups),
        ),
    ),
    "rotational": (
        lambda groups: so.rotational(
            optax.trace(0.8), 0.3, SCHEDULE, groups=groups, weight_decay=0.1, decay=0.7, eps=1e-3
        ),
        rotational,
    ),
    "adamg": (
        lambda groups: so.adamg(SCHEDULE, 0.8, 0.9, 1e-3, groups=groups),
        lambda groups: optax.chain(
            so.transport_moments(
                so.scale_by_adams(0.8, 0.9, 1e-3, groups=groups, sqrt_dim=False),
                groups,
                rescale=False,
            ),
            optax.scale_by_learning_rate(SCHEDULE),
            so.retract(groups, radius=1.0),
        ),
    ),
    "adamg_star": (
        lambda groups: so.adamg_star(0.1, 0.2, groups=groups),
        lambda groups: optax.chain(
            so.scale_by_adamg_star(0.1, 0.2, groups=groups), so.retract(groups, radius=1.0)
        ),
    ),
    "along great circles": (
        lambda groups: _lift.chain(
            so.project_radial(groups), so.retract(groups, method="geodesic")
        ),
        lambda groups: optax.chain(
            so.project_radial(groups), so.retract(groups, method="geodesic")
        ),
    ),
}


LAYOUTS = ("filters", "stacked layers", "joint blocks", "alike, joint")
WORK = [(name, case) for name in PAIRS for case in LAYOUTS]
WORK += [(name, "no group") for name in ("adamg", "adamg_star")]


@pytest.mark.parametrize(("name", "case"), WORK)
def test_equal_to_one_after_another(name, case, x64):
    shapes, groups = CASES[case]
    params, grads = tree_of(shapes, 0), [tree_of(shapes, seed) for seed in range(1, 6)]
    paths = [run(make(groups), params, grads) for make in PAIRS[name]]
    for ours, theirs in zip(*paths, strict=True):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_state_is_that_of_a_chain():
    """Checkpoints do not see what is lifted together."""
    shapes, groups = CASES["joint"]
    params = tree_of(shapes, 0, "float32")
    for name, (lifted, separate) in PAIRS.items():
        ours, theirs = lifted(groups).init(params), separate(groups).init(params)
        if name == "rotational":  # a check, and a chain
            ours = ours[-1]
        if name.startswith(("hyperball", "rotational")):  # whose first parts only look at init
            ours = tuple(each for each in ours if each != optax.EmptyState())
            theirs = tuple(each for each in theirs if each != optax.EmptyState())
        assert jax.tree.structure(ours) == jax.tree.structure(theirs), name


@pytest.mark.parametrize(
    ("tx", "pairs"),
    [
        (so.hyperball(optax.trace(0.8), 0.1, groups=so.per_filter()), 3),
        (so.rotational(optax.trace(0.8), 0.1, 0.1, groups=so.per_filter()), 3),
        (so.adamg(0.1, groups=so.per_filter()), 6),
        (so.scale_by_adamsrt(groups=so.per_filter()), 5),
        (so.transported_trace(0.9, groups=so.per_filter()), 4),
        (so.retract(so.per_filter()), 3),
        (so.project_radial(so.per_filter()), 2),
    ],
)
def test_sums_in_one_pass_and_no_more_than_needed(tx, pairs, monkeypatch):
    asked = []
    inners = _alike.inners

    def asking(wanted):
        asked.extend(len(each.pairs) for each in wanted)
        return inners(wanted)

    monkeypatch.setattr(_alike, "inners", asking)
    params = tree_of({"a": (3, 4), "b": (5, 2)}, 0, "float32")
    tx.update(params, tx.init(params), params)
    assert asked == [pairs] * 2


def test_what_is_nearly_radial():
    """The length of a tangent part is a small difference then; what is rounding turns nothing."""
    x = np.random.default_rng(0).normal(size=64)
    across = np.random.default_rng(1).normal(size=64)
    across -= across @ x / (x @ x) * x
    across *= np.linalg.norm(x) / np.linalg.norm(across)
    params = jnp.asarray(x, "float32")
    groups = so.per_layer()
    tx = so.rotational(optax.trace(0.0), 0.1, 0.1, groups=groups)
    for part, tolerance in ((1.0, 1e-5), (1e-2, 1e-2)):
        grads = jnp.asarray(x + part * across, "float32")
        updates, _ = tx.update(grads, tx.init(params), params)
        angle = so.geometry.angle(params, params + updates, groups)
        np.testing.assert_allclose(angle, np.arctan(0.1), rtol=tolerance)
    dead = tree_of({"w": (64, 32)}, 2, "float32")
    tx = so.rotational(optax.trace(0.0), 0.1, 0.1, groups=so.per_filter())
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


FILTERS = so.per_filter()


@pytest.mark.parametrize(
    ("tx", "kept"),
    [
        (so.hyperball(optax.scale_by_adam(), 0.1, groups=FILTERS), False),
        (so.hyperball(optax.scale_by_adam(nesterov=True), 0.1, groups=FILTERS), True),
        (so.rotational_adamw(0.1, groups=FILTERS), False),
        (so.rotational_adamw(0.1, groups=FILTERS, center=True), True),
        (so.adamp(0.1, groups=FILTERS, weight_decay=0.1), False),
        (so.sgdp(0.1, groups=FILTERS), True),
    ],
)
def test_a_direction_made_again(tx, kept, x64):
    """Adam's follows from its new moments, and is kept under jit only where it does not."""
    params, grads = tree_of({"w": (1024, 96)}, 0), tree_of({"w": (1024, 96)}, 1)
    params = so.center_params(params, FILTERS)

    def step(params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    results = []
    compiled = jax.jit(step).lower(params, tx.init(params)).compile()
    for run_step in (compiled, step):
        x, state = params, tx.init(params)
        for _ in range(3):
            x, state = run_step(x, state)
        results.append(x["w"])
    np.testing.assert_allclose(*results, rtol=1e-12, atol=1e-12)
    memory = compiled.memory_analysis().temp_size_in_bytes / params["w"].nbytes
    if not kept:
        assert memory < 0.2
    elif jax.__version_info__ < (0, 12):  # from then on XLA itself keeps fewer
        assert memory > 1
