import dataclasses
import re
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import spherical_optax as so
from spherical_optax.groups import joints_at_init, joints_of

PARAMS = {
    "conv": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)},
    "dense": {"kernel": jnp.ones((6, 5))},
}
FILTER, LAYER = so.per_filter(), so.per_layer()


def table(groups, params=PARAMS):
    return so.describe_groups(params, groups)


@pytest.mark.parametrize(
    ("group", "shape", "expected"),
    [
        (so.per_filter(), (3, 3, 2, 4), (4,)),
        (so.per_layer(), (3, 3, 2, 4), ()),
        (so.per_channel_block(2), (3, 3, 2, 4), (2,)),
        (so.per_filter(axis=0), (4, 2, 3, 3), (4,)),
        (so.per_channel_block(2, joint="conv", axis=0), (4, 2, 3, 3), (2,)),
        (so.per_head(axis=1), (6, 3, 2), (3,)),
        (so.RadialGroup(index_axes=(-1, 0)), (7, 3, 5), (7, 5)),
        (so.RadialGroup(index_axes=(0, -1), num_blocks=2), (7, 3, 4), (7, 2)),
        (so.RadialGroup(index_axes=(0, 1)), (2, 3), (2, 3)),
        (so.RadialGroup(index_axes=[0]), (2, 3), (2,)),
        (so.per_filter(ndim=2), (4, 5), (5,)),
        (so.per_filter(ndim=2), (3, 4, 5), (3, 5)),
        (so.per_filter(axis=0, ndim=2), (3, 4, 5), (3, 4)),
        (so.per_layer(ndim=2), (2, 3, 4, 5), (2, 3)),
        (so.RadialGroup(num_blocks=2, ndim=4), (7, 3, 3, 2, 4), (7, 2)),
    ],
)
def test_per_group_shape(group, shape, expected):
    assert group.shape(shape) == expected


@pytest.mark.parametrize(
    "groups",
    [
        {"conv": {"kernel": FILTER, "bias": None}, "dense": None},
        {"conv": {"kernel": True, "bias": False}, "dense": {"kernel": None}},
        so.groups_by_path({r"conv/kernel": FILTER}),
        so.groups_by_path({r"dense": None, r"kernel": True}),
        lambda params: jax.tree.map(lambda p: FILTER if p.ndim == 4 else None, params),
        types.MappingProxyType({"conv": types.MappingProxyType({"kernel": True, "bias": None})}),
    ],
    ids=["prefix", "bools", "rules", "first rule wins", "callable", "other containers"],
)
def test_ways_to_say_the_same_groups(groups):
    if isinstance(groups, types.MappingProxyType):
        groups = {"conv": dict(groups["conv"]), "dense": None}
    assert joints_of(groups, PARAMS) == [{1: FILTER}]


def test_prefix_covers_a_subtree():
    assert joints_of({"conv": True, "dense": LAYER}, PARAMS) == [
        {0: FILTER},
        {1: FILTER},
        {2: LAYER},
    ]
    assert joints_of({"conv": None, "dense": None}, PARAMS) == []


