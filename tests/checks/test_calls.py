"""Calls with positional groups, arguments in the wrong order or numbers too large are caught."""

import jax.numpy as jnp
import optax
import pytest

import spherical_optax as so

FACTORIES = ("adams", "adamsrt", "adamsw", "adamsrtw", "sgdmrt", "adamg", "adamp", "sgdp")
FACTORIES += ("adamh", "muonh", "rotational_adamw", "rotational_sgdm", "rotational_lion")


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize(
    "groups", [so.per_filter(), so.groups_by_path({"a": True}), {"a": so.per_layer()}]
)
def test_groups_by_position(name, groups):
    message = rf"{name}: expected groups as a keyword .*Write {name}\(\.\.\., groups=groups\)"
    with pytest.raises(TypeError, match=message):
        getattr(so, name)(0.1, groups)


@pytest.mark.parametrize("name", FACTORIES)
def test_schedules_that_return_no_number(name):
    for schedule in (lambda step: None, lambda step: jnp.ones(3), lambda step: {"rate": 0.1}):
        with pytest.raises(TypeError, match=f"{name}: expected learning_rate to return a number"):
            getattr(so, name)(schedule, groups=so.per_filter())


@pytest.mark.parametrize("groups", [None, False, lambda params: False])
def test_no_groups_at_all(groups):
    with pytest.raises(ValueError, match=r"found (None|False) for all of them.*static_args"):
        so.adamsrt(0.1, groups=groups).init({"kernel": jnp.ones((3, 4))})


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda fn, p, g, x: so.check_radial_groups(p, fn, g, x), "a dict as fn"),
        (lambda fn, p, g, x: so.check_radial_groups(fn, fn, g, x), "a function as params"),
        (lambda fn, p, g, x: so.check_radial_groups(fn, p, x, g), "an array as groups"),
        (lambda fn, p, g, x: so.find_radial_groups(p, fn, x), "a dict as fn"),
        (lambda fn, p, g, x: so.find_radial_groups(x, p, fn), "a ArrayImpl as fn"),
    ],
)
def test_arguments_that_changed_places(call, found):
    def fn(params, x):
        return x @ params["kernel"]

    params, x = {"kernel": jnp.ones((3, 4))}, jnp.ones((2, 3))
    order = (
        r"(check_radial_groups\(fn, params, groups, \*args\)|find_radial_groups\(fn, params, \*)"
    )
    with pytest.raises(TypeError, match=rf"expected {order}.*found {found}"):
        call(fn, params, {"kernel": True}, x)


def test_an_angle_of_more_than_a_radian_is_said():
    groups = so.per_layer()
    for make in (
        lambda angle: so.adamh(angle, groups=groups),
        lambda angle: so.muonh(angle, groups=groups),
        lambda angle: so.rotational(optax.trace(0.9), angle, groups=groups),
    ):
        with pytest.warns(UserWarning, match="an angle of at most 1 radian per step, found 3"):
            make(3.0)
        make(1.0)
        make(lambda step: 3.0)


@pytest.mark.filterwarnings("default:.*expected float32 weights in groups")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_in_groups_are_said_once(dtype):
    params = {"a": jnp.ones((3, 4), dtype), "b": jnp.ones(4, dtype), "c": jnp.ones((2, 2))}
    tx = so.adamsrt(0.1, groups=so.groups_by_path({"a|c": so.per_filter()}))
    message = rf"^a: expected float32 weights in groups, found {dtype} for 1 of 2 leaves"
    with pytest.warns(UserWarning, match=message) as said:
        tx.init(params)
    assert len(said) == 1
    so.adamsrt(0.1, groups=so.groups_by_path({"c": so.per_filter()})).init(params)
