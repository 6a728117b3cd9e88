"""Laws for random shapes, groups, dtypes and magnitudes, against a float64 vector per group.

By default each law has a few examples, which are always the same. `make test-fuzz` sets
`FUZZ_EXAMPLES=1000` for 1000 random examples per law.
"""

import dataclasses
import math
import os

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compositions import PAIRS
from conftest import precision
from flax import nnx
from flax.core import FrozenDict
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from reference import tangent

import spherical_optax as so
from spherical_optax import geometry

# Some random shapes look like those of a convolution with its outputs first.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*groups of output channels"),
    pytest.mark.filterwarnings("ignore:.*entry by entry"),
]


def fuzz(examples):
    """Runs a law on this many examples, or on as many as FUZZ_EXAMPLES says."""
    asked = os.environ.get("FUZZ_EXAMPLES")
    return settings(
        max_examples=int(asked or examples),
        derandomize=asked is None,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )


# --- random cases -----------------------------------------------------------------------

ENTRIES = 24  # the largest number of entries per leaf
DTYPES = ("bfloat16", "float32", "float64")
ROUNDS = 4  # draws of values for each compiled function

# The magnitudes of the largest and of the smallest entries, as powers of ten. In float32, norms
# overflow above 1.8e19, and squares underflow below 1e-38; see the docstring of `geometry`.
TOP = {"bfloat16": 18, "float32": 18, "float64": 150}
BOTTOM = {"bfloat16": -39, "float32": -44, "float64": -320}
KINDS = ("ordinary", "huge", "tiny", "denormal", "edge", "mixed")


def accumulator(dtype):
    return np.finfo(np.float64 if dtype == "float64" else np.float32)


def floor(dtype):
    """Below this value, sums of products are inaccurate, because products may underflow."""
    return 4 * ENTRIES * float(accumulator(dtype).tiny / accumulator(dtype).eps)


def numbered(shape, group):
    """The number of the group of each entry, in the order of per-group results."""
    axes = sorted(axis % len(shape) for axis in group.index_axes)
    sizes = [shape[axis] for axis in axes]
    number = np.zeros(shape, int)
    for index in np.ndindex(*shape):
        for place, (axis, size) in enumerate(zip(axes, sizes, strict=True)):
            at, count = index[axis], size
            if group.num_blocks is not None and place == len(axes) - 1:
                at, count = at // (size // group.num_blocks), group.num_blocks
            number[index] = number[index] * count + at
    return number


def rows(arrays, groups):
    """The groups of one array, or joint groups of several arrays, as float64 vectors."""
    numbers = {name: numbered(np.shape(arrays[name]), groups[name]) for name in groups}
    count = max(number.max() for number in numbers.values()) + 1
    values = {name: np.asarray(arrays[name], np.float64) for name in groups}
    return np.array(
        [
            np.concatenate([values[name][number == n] for name, number in numbers.items()])
            for n in range(count)
        ]
    )


def lengths(vectors):
    return np.linalg.norm(vectors, axis=1)


@dataclasses.dataclass(frozen=True)
class Case:
    """One leaf, or several leaves that form joint groups."""

    shapes: dict
    groups: dict
    dtype: str
    seed: int

    @property
    def has_layers(self):
        """Whether all leaves have the same number of layers, which AdamP requires."""
        counts = {
            math.prod(group.shape(self.shapes[name])[:-1]) for name, group in self.groups.items()
        }
        return len(counts) == 1

    @property
    def turns(self):
        """Whether groups have more than one entry, so that they can rotate."""
        entries = sum(math.prod(shape) for shape in self.shapes.values())
        return entries > math.prod(self.groups["a"].shape(self.shapes["a"]))

    def rounds(self, *, kinds=KINDS):
        """Yields functions that make random arrays, each of one kind of magnitude."""
        rng = np.random.default_rng(self.seed)
        for _ in range(ROUNDS):
            zeros = rng.random(1000) < rng.choice([0, 0.3])

            def arrays(kind=None, zero=True, zeros=zeros):
                kind = rng.choice(kinds) if kind is None else kind
                found = {}
                for name, shape in self.shapes.items():
                    keep = ~zeros[numbered(shape, self.groups[name])] | (not zero)
                    found[name] = np.where(keep, values(rng, shape, kind, self.dtype), 0.0)
                return {name: jnp.asarray(x, self.dtype) for name, x in found.items()}

            yield arrays