OPTIMIZERS = {
    "adams": lambda groups: so.adams(0.1, groups=groups),
    "adamsrt": lambda groups: so.adamsrt(0.1, groups=groups),
    "adamsw": lambda groups: so.adamsw(0.1, groups=groups),
    "adamsrtw": lambda groups: so.adamsrtw(0.1, groups=groups),
    "sgdmrt": lambda groups: so.sgdmrt(0.1, groups=groups),
    "adamp": lambda groups: so.adamp(0.1, groups=groups),
    "sgdp": lambda groups: so.sgdp(0.1, groups=groups),
    "adamg": lambda groups: so.adamg(0.1, groups=groups, other=optax.adam(0.1)),
    "adamg_star": lambda groups: so.adamg_star(0.1, groups=groups),
    "adamh": lambda groups: so.adamh(0.1, groups=groups, other=optax.adam(0.1)),
    "rotational_adamw": lambda groups: so.rotational_adamw(0.1, groups=groups),
    "retract": so.retract,
    "project_radial": so.project_radial,
    "scale_by_adams": lambda groups: so.scale_by_adams(groups=groups),
    "transport_moments": lambda groups: so.transport_moments(optax.trace(0.9), groups),
    "normalize_updates": so.normalize_updates,
    "record_sphere": so.record_sphere,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_groups_at_all_are_an_error(name):
    """Groups that are all None are an error, however they are given.

    `inject_hyperparams` calls a function of groups with a step count, unless it is static.
    """

    def by_path(params):
        return jax.tree.map_with_path(
            lambda path, _: FILTER if "kernel" in str(path) else None, params
        )

    make = OPTIMIZERS[name]
    injected = optax.inject_hyperparams(make)(groups=by_path)
    for tx in (make(None), make(lambda params: None), injected):
        with pytest.raises(ValueError, match=r"found None for all of them\. .*static_args"):
            tx.init(PARAMS)
    make(by_path).init(PARAMS)
    optax.inject_hyperparams(make, static_args="groups")(groups=by_path).init(PARAMS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_of_one_entry_are_not_silent(name):
    """Groups of one entry cause a warning; optimizers that keep a radius refuse them."""
    params = {"up": {"kernel": KERNEL}, "fc": {"kernel": jnp.ones((4, 3))}}
    rules = so.groups_by_path({"up": so.per_layer(), "fc": so.RadialGroup((0, -1))})
    tx = OPTIMIZERS[name](rules)
    if name.startswith(("adamg", "adamh", "muonh", "rotational", "retract")):
        with pytest.raises(ValueError, match="fc/kernel: expected groups of at least 2 entries"):
            tx.init(params)
    else:
        with pytest.warns(UserWarning, match="fc/kernel: expected groups .* entry by entry"):
            tx.init(params)


def test_leaves_of_a_label_make_one_joint():
    groups = {"conv": so.per_channel_block(2, joint="conv"), "dense": None}
    assert joints_of(groups, PARAMS) == [{0: groups["conv"], 1: groups["conv"]}]


@dataclasses.dataclass
class CallableTree:
    kernel: object

    def __call__(self, x):
        raise AssertionError("a tree of groups was called")


jax.tree_util.register_dataclass(CallableTree)


def test_a_callable_tree_is_a_tree():
    params = CallableTree(jnp.ones((2, 3)))
    assert joints_of(CallableTree(FILTER), params) == [{0: FILTER}]
    assert joints_of(CallableTree(None), params) == []
    partial = jax.tree_util.Partial(lambda params: jax.tree.map(lambda _: FILTER, params))
    assert joints_of(partial, params) == [{0: FILTER}]


def blocks(*names, **leaves):
    """A tree with a module of these leaves under each name; a slash in a name nests modules."""
    tree = {}
    for name in names:
        node = tree
        for key in name.split("/"):
            node = node.setdefault(key, {})
        node.update(leaves)
    return tree


KERNEL, BIAS = jnp.ones((2, 3)), jnp.ones(3)


@pytest.mark.parametrize(
    ("pattern", "joint", "params", "label", "paths"),
    [
        (
            r"(query)/(kernel|bias)",
            r"\1",
            blocks("block0/query", "block1/query", kernel=KERNEL, bias=BIAS),
            "query",
            ["block0/query/bias", "block1/query/bias"],
        ),
        (
            r"(query)/kernel",
            r"\1",
            blocks("encoder/query", "decoder/query", kernel=KERNEL),
            "query",
            ["decoder/query/kernel", "encoder/query/kernel"],
        ),
        (
            "kernel",
            "all",
            blocks("conv", "Conv_1", "conv_10", kernel=KERNEL),
            "all",
            ["conv/kernel", "conv_10/kernel"],
        ),
        ("kernel", "all", [{"kernel": KERNEL}] * 3, "all", ["0/kernel", "1/kernel", "2/kernel"]),
        (
            "kernel",
            "all",
            {"net/conv2d/kernel": KERNEL, "net/conv2d_1/kernel": KERNEL},
            "all",
            ["net/conv2d/kernel", "net/conv2d_1/kernel"],
        ),
        (
            "linear.*/(w|b)$",
            "all",
            {"net/linear": {"w": KERNEL, "b": BIAS}, "net/~/linear_1": {"w": KERNEL}},
            "all",
            ["net/linear/w", "net/~/linear_1/w"],
        ),
    ],
    ids=["blocks", "no digits", "flax names", "list", "keras names", "haiku names"],
)
def test_a_label_for_the_same_layer_of_several_blocks(pattern, joint, params, label, paths):
    rules = so.groups_by_path({pattern: so.per_layer(joint=joint)})
    message = (
        f"expected one joint label per block, found {label!r} for the same layer of several "
        f"blocks, {paths}"
    )
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        so.adamsrt(0.1, groups=rules).init(params)
    assert r'r"(.*)/(kernel|bias)" with joint=r"\1"' in str(error.value)


def test_labels_that_several_modules_may_share():
    """Modules may share a label if they are of different kinds, or if groups say so one by one."""
    params = blocks("conv", "time", kernel=KERNEL, bias=BIAS)
    rules = so.groups_by_path({r"(conv|time)/(kernel|bias)": so.per_layer(joint="sum")})
    assert [list(joint) for joint in joints_of(rules, params)] == [[0, 1, 2, 3]]
    params = blocks("block0/query", "block1/query", kernel=KERNEL)
    two = so.groups_by_path(
        {"0/query": so.per_layer(joint="both"), "1/query": so.per_layer(joint="both")}
    )
    one_each = so.groups_by_path({r"(.*query)/kernel": so.per_layer(joint=r"\1")})
    assert [list(joint) for joint in joints_of(two, params)] == [[0, 1]]
    assert [list(joint) for joint in joints_of(so.per_layer(joint="both"), params)] == [[0, 1]]
    assert [list(joint) for joint in joints_of(one_each, params)] == [[0], [1]]


def test_joint_label_expands_per_module():
    params = {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "b": {"kernel": jnp.ones(4)}}
    rules = so.groups_by_path({r"(.*)/(kernel|bias)": so.per_layer(joint=r"\1")})
    joints = joints_of(rules, params)
    assert [sorted(joint) for joint in joints] == [[0, 1], [2]]
    assert [joint[max(joint)].joint for joint in joints] == ["a", "b"]


def test_none_and_masked_leaves_take_no_group():
    params = {"a": None, "b": optax.MaskedNode(), "c": jnp.ones((2, 3))}
    assert joints_of({"a": True, "b": {"kernel": True}, "c": True}, params) == [{1: FILTER}]
    assert joints_of(so.groups_by_path({"c": True, "b/kernel": True}), params) == [{1: FILTER}]


@dataclasses.dataclass
class Layer:
    kernel: jax.Array


jax.tree_util.register_dataclass(Layer)


def test_paths_are_the_same_for_every_container():
    rules = so.groups_by_path({r"^layers/0/kernel$": True})
    leaf = jnp.ones((2, 3))
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    module = nnx.state(nnx.Dict(layers=nnx.List([model])), nnx.Param)
    for params in (
        {"layers": [{"kernel": leaf}]},
        {"layers": ({"kernel": leaf},)},
        {"layers": {0: Layer(leaf)}},
    ):
        assert joints_of(rules, params) == [{0: FILTER}]
    assert joints_of(rules, module) == [{1: FILTER}]  # the bias comes first
    assert joints_of(rules, nnx.to_pure_dict(module)) == [{1: FILTER}]
    assert joints_of({"layers": {0: {"kernel": True, "bias": None}}}, module) == [{1: FILTER}]
    masked = jax.tree.map(lambda p: p.ndim > 1, module)
    assert joints_of(masked, nnx.to_pure_dict(module)) == [{1: FILTER}]


def test_table():
    groups = {"conv": so.per_channel_block(2, joint="conv"), "dense": None}
    assert table(groups).splitlines() == [
        "path          shape         groups  entries per group  label",
        "conv/bias     (4,)          2       38                 conv",
        "conv/kernel   (3, 3, 2, 4)  2       38                 conv",
        "dense/kernel  (6, 5)        -       -                  -",
    ]


def test_table_has_no_lines_for_absent_leaves():
    params = {"a": None, "b": jnp.ones((2, 3)), "c": None}
    assert table({"a": None, "b": True, "c": None}, params).splitlines()[1:] == [
        "b     (2, 3)  3       2                  -"
    ]
    evidence = [so.Finding(path, (), f"verdict on {path}") for path in params]
    found = so.FoundGroups({"a": None, "b": FILTER, "c": None}, tuple(evidence), 0.0, 1.0, 3)
    assert [line.split()[0] for line in table(found, params).splitlines()[1:-1]] == ["b"]
    assert "verdict on b" in table(found, params)


@pytest.mark.parametrize(
    ("group", "shape", "axes"),
    [
        (FILTER, (8, 3, 3, 3), (0,)),
        (FILTER, (8, 1, 3, 3), (0,)),
        (FILTER, (64, 64, 7, 7), (0,)),
        (FILTER, (64, 16, 1, 1), (0,)),
        (FILTER, (8, 4, 3, 3, 3), (0,)),
        (so.per_channel_block(3), (8, 4, 3, 3), (0,)),
        (so.RadialGroup((0, -1)), (5, 8, 4, 3, 3), (0, 1)),
    ],
)
def test_windows_taken_for_channels(group, shape, axes):
    params = {"conv": {"weight": jax.ShapeDtypeStruct(shape, jnp.float32)}}
    message = re.escape(f"conv/weight of shape {shape}") + ".*" + re.escape(f"index_axes={axes}")
    for show in (lambda: joints_at_init(group, params), lambda: table(group, params)):
        with pytest.warns(UserWarning, match=message) as warned:
            show()
        assert len(warned) == 1
        assert f"found groups on its last axis, of size {shape[-1]}" in str(warned[0].message)
        assert warned[0].filename == __file__


@pytest.mark.parametrize(
    ("group", "shape"),
    [
        *[(FILTER, (3, 3, n, m)) for n in (1, 2, 3, 64) for m in (1, 2, 3, 64)],
        (FILTER, (7, 7, 3, 64)),
        (FILTER, (4, 4, 3, 3)),
        (FILTER, (1, 1, 8, 8)),
        (FILTER, (1, 7, 4, 4)),
        (FILTER, (16, 16, 3, 768)),
        (FILTER, (3, 8, 3, 3)),
        (FILTER, (48, 16, 32, 32)),
        (FILTER, (3, 3, 3, 8, 8)),
        (FILTER, (512, 8, 8)),
        (FILTER, (8, 3)),
        (so.per_head(axis=-2), (12, 8, 4, 4)),
        (LAYER, (8, 3, 3, 3)),
        (so.per_filter(axis=0), (8, 3, 3, 3)),
        (so.per_filter(axis=3), (8, 3, 3, 3)),  # an axis counted from the front is intended
        (so.RadialGroup((0, -1)), (8, 3, 3, 3, 3)),  # stacked kernels
    ],
)
def test_channels_that_are_no_window(group, shape):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        joints = joints_at_init(group, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert joints == [{0: group}]


def test_keras_variables():
    """Rules find Keras variables in a flat dictionary of paths, and in a list by number."""
    params = {"seq/conv2d/kernel": KERNEL, "seq/conv2d/bias": BIAS}
    rules = so.groups_by_path({"conv2d/kernel": True})
    tree = {"seq/conv2d/kernel": True, "seq/conv2d/bias": None}
    assert joints_of(rules, params) == joints_of(tree, params) == [{1: FILTER}]
    assert joints_of([True, None], [KERNEL, BIAS]) == [{0: FILTER}]
    assert joints_of(so.groups_by_path({"^0$": True}), [KERNEL, BIAS]) == [{0: FILTER}]


@dataclasses.dataclass
class KerasVariable:
    """A stand-in for a Keras variable: it is not an array, and its dtype is a string."""

    value: jax.Array
    shape: tuple[int, ...] = (2, 3)
    dtype: str = "float32"


@pytest.mark.parametrize(
    ("leaf", "found"),
    [
        (jax.nn.relu, "<.*> of type "),
        ("SAME", "'SAME' of type str"),
        (KerasVariable(KERNEL), "KerasVariable.* of type KerasVariable"),
        (jax.random.key(0), "a random key of dtype key<fry>"),
    ],
    ids=["function", "string", "keras variable", "random key"],
)
def test_a_whole_model_as_parameters(leaf, found):
    params = {"layer": {"kernel": KERNEL, "other": leaf}}
    rules = so.groups_by_path({"kernel": True})
    message = (
        rf"layer/other: expected an array of parameters, found {found}.*Pass only the "
        r"parameters: nnx\.state\(model, nnx\.Param\)"
    )
    tx = so.adamsrt(0.1, groups=rules)
    state = tx.init({"layer": {"kernel": KERNEL, "other": BIAS}})
    for use in (
        lambda: table(rules, params),
        lambda: tx.init(params),
        lambda: tx.update(params, state, params),
    ):
        with pytest.raises(TypeError, match=message):
            use()


def test_statistics_of_linen_are_no_parameters():
    variables = {"params": PARAMS, "batch_stats": {"norm": {"mean": BIAS}}}
    message = (
        r"batch_stats/norm/mean: expected .* found a statistic.*variables\['params'\] of a Linen"
    )
    with pytest.raises(TypeError, match=message):
        so.adamsrt(0.1, groups=so.per_filter()).init(variables)


@pytest.mark.parametrize("groups", [so.per_filter(), so.groups_by_path({"conv": True})])
def test_params_and_groups_that_changed_places(groups):
    with pytest.raises(TypeError, match="params and groups seem to be swapped"):
        so.describe_groups(groups, PARAMS)


def test_numpy_scalars_are_taken():
    assert so.RadialGroup((np.int64(1),)) == so.RadialGroup((1,))
    assert joints_of({"conv": np.bool_(True), "dense": np.bool_(False)}, PARAMS) == [
        {0: FILTER},
        {1: FILTER},
    ]


def test_shapes_alone_are_enough():
    shapes = jax.eval_shape(lambda: PARAMS)
    assert joints_of({"conv": {"kernel": True, "bias": None}, "dense": None}, shapes) == [
        {1: FILTER}
    ]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: so.RadialGroup(index_axes=-1), TypeError, r"index_axes as a tuple.*found -1"),
        (lambda: so.RadialGroup(index_axes=(0.5,)), TypeError, r"integer index_axes, found 0\.5"),
        (
            lambda: so.RadialGroup(index_axes=(0, 0)),
            ValueError,
            r"expected distinct index_axes, found \(0, 0\)",
        ),
        (lambda: so.RadialGroup(num_blocks=0), ValueError, "at least 1, found 0"),
        (lambda: so.RadialGroup(num_blocks=2.0), TypeError, r"integer num_blocks, found 2\.0"),
        (lambda: so.RadialGroup((), num_blocks=2), ValueError, "index_axes is empty"),
        (lambda: so.RadialGroup(ndim=0), ValueError, "ndim of at least 1, found 0"),
        (lambda: so.RadialGroup(ndim=2.0), TypeError, r"integer ndim, found 2\.0"),
        (lambda: so.RadialGroup(joint=3), TypeError, "joint as a string, found 3"),
        (lambda: so.groups_by_path({}), ValueError, "at least one rule"),
        (lambda: so.groups_by_path({"(": True}), ValueError, r"'\(' is not a regular expression"),
        (lambda: so.groups_by_path({1: True}), TypeError, "expressions as keys, found 1"),
        (
            lambda: so.groups_by_path(["a"]),
            TypeError,
            r"expected a dictionary .*\['a'\] of type list",
        ),
        (lambda: so.per_layer(joint=""), ValueError, "joint as printable text, found ''"),
        (lambda: so.per_layer(joint="\1"), ValueError, r"found '\\x01'\. .*raw string"),
        (lambda: so.groups_by_path({"a": "filter"}), TypeError, "rule 'a', found 'filter'"),
    ],
)
def test_bad_group(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (
            {"conv": True, "dense": so.per_head(axis=2)},
            ValueError,
            r"dense/kernel of shape \(6, 5\): expected index_axes within .* 2 axes, found \(2,\)",
        ),
        (
            {"conv": True, "dense": so.per_filter(ndim=3)},
            ValueError,
            r"dense/kernel of shape \(6, 5\): expected an array of at least 3 axes, found 2",
        ),
        (
            {"conv": True, "dense": so.RadialGroup((1, -1))},
            ValueError,
            r"dense/kernel of shape \(6, 5\): expected distinct index_axes, found \(1, -1\)",
        ),
        (
            {"conv": True, "dense": so.per_channel_block(3)},
            ValueError,
            r"dense/kernel of shape \(6, 5\): expected num_blocks to divide.*5, found num_blocks=3",
        ),
        (
            {"conv": {"kernel": True}, "dense": None},
            ValueError,
            r"found nothing for conv/bias of shape \(4,\); put None there",
        ),
        (
            {"conv": None, "dense": None, "head": True},
            ValueError,
            r"found \['head'\], which no parameter has.*conv/bias",
        ),
        (
            {"conv": {"kernel": {"x": True}, "bias": None}, "dense": None},
            ValueError,
            "found nothing for conv/kernel",
        ),
        ({"conv": "filter", "dense": None}, TypeError, "at conv, found 'filter' of type str"),
        (optax.adam(1e-3), TypeError, "expected groups, found a gradient transformation; compose"),
        (so.per_layer, TypeError, r"found a function; call per_layer\(\.\.\.\)"),
        ({"conv/kernel": True}, ValueError, "regular expressions, call groups_by_path"),
        (
            {"conv": so.per_layer(joint=r"\1"), "dense": None},
            ValueError,
            r"expected a plain joint label at conv, found '\\\\1'",
        ),
        (
            so.groups_by_path({"dense/kernel": so.per_layer(joint=r"\2")}),
            ValueError,
            r"rule 'dense/kernel': expected a joint label .* found '\\\\2' for dense/kernel: ",
        ),
        (
            so.groups_by_path({"kernel": True, "conv/kernel": None}),
            ValueError,
            r"earlier rules match every path that \['conv/kernel'\] match\. Put ",
        ),
        (
            so.groups_by_path({"kernel": True, "convv": True}),
            ValueError,
            r"no parameter path matches \['convv'\].*'conv/bias', 'conv/kernel', 'dense/kernel'",
        ),
        (
            so.groups_by_path(
                {"conv": so.per_channel_block(2, joint="j"), "dense": so.per_layer(joint="j")}
            ),
            ValueError,
            r"dense/kernel of shape \(6, 5\): expected 2 groups, as in conv/bias of shape \(4,\) "
            r"with the same joint label 'j', found 1",
        ),
    ],
)
def test_groups_that_do_not_fit(groups, error, message):
    with pytest.raises(error, match=message):
        so.project_radial(groups).init(PARAMS)


