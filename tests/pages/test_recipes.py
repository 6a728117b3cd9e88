"""The recipes of docs/recipes.md against their formulas in float64 NumPy."""

import contextlib
import io
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layouts import tree_of
from reference import adam, along_sphere, inner, length, muon, parallel_transport
from trajectory import run

import spherical_optax as so

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "recipes.md"
LR, STEPS = 0.05, 4
MLP = ("block/gate/kernel", "block/up/kernel", "block/down/kernel")
NEURONS = dict.fromkeys((*MLP, "head/kernel"), (-1,))
WIDTH = {
    "embed/embedding": (0,),
    "block/q/kernel": (1, 2),
    "block/k/kernel": (1, 2),
    "block/v/kernel": (1, 2),
    "block/o/kernel": (0, 1),
    "block/down/kernel": (0,),
    "block/gate/kernel": (1,),
    "block/up/kernel": (1,),
    "head/kernel": (1,),
}
MATRICES = {path: () for path in WIDTH if path.startswith("block")}
HEADS = {"block/q/kernel": (1,), "block/k/kernel": (1,)}
BLOCKS = HEADS | {path: axes for path, axes in WIDTH.items() if path in ("block/v/kernel",)}
BLOCKS |= {"embed/embedding": (0,), "block/o/kernel": (2,)} | NEURONS


@pytest.fixture(scope="module")
def recipes():
    """The names that the document's programs define."""
    namespace = {}
    for program in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(program, namespace)
    return namespace


def check(tx, expected, shapes, *, placed=None, rtol=1e-12, steps=STEPS):
    """Compares a trajectory's end with `expected`, called with path, initial leaf and gradients."""
    params = tree_of(shapes, 0)
    params = params if placed is None else so.place_on_sphere(params, *placed)
    grads = [tree_of(shapes, seed) for seed in range(1, steps + 1)]
    end = run(tx, params, grads)[-1]
    flat = [jax.tree.leaves_with_path(tree) for tree in (end, params, *grads)]
    for (path, found), (_, x), *steps in zip(*flat, strict=True):
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        wanted = expected(key, np.asarray(x), [np.asarray(g) for _, g in steps])
        np.testing.assert_allclose(found, wanted, rtol=rtol, atol=rtol, err_msg=key)


def moved(x, directions, rate=LR):
    return x - rate * sum(directions)


def test_ngpt(recipes, x64):
    def expected(path, x, grads):
        for w in adam(grads, 0.9, 0.95, 1e-8):
            x = x - LR * w
            x = x / length(x, WIDTH[path]) if path in WIDTH else x
        return x

    placed = (recipes["WIDTH"], 1.0)
    check(recipes["ngpt"](LR), expected, recipes["SHAPES"], placed=placed)


@pytest.mark.parametrize("every", [1, 7])
def test_normalize_and_project(recipes, x64, every):
    def expected(path, x, grads):
        start = x
        for t, w in enumerate(adam(grads, 0.9, 0.999, 1e-8)):
            x = x - LR * (w + (0.2 * (x - start) if x.ndim == 1 else 0))
            if path in MATRICES and t % every == 0:
                x = x * length(start, ()) / length(x, ())
        return x

    tx = recipes["normalize_and_project"](LR, every, 0.2)
    check(tx, expected, recipes["SHAPES"], steps=20)


def critic(params, x):
    """A residual network on the sphere, as in SimbaV2, with kernels (in, out)."""
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    x = unit((x @ params["first"]["kernel"]) * params["first"]["scale"])
    for block in ("block1", "block2"):
        inside = params[block]
        hidden = jax.nn.relu(x @ inside["up"]["kernel"] * inside["scale"])
        x = unit(x + inside["rate"] * (unit(hidden @ inside["down"]["kernel"]) - x))
    return x @ params["head"]["kernel"]