def values(rng, shape, kind, dtype):
    top, bottom = TOP[dtype], BOTTOM[dtype]
    exponent = {
        "ordinary": 0.0,
        "huge": top,
        "tiny": -top,
        "denormal": bottom + rng.uniform(0, 8),
        "edge": math.log10(accumulator(dtype).tiny) / 2 + rng.uniform(-0.5, 0.5),
        "mixed": rng.uniform(bottom, top, shape),
    }[str(kind)]
    return rng.choice([-1, 1], shape) * rng.uniform(0.1, 1, shape) * 10.0**exponent


@st.composite
def shapes(draw):
    shape = []
    for size in draw(st.lists(st.integers(1, 4), max_size=5)):
        shape.append(size if math.prod(shape) * size <= ENTRIES else 1)
    return tuple(shape)


@st.composite
def radial_groups(draw, shape, joint=None):
    axes = draw(st.permutations(range(len(shape))))[: draw(st.integers(0, len(shape)))]
    blocks = None
    if axes and draw(st.booleans()):
        size = shape[max(axes)]
        blocks = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    named = tuple(axis - len(shape) * draw(st.integers(0, 1)) for axis in axes)
    return so.RadialGroup(named, blocks, joint)


@st.composite
def cases(draw, dtypes=DTYPES):
    """One leaf, or two or three leaves with a joint label and different layouts of groups."""
    joint = draw(st.sampled_from([None, None, "label"]))
    shape = draw(shapes())
    found, groups = {"a": shape}, {"a": draw(radial_groups(shape, joint))}
    count = math.prod(groups["a"].shape(shape))
    for name in ("b", "c")[: draw(st.integers(1, 2)) if joint else 0]:
        k = draw(st.integers(1, 2))
        found[name], groups[name] = draw(
            st.sampled_from(
                [
                    ((k, count), so.RadialGroup((-1,), joint=joint)),
                    ((count, k), so.RadialGroup((0,), joint=joint)),
                    ((count * k,), so.RadialGroup((0,), count, joint)),
                    (shape, dataclasses.replace(groups["a"])),
                ]
            )
        )
    seed = draw(st.integers(0, 2**32 - 1))
    return Case(found, groups, draw(st.sampled_from(dtypes)), seed)


def eps(dtype):
    return float(jnp.finfo(dtype).eps)


def finite(tree):
    for x in jax.tree.leaves(tree):
        assert np.isfinite(np.asarray(x, np.float64)).all(), x


def close(found, expected, bound):
    """Asserts that the distance of each pair of vectors is within its bound."""
    distance = lengths(found - expected)
    assert np.all(distance <= bound), (distance, bound)


def accurate(size, radius, small):
    """Where none of |v|, |x|^2, <v, x> and <v, x> / |x|^2 underflows."""
    least = np.min([size, radius**2, size * radius], axis=0)
    return (least > small) & (size > small * radius)


# --- geometry ---------------------------------------------------------------------------


@fuzz(25)
@given(case=cases())
def test_project_is_tangent_and_idempotent(case):
    with precision(case.dtype):
        project = jax.jit(lambda v, x: geometry.project(v, x, case.groups))
        for arrays in case.rounds():
            v, x = arrays(), arrays()
            once = project(v, x)
            twice = project(once, x)
            finite((once, twice))
            V, X, P, Q = (rows(each, case.groups) for each in (v, x, once, twice))
            size, radius = lengths(V), lengths(X)
            small, tolerance = floor(case.dtype), 16 * eps(case.dtype) * size
            fine = accurate(size, radius, small)
            expected = np.array(
                [tangent(a, b) if r > 0 else a for a, b, r in zip(V, X, radius, strict=True)]
            )
            close(P[fine], expected[fine], tolerance[fine])
            close(Q[fine], P[fine], tolerance[fine])
            radial = np.abs(np.sum(P * X, axis=1))
            assert np.all(radial[fine] <= (tolerance * radius)[fine])
            close(P[radius == 0], V[radius == 0], small)
            assert np.all(lengths(P) <= 3 * size + small)


