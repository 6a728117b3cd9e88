"""Laws of the geometry, against independent NumPy formulas for each group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from reference import parallel_transport, tangent

import spherical_optax as so
from spherical_optax import geometry

GROUPS = {
    "filter": so.per_filter(),
    "layer": so.per_layer(),
    "blocks": so.per_channel_block(2),
    "head": so.per_head(axis=1),
    "stacked": so.RadialGroup(index_axes=(0, -1)),
    "stacked blocks": so.RadialGroup(index_axes=(0, -1), num_blocks=2),
}
SHAPE = (3, 5, 4)
TOLERANCE = {"bfloat16": 2e-2, "float32": 2e-6, "float64": 1e-14}


def vectors(x, group):
    """The groups of an array as float64 vectors, in the order of per-group results."""
    x = np.asarray(x, np.float64)
    axes = group.axes(x.ndim)
    x = np.moveaxis(x, axes, range(len(axes)))
    if group.num_blocks is not None:
        last = len(axes) - 1
        x = x.reshape(*x.shape[:last], group.num_blocks, -1, *x.shape[last + 1 :])
    count = int(np.prod(x.shape[: len(axes)]))
    return x.reshape(count, -1)


def draw(seed, dtype, shape=SHAPE):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2)]


@pytest.fixture(params=GROUPS)
def group(request):
    return GROUPS[request.param]


def check(result, expected, dtype, scale=1.0):
    np.testing.assert_allclose(
        np.asarray(result, np.float64).ravel(),
        np.asarray(expected).ravel(),
        atol=TOLERANCE[dtype] * scale,
        rtol=TOLERANCE[dtype],
    )


def test_sums(group, dtype):
    x, y = draw(0, dtype)
    expected = [a @ b for a, b in zip(vectors(x, group), vectors(y, group), strict=True)]
    result = geometry.inner(x, y, group)
    assert result.shape == group.shape(x.shape)
    assert result.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
    # The accumulator is at least float32, so a bfloat16 array has float32's error.
    check(result, expected, "float32" if dtype == "bfloat16" else dtype, scale=10)
    lengths = np.linalg.norm(vectors(x, group), axis=1)
    check(geometry.norm(x, group), lengths, "float32" if dtype == "bfloat16" else dtype)


def test_project(group, dtype):
    v, x = draw(1, dtype)
    result = geometry.project(v, x, group)
    assert result.dtype == v.dtype
    expected = [tangent(a, b) for a, b in zip(vectors(v, group), vectors(x, group), strict=True)]
    check(vectors(result, group), expected, dtype)


def test_transport_is_parallel_in_the_plane_of_the_step(group, dtype):
    m, x = draw(2, dtype)
    m = geometry.project(m, x, group)
    y = x + 0.3 * m
    result = geometry.transport(m, y, group)
    assert result.dtype == m.dtype
    expected = [
        parallel_transport(*each)
        for each in zip(*(vectors(a, group) for a in (m, x, y)), strict=True)
    ]
    check(vectors(result, group), expected, dtype, scale=3)


def test_transport_keeps_the_length_and_is_tangent(group, x64):
    m, y = draw(3, "float64")
    result = geometry.transport(m, y, group)
    np.testing.assert_allclose(geometry.norm(result, group), geometry.norm(m, group), rtol=1e-13)
    assert np.abs(geometry.inner(result, y, group)).max() < 1e-13


@pytest.mark.parametrize("method", ["normalize", "geodesic"])
def test_retract(group, dtype, method):
    v, x = draw(4, dtype)
    radius = 0.5 + np.arange(np.prod(group.shape(SHAPE), dtype=int))
    result = geometry.retract(x, v, group, radius.reshape(group.shape(SHAPE)), method)
    assert result.dtype == x.dtype
    expected = []
    for a, b, r in zip(vectors(x, group), vectors(v, group), radius, strict=True):
        if method == "normalize":
            expected.append(r * (a + b) / np.linalg.norm(a + b))
        else:
            t, u = tangent(b, a), a / np.linalg.norm(a)
            turn = np.linalg.norm(t) / np.linalg.norm(a)
            expected.append(r * (np.cos(turn) * u + np.sin(turn) * t / np.linalg.norm(t)))
    check(vectors(result, group), expected, dtype, scale=radius.max())


def test_geodesic_turns_by_the_length_of_the_step(group, x64):
    v, x = draw(5, "float64")
    v = 0.1 * geometry.project(v, x, group)
    result = geometry.retract(x, v, group, geometry.norm(x, group), "geodesic")
    turned = geometry.angle(x, result, group)
    expected = geometry.norm(v, group) / geometry.norm(x, group)
    np.testing.assert_allclose(turned, expected, rtol=1e-12)


def test_angle(group, dtype):
    x, y = draw(6, dtype)
    expected = [
        np.arctan2(np.linalg.norm(tangent(b, a)), a @ b / np.linalg.norm(a))
        for a, b in zip(vectors(x, group), vectors(y, group), strict=True)
    ]
    check(geometry.angle(x, y, group), expected, "float32" if dtype == "bfloat16" else dtype)


@pytest.mark.parametrize("turn", [1e-6, 1e-3, 1.0, 3.0])
def test_angle_is_accurate_in_float32_at_every_size(turn):
    x = jnp.array([3.0, 0.0, 4.0], jnp.float32)
    v = 5 * turn * jnp.array([0.0, 1.0, 0.0], jnp.float32)
    y = geometry.retract(x, v, so.per_layer(), 5.0, "geodesic")
    assert geometry.angle(x, y, so.per_layer()) == pytest.approx(turn, rel=1e-5)
    assert geometry.angle(x, x, so.per_layer()) == 0


def test_angle_of_opposite_directions():
    x = jnp.array([1.0, 2.0])
    assert geometry.angle(x, -x, so.per_layer()) == pytest.approx(np.pi, rel=1e-6)


@pytest.mark.parametrize("zero", ["x", "y", "both"])
def test_angle_of_zero_groups_is_zero(group, zero, dtype):
    """The angle of a zero group is 0, not the 90 degrees of a dot product of 0."""
    x, y = draw(6, dtype)
    x = jnp.zeros_like(x) if zero in ("x", "both") else x
    y = jnp.zeros_like(y) if zero in ("y", "both") else y
    np.testing.assert_array_equal(geometry.angle(x, y, group), np.zeros(group.shape(x.shape)))


FUNCTIONS = {
    "norm": lambda x, v, group: geometry.norm(x, group),
    "project": lambda x, v, group: geometry.project(v, x, group),
    "transport": lambda x, v, group: geometry.transport(v, x, group),
    "normalize": lambda x, v, group: geometry.retract(x, v, group),
    "geodesic": lambda x, v, group: geometry.retract(x, v, group, 1.0, "geodesic"),
    "angle": lambda x, v, group: geometry.angle(x, v, group),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("zero", ["x", "v", "both", "sum"])
def test_zero_norm_groups_stay_finite_with_their_gradients(name, zero, dtype):
    x, v = draw(7, dtype)
    x = x.at[..., 0].set(0) if zero in ("x", "both") else x
    v = v.at[..., 0].set(0) if zero in ("v", "both") else v
    v = v.at[..., 0].set(-x[..., 0]) if zero == "sum" else v

    def total(x, v):
        return jnp.sum(FUNCTIONS[name](x, v, so.per_filter()).astype(jnp.float32))

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(x, v)
    assert np.isfinite(value)
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in gradients)


def test_without_a_direction_vectors_are_left_alone():
    x, v = jnp.zeros(3), jnp.array([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(geometry.project(v, x, so.per_layer()), v)
    np.testing.assert_array_equal(geometry.transport(v, x, so.per_layer()), v)
    np.testing.assert_array_equal(geometry.retract(x, v, so.per_layer(), method="geodesic"), v)
    np.testing.assert_array_equal(geometry.retract(v, -v, so.per_layer()), v)


def test_a_vector_turned_by_90_degrees_has_no_direction_left():
    x = jnp.array([1.0, 2.0, 3.0], jnp.float32)
    np.testing.assert_array_equal(geometry.transport(0.7 * x, x, so.per_layer()), jnp.zeros(3))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_jit_and_vmap_agree_with_plain_calls(name, group, x64):
    xs, vs = draw(8, "float64", shape=(2, *SHAPE))
    plain = jnp.stack([FUNCTIONS[name](x, v, group) for x, v in zip(xs, vs, strict=True)])
    mapped = jax.jit(jax.vmap(lambda x, v: FUNCTIONS[name](x, v, group)))(xs, vs)
    np.testing.assert_allclose(mapped, plain, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_match_finite_differences(name, x64):
    x, v = draw(9, "float64")
    weights = np.random.default_rng(0).normal(size=SHAPE)

    def total(x, v):
        out = FUNCTIONS[name](x, v, so.per_filter())
        return jnp.sum(out * weights[: out.shape[0]] if out.ndim == 3 else out * weights[0, 0])

    check_grads(total, (x, v), order=1, modes=("rev", "fwd"), atol=1e-6, rtol=1e-6)


def test_joint_arrays_are_one_vector(x64):
    kernels, biases = draw(10, "float64", (3, 4)), draw(11, "float64", (4,))
    joint = [{"kernel": k, "bias": b} for k, b in zip(kernels, biases, strict=True)]
    whole = [jnp.concatenate([k, b[None]]) for k, b in zip(kernels, biases, strict=True)]
    for each in (so.per_filter(), so.per_channel_block(2), so.per_layer()):
        group = {"kernel": each, "bias": each}
        for function in FUNCTIONS.values():
            expected, result = function(*whole, each), function(*joint, group)
            if isinstance(result, dict):
                result = jnp.concatenate([result["kernel"], result["bias"][None]])
            np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-13)


def test_joint_arrays_may_lay_their_groups_out_differently(x64):
    kernel, bias = draw(12, "float64", (3, 2, 4))[0], draw(13, "float64", (8,))[0]
    group = {"kernel": so.per_head(axis=1), "bias": so.per_channel_block(2)}
    result = geometry.norm({"kernel": kernel, "bias": bias}, group)
    whole = np.concatenate([vectors(kernel, so.per_head(axis=1)), bias.reshape(2, 4)], axis=1)
    np.testing.assert_allclose(np.ravel(result), np.linalg.norm(whole, axis=1), rtol=1e-13)


def test_what_does_not_fit():
    with pytest.raises(ValueError, match=r"arrays of one shape, found \(2, 3\) and \(3,\)"):
        geometry.inner(jnp.ones((2, 3)), jnp.ones(3), so.per_layer())
    with pytest.raises(TypeError, match="expected RadialGroup, found True"):
        geometry.norm(jnp.ones((2, 3)), True)


def test_unknown_retraction():
    with pytest.raises(ValueError, match=r"\['normalize', 'geodesic'\], found 'cayley'"):
        geometry.retract(jnp.ones(2), jnp.ones(2), so.per_layer(), method="cayley")


@settings(deadline=None, max_examples=30)
@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=4),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_laws_for_any_shape(shape, seed, data):
    axes = data.draw(st.sets(st.sampled_from(range(len(shape)))) if shape else st.just(set()))
    group = so.RadialGroup(index_axes=tuple(axes))
    x, v = draw(seed, "float32", tuple(shape))
    p = geometry.project(v, x, group)
    bound = 1e-6 * geometry.norm(v, group) * geometry.norm(x, group)
    assert np.all(np.abs(geometry.inner(p, x, group)) <= bound)
    assert np.all(geometry.norm(p, group) <= geometry.norm(v, group) * (1 + 1e-6))
    radius = geometry.norm(geometry.retract(x, v, group, 2.0), group)
    np.testing.assert_allclose(radius, 2.0, rtol=1e-5)