def test_simba_v2(recipes, x64):
    """The recipe agrees with normalization by hand, for an actor and two critics under `vmap`."""
    block = {"up": {"kernel": (5, 8)}, "down": {"kernel": (8, 5)}, "scale": (8,), "rate": (5,)}
    one = {"first": {"kernel": (4, 5), "scale": (5,)}, "block1": block, "block2": block}
    one["head"] = {"kernel": (5, 3)}
    agent = {
        "actor": tree_of(one, 0),
        "critics": jax.tree.map(lambda *x: jnp.stack(x), tree_of(one, 1), tree_of(one, 2)),
    }
    states, actions = tree_of([(16, 4), (16, 3)], 3)

    @jax.jit
    @jax.grad
    def gradient(agent):
        values = jax.vmap(critic, in_axes=(0, None))(agent["critics"], states)
        return ((values - actions) ** 2).mean() + (critic(agent["actor"], states) ** 2).mean()

    def normalized(agent):
        return jax.tree.map_with_path(
            lambda path, x: (
                x / jnp.linalg.norm(x, axis=-2, keepdims=True)
                if "kernel" in jax.tree_util.keystr(path)
                else x
            ),
            agent,
        )

    ours = so.place_on_sphere(agent, recipes["COLUMNS"], 1.0)
    theirs, tx, adam = normalized(agent), recipes["simba_v2"](LR), optax.adam(LR)
    state, their_state = tx.init(ours), adam.init(theirs)
    update, their_update = jax.jit(tx.update), jax.jit(adam.update)
    for _ in range(20):
        updates, state = update(gradient(ours), state, ours)
        ours = optax.apply_updates(ours, updates)
        updates, their_state = their_update(gradient(theirs), their_state, theirs)
        theirs = normalized(optax.apply_updates(theirs, updates))
    for (path, one), other in zip(
        jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12, err_msg=str(path))


class Adam:
    """Adam's direction, step by step, for gradients that depend on earlier steps."""

    def __init__(self, b1, b2):
        self.b1, self.b2, self.m, self.v, self.t = b1, b2, 0, 0, 0

    def __call__(self, g):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        corrected = self.v / (1 - self.b2**self.t)
        return self.m / (1 - self.b1**self.t) / (np.sqrt(corrected) + 1e-8)


def test_edm2(recipes, x64):
    def expected(path, x, grads):
        direction = Adam(0.9, 0.99)
        for g in grads:
            g = along_sphere(g, x, NEURONS[path]) if path in NEURONS else g
            x = x - LR * direction(g)
            if path in NEURONS:
                x = x / length(x, NEURONS[path]) * np.sqrt(x.shape[0])
        return x

    placed = (recipes["NEURONS"], "sqrt(d)")
    check(recipes["edm2"](LR), expected, recipes["SHAPES"], placed=placed)


def hyperball(x, directions, axes, rate):
    radius = length(x, axes)
    for w in directions:
        x = x - rate * radius * w / length(w, axes)
        x = radius * x / length(x, axes)
    return x


def test_adamh(recipes, x64):
    def expected(path, x, grads):
        directions = adam(grads, 0.9, 0.999, 1e-8)
        if path not in MATRICES:
            return moved(x, directions, 3e-3)
        return hyperball(x, directions, (), 0.02)

    check(recipes["adamh"], expected, recipes["SHAPES"])


def test_muonh(recipes, x64):
    def expected(path, x, grads):
        if path not in MATRICES:
            return moved(x, adam(grads, 0.9, 0.999, 1e-8), 3e-3)
        rows = math.prod(x.shape[:-1] if path == "block/o/kernel" else x.shape[:1])
        flat = [grad.reshape(rows, -1) for grad in grads]
        directions = (each.reshape(x.shape) for each in muon(flat, 0.95))
        return hyperball(x, directions, (), 0.02)

    check(recipes["muonh"], expected, recipes["SHAPES"])


@pytest.mark.parametrize("published", [False, True])
def test_oblique_adam(recipes, x64, published):
    def directions(grads):
        m, v, b1, b2 = 0, 0, 0.9, 0.99
        for t, g in enumerate(grads, start=1):
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            c = 1 - b2**t
            yield m / (1 - b1**t) / ((np.sqrt(v) / c if published else np.sqrt(v / c)) + 1e-8)

    def expected(path, x, grads):
        for w in directions(grads):
            if path in NEURONS:
                y = x - LR * along_sphere(w, x, NEURONS[path])
                x = y / length(y, NEURONS[path])
            else:
                x = x - LR * w
        return x

    rate = recipes["as_published"](LR) if published else LR
    check(
        recipes["oblique_adam"](rate),
        expected,
        recipes["SHAPES"],
        placed=(recipes["NEURONS"], 1.0),
        rtol=1e-7 if published else 1e-12,  # the published code adds eps elsewhere
    )