@fuzz(25)
@given(case=cases())
def test_transport_is_isometric_and_tangent_or_zero(case):
    with precision(case.dtype):
        transport = jax.jit(lambda m, x: geometry.transport(m, x, case.groups))
        for arrays in case.rounds():
            m, x = arrays(), arrays()
            result = transport(m, x)
            finite(result)
            M, X, T = (rows(each, case.groups) for each in (m, x, result))
            size, radius, left = lengths(M), lengths(X), lengths(T)
            small, error = floor(case.dtype), 16 * eps(case.dtype)
            assert np.all(left <= 10 * size + small)
            there = size**2 > small
            still = there & (radius == 0)
            close(T[still], M[still], error * size[still])

            there &= accurate(size, radius, small)
            M, X, T, size, radius, left = (each[there] for each in (M, X, T, size, radius, left))
            part = np.array([tangent(a, b) for a, b in zip(M, X, strict=True)]).reshape(M.shape)
            length = lengths(part)
            lost = (left == 0) | (length**2 <= small)
            assert np.all((length <= error * size) | (length**2 <= small) | ~lost)
            assert np.all(np.abs(left - size)[~lost] <= error * size[~lost])
            # The smaller the tangent part of m, the larger the relative rounding error.
            bound = np.minimum(error * size / np.where(lost, 1, length), 2) * size
            radial = np.abs(np.sum(T * X, axis=1)) / radius
            assert np.all(radial[~lost] <= bound[~lost])
            expected = part * (size / np.where(lost, 1, length))[:, None]
            close(T[~lost], expected[~lost], bound[~lost])


@fuzz(25)
@given(case=cases(), method=st.sampled_from(["normalize", "geodesic"]))
def test_retract_lands_on_the_radius(case, method):
    with precision(case.dtype):
        wide = accumulator(case.dtype).dtype
        retract = jax.jit(lambda x, v, r: geometry.retract(x, v, case.groups, r, method))
        rng = np.random.default_rng(case.seed)
        shape = case.groups["a"].shape(case.shapes["a"])
        for arrays in case.rounds():
            x, v = arrays(), arrays()
            target = 10 ** rng.uniform(-3, 3, shape)
            result = retract(x, v, jnp.asarray(target, wide))
            finite(result)
            X, V, R = (rows(each, case.groups) for each in (x, v, result))
            target, radius = target.ravel(), lengths(X)
            small, error = floor(case.dtype), 16 * eps(case.dtype)
            if method == "normalize":
                moved = {i: np.asarray(x[i], wide) + np.asarray(v[i], wide) for i in x}
                Y = rows(moved, case.groups)
                length = lengths(Y)
                fine = length**2 > small
                expected = Y[fine] * (target / np.where(length > 0, length, 1))[fine, None]
                close(R[fine], expected, error * target[fine])
                close(R[length == 0], X[length == 0], small)
            else:
                size = lengths(V)
                ratio = size / np.where(radius > 0, radius, 1)
                # The tangent part is known only up to rounding of v, so long steps lose it.
                fine = accurate(size, radius, small) & (ratio < 100)
                bound = error * target * (1 + ratio)
                assert np.all(np.abs(lengths(R) - target)[fine] <= bound[fine])
                free = radius == 0
                close(R[free], X[free] + V[free], error * size[free] + small)


# --- transforms -------------------------------------------------------------------------


