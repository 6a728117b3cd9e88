"""Masks that detection refuses, with causes that fit the evidence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spherical_optax as so

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(64, 7)), jnp.float32)
P = {
    name: {"kernel": jnp.asarray(RNG.normal(size=shape) * 0.4, jnp.float32)}
    for name, shape in (("fc0", (7, 16)), ("fc1", (16, 16)), ("head", (16, 3)))
}
FILTERS = so.groups_by_path({r"fc\d/kernel": so.per_filter()})


def network(norm):
    def fn(params, x):
        for name in ("fc0", "fc1"):
            x = jnp.tanh(norm(x, params[name]["kernel"]))
        return x @ params["head"]["kernel"]

    return fn


def renormalized(x, kernel):
    """Batch renormalization (Ioffe 2017): factors without a gradient restore the scale."""
    x = x @ kernel
    std = jnp.sqrt(x.var(0) + 1e-3)
    return (x - x.mean(0)) / std * jax.lax.stop_gradient(jnp.clip(std, 1 / 3, 3.0))


def detached(x, kernel):
    """Weight normalization by a norm without a gradient."""
    return x @ (kernel / jax.lax.stop_gradient(jnp.linalg.norm(kernel, axis=0)))


def quantized(x, kernel):
    """Fake quantization to 4 bits with a straight-through gradient, before BatchNorm."""
    scale = jax.lax.stop_gradient(jnp.abs(kernel).max(0) / 7)
    rounded = jax.lax.stop_gradient(jnp.round(kernel / scale) * scale - kernel)
    x = x @ (kernel + rounded)
    return (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)


def test_outputs_that_change_are_refused_although_gradients_are_tangent():
    with pytest.raises(ValueError, match=r"fc1/kernel.*outputs that do not change.*Batch renorm"):
        so.check_radial_groups(network(renormalized), P, FILTERS, X)
    with pytest.warns(UserWarning, match=r"found that they change for .*fc1/kernel"):
        found = so.find_radial_groups(network(renormalized), P, X)
    assert jax.tree.leaves(found) == []


@pytest.mark.parametrize("norm", [detached, quantized])
def test_gradients_that_do_not_see_what_outputs_do_are_named(norm):
    with pytest.raises(ValueError, match="only the gradient differs") as error:
        so.check_radial_groups(network(norm), P, FILTERS, X)
    assert "stop_gradient" in str(error.value)
    assert "straight-through" in str(error.value)
    assert "evaluation mode" not in str(error.value)
    with pytest.warns(UserWarning, match=r"fc0/kernel is scaled.*stop_gradient"):
        so.find_radial_groups(network(norm), P, X)


def test_half_precision_is_named_where_there_is_some():
    def plain(x, kernel):
        return x @ kernel

    def half(x, kernel):
        bits = jax.lax.bitcast_convert_type(kernel.astype(jnp.bfloat16), jnp.uint16)
        return x @ jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)

    with pytest.raises(ValueError, match="No normalization layer follows") as error:
        so.check_radial_groups(network(plain), P, FILTERS, X)
    assert "half precision" not in str(error.value)
    assert all(name in str(error.value) for name in ("retract", "nGPT", "SimbaV2", "Hyperball"))
    with (
        pytest.warns(UserWarning, match="expected a program that can be computed in float32"),
        pytest.raises(ValueError, match="fn computes in half precision"),
    ):
        so.check_radial_groups(network(half), P, FILTERS, X)


def test_an_error_of_the_function_is_its_own():
    def fn(params, x):
        return x @ params["fc0"]["kernel"] + "one"

    with pytest.raises(TypeError, match="unsupported operand") as error:
        so.find_radial_groups(fn, P, X)
    assert "further arguments" not in str(error.value)
    with pytest.raises(TypeError, match="with params and 1 further arguments"):
        so.find_radial_groups(lambda params: params, P, X)


def test_a_function_that_does_not_use_its_parameters_is_named():
    fn = network(lambda x, kernel: x @ kernel)
    closed = lambda params, x: fn(P, x)  # noqa: E731
    with pytest.warns(UserWarning, match="the outputs of fn do not depend on params"):
        so.find_radial_groups(closed, P, X)
    with pytest.raises(ValueError, match="the outputs of fn do not depend on params"):
        so.check_radial_groups(closed, P, FILTERS, X)