def riemannian(x, grads):
    """Riemannian Adam of one unit vector, with parallel transport along the arc of each step."""
    m, v = np.zeros_like(x), 0.0
    for t, g in enumerate(grads, start=1):
        g = g - (g @ x) * x
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * (g @ g)
        y = x - LR * m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        y = y / np.linalg.norm(y)
        x, m = y, parallel_transport(m, x, y)
    return x


def test_riemannian_adam(recipes, x64):
    def expected(path, x, grads):
        if path not in NEURONS:
            return moved(x, adam(grads, 0.9, 0.999, 1e-8))
        columns = range(x.shape[1])
        return np.stack([riemannian(x[:, j], [g[:, j] for g in grads]) for j in columns], 1)

    placed = (recipes["NEURONS"], 1.0)
    check(recipes["riemannian_adam"](LR), expected, recipes["SHAPES"], placed=placed)
    groups, shapes = so.groups_by_path({"": so.per_filter()}), {"head": {"kernel": (5, 3)}}
    tx = recipes["written_out"](LR, groups, 5)
    check(tx, expected, shapes, placed=(groups, 1.0))


def test_ademamix_with_transport(recipes, x64):
    def carried(m, x, axes):
        tangent = along_sphere(m, x, axes)
        return tangent * length(m, axes) / length(tangent, axes)

    def expected(path, x, grads):
        m1, m2, v, radius, axes = 0, 0, 0, None, HEADS.get(path)
        for t, g in enumerate(grads, start=1):
            if axes and radius is not None:
                ratio = radius / length(x, axes)
                m1, m2, v = (
                    ratio * carried(m1, x, axes), ratio * carried(m2, x, axes), ratio**2 * v
                )  # fmt: skip
            m1, m2 = 0.9 * m1 + 0.1 * g, 0.9999 * m2 + 0.0001 * g
            v = 0.999 * v + 0.001 * g**2
            w = (m1 / (1 - 0.9**t) + 5 * m2) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            if axes:
                m1, m2, radius = (
                    along_sphere(m1, x, axes),
                    along_sphere(m2, x, axes),
                    length(x, axes),
                )
            x = x - LR * w
        return x

    tx = recipes["ademamix_with_transport"](LR, recipes["HEADS"])
    check(tx, expected, recipes["SHAPES"])


def by_group(grads, axes, b1, b2, eps=1e-8):
    """Adam's direction with one second moment per group: the mean of the squared gradient."""
    m, v = 0, 0
    for t, g in enumerate(grads, start=1):
        size = g.size / inner(g, g, axes).size
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * inner(g, g, axes) / size
        yield m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps / np.sqrt(size))


def test_adam_mini(recipes, x64):
    def expected(path, x, grads):
        axes = BLOCKS.get(path)
        directions = adam(grads, 0.9, 0.95, 1e-8)
        for w in directions if axes is None else by_group(grads, axes, 0.9, 0.95):
            x = x - 1e-3 * (w + 0.1 * x)
        return x

    check(recipes["adam_mini"], expected, recipes["SHAPES"])


def test_normuon(recipes, x64):
    def expected(path, x, grads):
        for w in by_group(list(muon(grads, 0.95)), (1,), 0.0, 0.95):
            x = x - LR * 0.2 * w / np.sqrt((w**2).mean())
        return x

    shapes = {"block": {name: recipes["SHAPES"]["block"][name] for name in ("gate", "up", "down")}}
    check(recipes["normuon"](LR), expected, shapes)


def test_schedule_free(recipes, x64):
    def expected(path, x, grads):
        axes, z, y = HEADS.get(path), x, x
        directions = adam(grads, 0.0, 0.999, 1e-8)
        for t, w in enumerate(
            directions if axes is None else by_group(grads, axes, 0.0, 0.999), start=1
        ):
            z = z - 1e-2 * w
            x = (1 - 1 / t) * x + z / t
            y = 0.9 * x + 0.1 * z
        return y

    check(recipes["schedule_free"], expected, recipes["SHAPES"])