@fuzz(12)
@given(case=cases(dtypes=("float64",)), name=st.sampled_from(sorted(PAIRS)))
def test_moments_on_the_unit_sphere_are_the_composition(case, name):
    """For groups with a nonzero norm that rotate by less than 90 degrees."""
    with precision("float64"):
        pair = [make(case.groups) for make in PAIRS[name]]
        steps = [jax.jit(tx.update) for tx in pair]
        rng = np.random.default_rng(case.seed)
        for arrays in case.rounds(kinds=("ordinary",)):
            size = 10 ** rng.uniform(-3, 3)
            x = jax.tree.map(lambda a, s=size: s * a, arrays(zero=False))
            states = [tx.init(x) for tx in pair]
            for _ in range(3):
                size = 10 ** rng.uniform(-3, 3)
                g = jax.tree.map(lambda a, s=size: s * a, arrays())
                found = [step(g, state, x) for step, state in zip(steps, states, strict=True)]
                states = [state for _, state in found]
                ours, theirs = (rows(updates, case.groups) for updates, _ in found)
                close(ours, theirs, 1e-9 * lengths(theirs))
                x = moved(x, arrays(zero=False), case, 10 ** rng.uniform(-1, 1))


def moved(x, v, case, factor):
    """Rotates each group by less than 20 degrees, and scales it."""
    X, V = rows(x, case.groups), rows(v, case.groups)
    ratio = 0.3 * lengths(X) / lengths(V)
    result = {}
    for name, group in case.groups.items():
        each = ratio[numbered(x[name].shape, group)]
        result[name] = jnp.asarray(factor * (x[name] + each * v[name]))
    return result


TRANSFORMS = {
    "project_radial": lambda groups: so.project_radial(groups),
    "scale_by_adams": lambda groups: so.scale_by_adams(groups=groups),
    "scale_by_adamsrt": lambda groups: so.scale_by_adamsrt(groups=groups),
    "transported_trace": lambda groups: so.transported_trace(0.9, groups=groups),
    "transport_moments(trace)": lambda groups: so.transport_moments(optax.trace(0.9), groups),
    "transport_moments(adam)": lambda groups: so.transport_moments(optax.scale_by_adam(), groups),
    "retract": lambda groups: so.retract(groups),
    "retract(geodesic)": lambda groups: so.retract(groups, method="geodesic"),
    "normalize_updates": lambda groups: so.normalize_updates(groups),
    "normalize_updates(decay)": lambda groups: so.normalize_updates(groups, 0.9, 1e-8),
    "center_updates": lambda groups: so.center_updates(groups),
    "adamp": lambda groups: so.adamp(1e-3, groups=groups, weight_decay=0.1),
    "sgdp": lambda groups: so.sgdp(1e-3, groups=groups, weight_decay=0.1),
    "adamg": lambda groups: so.adamg(1e-3, groups=groups, other=optax.adam(1e-3)),
    "hyperball": lambda groups: so.adamh(1e-3, groups=groups, other=optax.adam(1e-3)),
    "rotational_adamw": lambda groups: so.rotational_adamw(1e-3, weight_decay=0.1, groups=groups),
    "record_sphere": lambda groups: so.record_sphere(groups),
}
"""Transforms that store no power of the radius above its square; AdamG* stores the fourth."""
FIXED = ("hyperball", "rotational_adamw", "retract", "retract(geodesic)", "adamg")
"""Transforms that refuse groups of one entry."""


@pytest.mark.filterwarnings("ignore:.*expected groups of length above 0")
@fuzz(25)
@given(case=cases(), name=st.sampled_from(sorted(TRANSFORMS)))
def test_finite_gradients_keep_everything_finite(case, name):
    """Updates and state are finite at every magnitude, if the square of |x| |g| does not overflow.

    |x| |g| is the length of the moments.
    """
    assume(case.has_layers or name not in ("adamp", "sgdp"))
    assume(case.turns or name not in FIXED)
    with precision(case.dtype):
        tx = TRANSFORMS[name](case.groups)
        init, step = jax.jit(tx.init), jax.jit(tx.update)
        for arrays in case.rounds():
            x = arrays()
            state = init(x)
            finite(state)
            for _ in range(3):
                g = bounded(arrays(), x, case)
                updates, state = step(g, state, x)
                finite((updates, state))
                x = optax.apply_updates(x, jax.tree.map(lambda u: -0.1 * u, updates))