def test_a_mask_that_hides_part_of_a_joint_group_is_refused():
    """A mask may hide all leaves of a joint group or none, as a part would be another group."""
    rules = so.groups_by_path({"dense": so.per_layer(joint="d"), "conv": so.per_layer(joint="c")})
    tree = {"conv": so.per_layer(joint="c"), "dense": {"kernel": None}}
    message = (
        r"joint label 'c': expected all its leaves or none, found \['conv/bias'\], while "
        r"optax.masked or optax.partition hides \['conv/kernel'\]"
    )
    for groups in (rules, tree):
        tx = so.project_radial(groups)
        for conv, dense in ((True, False), (False, True), (True, True)):
            optax.masked(tx, {"conv": conv, "dense": dense}).init(PARAMS)
        with pytest.raises(ValueError, match=message):
            optax.masked(tx, {"conv": {"bias": True, "kernel": False}, "dense": True}).init(PARAMS)
        labels = {"conv": {"bias": "b", "kernel": "a"}, "dense": "b"}
        with pytest.raises(ValueError, match="joint label 'c'"):
            optax.partition({"a": tx, "b": optax.sgd(0.1)}, labels).init(PARAMS)


@pytest.mark.parametrize("leaf", [jnp.arange(6).reshape(2, 3), jnp.ones((2, 3), jnp.complex64)])
def test_leaf_that_is_not_real_floating(leaf):
    message = rf"table of shape \(2, 3\): expected a real floating dtype .*, found {leaf.dtype}"
    with pytest.raises(TypeError, match=message):
        so.adamsrt(0.1, groups=True).init({"table": leaf})
    with pytest.raises(TypeError, match=r"scale: expected an array .*, found 1\.0 of type float"):
        so.adamsrt(0.1, groups=True).init({"scale": 1.0})


@pytest.mark.parametrize("alone", [so.per_filter(ndim=2), so.per_layer(ndim=2)])
def test_one_group_object_is_right_for_a_kernel_and_for_a_stack(alone, x64):
    """With `ndim`, each kernel of a stack is projected as it is alone."""
    x, g = (np.random.default_rng(seed).normal(size=(3, 4, 5)) for seed in (0, 1))
    tx = so.project_radial(alone)
    stacked, _ = tx.update(jnp.asarray(g), tx.init(jnp.asarray(x)), jnp.asarray(x))
    for i in range(3):
        one, _ = tx.update(jnp.asarray(g[i]), tx.init(jnp.asarray(x[i])), jnp.asarray(x[i]))
        np.testing.assert_allclose(stacked[i], one, rtol=1e-12)
    entries = {so.per_filter(ndim=2): "15      4", so.per_layer(ndim=2): "3       20"}[alone]
    assert entries in so.describe_groups({"critic": jnp.ones((3, 4, 5))}, alone)