def test_lion_for_the_rest(recipes, x64):
    def expected(path, x, grads):
        if path in MATRICES:
            return hyperball(x, adam(grads, 0.9, 0.999, 1e-8), (), LR)
        m = 0
        for g in grads:
            x, m = x - 1e-4 * (np.sign(0.9 * m + 0.1 * g) + 1e-3 * x), 0.99 * m + 0.01 * g
        return x

    check(recipes["lion_for_the_rest"](LR), expected, recipes["SHAPES"])


def test_hyperball_with_decay(recipes, x64):
    def expected(path, x, grads):
        directions = adam(grads, 0.9, 0.999, 1e-8)
        if path in MATRICES:
            return hyperball(x, directions, (), LR)
        for w in directions:
            x = x - 3e-3 * (w + (0.1 * x if x.ndim > 1 else 0))
        return x

    check(recipes["hyperball_with_decay"](LR, 3e-3, 0.1), expected, recipes["SHAPES"])


def test_rotational_with_angles(recipes, x64):
    # Optax computes schedules in float32, so they are checked to 1e-6, and the updates to 1e-12.
    schedules = [optax.warmup_cosine_decay_schedule(0.0, peak, 2, 20) for peak in (0.03, 3e-3)]
    counts = [jnp.int32(t) for t in range(STEPS)]
    angles, rates = ([float(jax.jit(each)(t)) for t in counts] for each in schedules)
    rise = np.array([0, 1 / 2, 1, (1 + np.cos(np.pi / 18)) / 2])
    np.testing.assert_allclose(angles, 0.03 * rise, rtol=1e-6)

    def expected(path, x, grads):
        axes, s = NEURONS.get(path), 0
        for t, w in enumerate(adam(grads, 0.9, 0.999, 1e-8)):
            if axes is None:
                x = x - rates[t] * w
                continue
            p, radius = along_sphere(w, x, axes), length(x, axes)
            s = 0.9 * s + 0.1 * inner(p, p, axes)
            y = x - angles[t] * radius * p / (np.sqrt(s / (1 - 0.9 ** (t + 1))) + 1e-8)
            x = radius * y / length(y, axes)
        return x

    check(recipes["rotational_with_angles"](20), expected, recipes["SHAPES"])


def test_polar(recipes, x64):
    def expected(path, x, grads):
        direction, axes = Adam(0.9, 0.999), (1,)
        for g in grads:
            if path != "head/kernel":
                x = x - LR * direction(g)
                continue
            radius = length(x, axes)
            step = -LR * direction(along_sphere(g, x, axes))
            y = x + along_sphere(step, x, axes)
            x = (radius - 0.1 * inner(g, x, axes) / radius) * y / length(y, axes)
        return x

    check(recipes["polar"](LR, 0.1), expected, recipes["SHAPES"], steps=20)


def test_brake(recipes, x64):
    def expected(path, x, grads):
        for w in adam(grads, 0.9, 0.999, 1e-8):
            y, radius = x - LR * w, length(x, ())
            longer = 0.7 * radius + 0.3 * length(y, ())
            x = longer * y / length(y, ()) if path in MATRICES else y
        return x

    check(recipes["braked"](LR, 0.3), expected, recipes["SHAPES"])


def polar_factor(x):
    """The nearest matrix with orthonormal columns or rows, x (x'x)^(-1/2)."""
    if x.shape[0] < x.shape[1]:
        return polar_factor(x.T).T
    values, vectors = np.linalg.eigh(x.T @ x)
    return x @ (vectors / np.sqrt(values)) @ vectors.T


def at_spectral_norm_1(x):
    return x / np.sqrt(np.linalg.eigvalsh(x.T @ x).max())


@pytest.mark.parametrize(
    ("name", "formula"), [("stiefel", polar_factor), ("spectral_sphere", at_spectral_norm_1)]
)
def test_surfaces(recipes, x64, name, formula):
    def expected(path, x, grads):
        for w in adam(grads, 0.9, 0.999, 1e-8):
            x = formula(x - LR * w) if path in MLP else x - LR * w
        return x

    check(recipes["on_surface"](LR, recipes[name]), expected, recipes["SHAPES"])