def bounded(g, x, case):
    """The gradient, scaled down if the product of the lengths of g and x is too large."""
    product = lengths(rows(g, case.groups)).max() * lengths(rows(x, case.groups)).max()
    factor = 10.0 ** TOP[case.dtype] / max(product, 10.0 ** TOP[case.dtype])
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64) * factor, a.dtype), g)


@pytest.mark.filterwarnings("ignore:.*expected groups of length above 0")
@fuzz(12)
@given(
    case=cases(),
    name=st.sampled_from(sorted(TRANSFORMS)),
    bad=st.sampled_from([np.nan, np.inf, -np.inf]),
)
def test_a_skipped_step_changes_no_bit(case, name, bad):
    assume(case.has_layers or name not in ("adamp", "sgdp"))
    assume(case.turns or name not in FIXED)
    with precision(case.dtype):
        tx = optax.apply_if_finite(TRANSFORMS[name](case.groups), max_consecutive_errors=5)
        rng = np.random.default_rng(case.seed)

        @jax.jit
        def step(g, state, x):
            updates, state = tx.update(g, state, x)
            return optax.apply_updates(x, updates), state

        for arrays in case.rounds(kinds=("ordinary", "huge", "tiny")):
            x = arrays()
            x, state = step(bounded(arrays(), x, case), jax.jit(tx.init)(x), x)
            g = arrays("ordinary")
            poisoned = rng.choice(sorted(g))
            entry = tuple(int(rng.integers(size)) for size in g[poisoned].shape)
            g[poisoned] = g[poisoned].at[entry].set(bad)
            after, skipped = step(g, state, x)
            assert skipped.total_notfinite == 1
            same_bits((after, skipped.inner_state), (x, state.inner_state))
            finite(after)


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


# --- containers -------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: object
    bias: object
    gain: object = None


class Module(eqx.Module):
    kernel: object
    rest: object


CONTAINERS = {
    "dict": lambda a, b, c: {"outer": {"kernel": a, "bias": b}, "gain": c},
    "tuple": lambda a, b, c: (a, (b, c)),
    "list": lambda a, b, c: [a, [[b], c]],
    "dataclass": Layer,
    "mixed": lambda a, b, c: {"layers": [Layer(a, b), (c,), None]},
    "frozen": lambda a, b, c: FrozenDict({"outer": {"kernel": a, "bias": b}, "gain": c}),
    "state": lambda a, b, c: nnx.State(
        {"outer": {"kernel": nnx.Param(a), "bias": nnx.Param(b)}, "gain": nnx.Param(c)}
    ),
    "equinox": lambda a, b, c: Module(a, (b, c)),
}
# Groups may be a tree of any container with the same keys.
GROUPS_OF = {**CONTAINERS, "state": CONTAINERS["dict"]}


@pytest.mark.parametrize("container", CONTAINERS)
@fuzz(10)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), name=st.sampled_from(sorted(TRANSFORMS)))
def test_structure_shapes_and_dtypes_are_kept(container, data, dtype, name):
    leaves, groups = [], []
    for place in range(3):
        shape = data.draw(shapes())
        group = data.draw(st.none() | radial_groups(shape))
        absent = place == 2 and container != "state" and data.draw(st.booleans())
        leaves.append(None if absent else jax.ShapeDtypeStruct(shape, dtype))
        groups.append(None if absent else group)
    if all(group is None for group in groups):  # at least one leaf must have a group
        groups[0] = so.per_layer()
    units = zip(leaves, groups, strict=True)
    sizes = [
        math.prod(x.shape) // math.prod(g.shape(x.shape)) for x, g in units if None not in (x, g)
    ]
    assume(min(sizes) > 1 or name not in FIXED)
    with precision(dtype):
        params = CONTAINERS[container](*leaves)
        tx = TRANSFORMS[name](GROUPS_OF[container](*groups))
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        again = jax.eval_shape(tx.update, params, after, params)
    types_equal(updates, params)
    types_equal(after, state)
    types_equal(again, (updates, after))


def types_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
