"""Radial groups found by experiment, and masks checked by it.

A group is radially invariant exactly when, at every point, the gradient of every
function of the network's outputs is orthogonal to it: d/da f(a x) = <grad f, x> = 0. So
at a random point, for a random function of the outputs, one gradient g decides for all
leaves and all partitions at once. With p = g x (entry by entry) and s the sums of p over
a partition's groups,

    deviation = |s| / |p|

is of order 1 where the entries have no reason to cancel, whatever the groups' size, and
rounding (plus the normalization layers' epsilon over the variance) where the groups are
invariant. What is found is then confirmed by what it claims: all groups are scaled by
random factors, and the outputs must stay.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spherical_optax import _trees, geometry
from spherical_optax.groups import (
    Finding,
    FoundGroups,
    Groups,
    RadialGroup,
    group_size,
    radial_units,
)

Unit = dict[int, RadialGroup]

DRAWS = 3  # so that no sum cancels by chance at all of them
SCALES = (4.0, 2.0, 1.0, 0.5)  # of the layers' outputs; the first at which nothing overflows
NO_EFFECT = 1e-5  # |p| of a leaf, relative to the largest leaf's
CHANGED = 1e-2  # relative change of the outputs


class _Thresholds(NamedTuple):
    invariant: float  # deviations up to this are
    varying: float  # deviations from this on are not; between, it is not clear


class _Experiment(NamedTuple):
    """A forward pass at random parameters, its outputs and the products p = g x."""

    leaves: list[_trees.Leaf]
    evaluate: Callable[[list[Any], jax.Array], tuple[list[jax.Array], dict[int, jax.Array]]]
    first_draw: Callable[[], list[Any]]
    outputs: list[np.ndarray]  # at the first draw
    products: list[dict[int, np.ndarray]]
    thresholds: _Thresholds
    forward_passes: int

    def deviation(self, unit: Unit) -> float:
        """The largest deviation over the draws."""
        return max(_deviation(products, unit) for products in self.products)

    def effects(self) -> dict[int, float]:
        """How much each leaf matters to the outputs, relative to the one that matters most."""
        sizes = [
            {i: float(np.linalg.norm(p)) for i, p in products.items()} for products in self.products
        ]
        largest = [max(each.values()) or 1.0 for each in sizes]
        return {
            i: max(each[i] / most for each, most in zip(sizes, largest, strict=True))
            for i in sizes[0]
        }


def find_radial_groups(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    explain: bool = False,
    vectors: bool = False,
) -> Any:
    """Finds which parameters are radially invariant, and their finest groups.

    Invariance is a property of the architecture, so it is tested at random parameters, all
    non-zero, and not at the values given, of which only shapes, dtypes and signs are read.
    For each leaf the finest invariant partition wins: index axes, several together,
    contiguous blocks of an axis (GroupNorm), the whole array; where a leaf is not
    invariant alone, then jointly with other leaves of its module (a kernel with its bias).

    Args:
      fn: The forward pass, called as `fn(params, *args)`: a pure function that returns the
        network's outputs, in any pytree. BatchNorm must be in *training* mode and its
        updated statistics left out of the outputs: with running statistics the filters'
        lengths do matter. Dropout must be off, or its key fixed.
      params: The parameters; `jax.ShapeDtypeStruct` leaves will do.
      *args: Whatever else `fn` takes; a small batch is enough. A floating array of two or
        more axes that is constant, as in `jnp.ones((1, 28, 28, 1))`, is replaced by random
        numbers: statistics of a constant batch hide what the weights do. So do those of
        one or two samples, and one-hot rows make each row of a kernel a group of its own.
      explain: Whether to return `FoundGroups`, with the evidence for each leaf.
      vectors: Whether to report one-dimensional leaves without a kernel too: under ReLU a
        normalization layer's own scale and bias are often jointly invariant.

    Returns:
      A tree like `params` of `RadialGroup` and `None`, or with `explain` a `FoundGroups`.
      Either is accepted wherever `groups` is.

    Raises:
      TypeError: If `fn` cannot be called with these arguments.
      ValueError: If there is no floating leaf, or `fn` returns nothing, returns NaN, or is
        not deterministic.

    Warns:
      UserWarning: Names leaves whose deviation is neither small nor large; they get no
        group.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import spherical_optax as so
      >>> def fn(params, x):
      ...     x = x @ params["hidden"]["kernel"] + params["hidden"]["bias"]
      ...     x = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)  # BatchNorm
      ...     return jax.nn.relu(x) @ params["head"]
      >>> params = {"hidden": {"kernel": jnp.zeros((4, 8)), "bias": jnp.zeros(8)},
      ...           "head": jnp.zeros((8, 3))}
      >>> groups = so.find_radial_groups(fn, params, jnp.eye(4))
      >>> print(so.describe_groups(params, groups))
      path           shape   groups  entries per group  label
      head           (8, 3)  -       -                  -
      hidden/bias    (8,)    -       -                  -
      hidden/kernel  (4, 8)  8       4                  -

    References:
      Roburin et al., Neurocomputing 2022, section 2 (radial invariance).
    """
    experiment = _experiment("find_radial_groups", fn, params, args)
    units, tried, verdicts = _search(experiment, vectors)
    units = _confirm(experiment, units, verdicts)
    unclear = [
        f"{leaf.path} ({', '.join(f'{name} {d:.0e}' for name, d in tried[i])})"
        for i, leaf in enumerate(experiment.leaves)
        if verdicts.get(i, "").startswith("unclear")
    ]
    if unclear:
        warnings.warn(
            f"find_radial_groups: expected deviations up to {experiment.thresholds.invariant:.0e} "
            f"or from {experiment.thresholds.varying:.0e} on, found ones between for {unclear}; "
            "they get no group. A larger batch, float32 computation or a smaller epsilon may "
            "decide.",
            UserWarning,
            stacklevel=2,
        )
    found = {i: group for unit in units for i, group in unit.items()}
    groups = _tree_of(params, found)
    if not explain:
        return groups
    accepted = [experiment.deviation(unit) for unit in units]
    rejected = [
        deviation
        for each in tried.values()
        for _, deviation in each
        if deviation > 3 * experiment.thresholds.invariant
    ]
    return FoundGroups(
        groups=groups,
        findings=tuple(
            Finding(leaf.path, tuple(tried.get(i, ())), verdicts.get(i, "not floating"))
            for i, leaf in enumerate(experiment.leaves)
        ),
        invariant_up_to=max(accepted, default=0.0),
        others_from=min(rejected, default=math.inf),
        forward_passes=experiment.forward_passes + 3,
    )


def check_radial_groups(fn: Callable[..., Any], params: Any, groups: Groups, *args: Any) -> None:
    """Checks a mask by experiment: every group invariant, and none coarser than it could be.

    Leaves without a group are not looked at.

    Args:
      fn: The forward pass, as in `find_radial_groups`.
      params: The parameters.
      groups: See the module `spherical_optax.groups`.
      *args: Whatever else `fn` takes.

    Raises:
      TypeError: If `fn` cannot be called with these arguments.
      ValueError: If a group is wrong; the message lists all leaves with their shapes, what
        was measured and what was found instead.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import spherical_optax as so
      >>> def fn(params, x):
      ...     x = x @ params["kernel"]
      ...     return x / jnp.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-6)  # RMSNorm
      >>> params, x = {"kernel": jnp.ones((4, 8))}, jax.random.normal(jax.random.key(0), (6, 4))
      >>> so.check_radial_groups(fn, params, {"kernel": so.per_layer()}, x)
      >>> so.check_radial_groups(fn, params, {"kernel": so.per_filter()}, x)
      Traceback (most recent call last):
          ...
      ValueError: check_radial_groups: 1 of 1 groups:
      kernel of shape (4, 8): expected an invariant group, found a deviation of 1 for \
RadialGroup(index_axes=(-1,)); invariant is RadialGroup(index_axes=()).
    """
    given = radial_units(groups, params)
    experiment = _experiment("check_radial_groups", fn, params, args)
    units, _, verdicts = _search(experiment, vectors=True)
    found = {i: unit for unit in _confirm(experiment, units, verdicts) for i in unit}
    shapes = {i: leaf.value for i, leaf in enumerate(experiment.leaves) if leaf.value is not None}
    wrong = []
    for unit in given:
        i = next(iter(unit))
        better = found.get(i)
        instead = "no group found is" if better is None else f"invariant is {_say(better[i])}"
        deviation = experiment.deviation(unit)
        where = ", ".join(
            f"{experiment.leaves[j].path} of shape {tuple(shapes[j].shape)}" for j in unit
        )
        if all(verdicts.get(j) == "no effect on the outputs" for j in unit):
            wrong.append(f"{where}: expected an invariant group, found no effect on the outputs.")
        elif deviation > experiment.thresholds.invariant:
            wrong.append(
                f"{where}: expected an invariant group, found a deviation of {deviation:.1g} for "
                f"{_say(unit[i])}; {instead}."
            )
        elif better is not None and group_size(better, shapes) < group_size(unit, shapes):
            wrong.append(
                f"{where}: expected the finest invariant groups, found {_say(unit[i])}; finer and "
                f"invariant is {_say(better[i])}."
            )
    if wrong:
        raise ValueError(
            f"check_radial_groups: {len(wrong)} of {len(given)} groups:\n" + "\n".join(wrong)
        )


def _say(group: RadialGroup) -> str:
    """The group as one would write it."""
    fields = [f"index_axes={group.index_axes}"]
    fields += [f"num_blocks={group.num_blocks}"] if group.num_blocks is not None else []
    fields += [f"joint={group.joint!r}"] if group.joint is not None else []
    return f"RadialGroup({', '.join(fields)})"


def _tree_of(params: Any, found: Unit) -> Any:
    boxes, treedef = _trees.flatten_boxes(params)
    return treedef.unflatten([found.get(i) for i in range(len(boxes))])


# --- the experiment ---------------------------------------------------------------------


def _experiment(who: str, fn: Callable[..., Any], params: Any, args: Sequence[Any]) -> _Experiment:
    leaves = _trees.visible_leaves(params)
    values, treedef = _trees.flatten(params)
    floating = [i for i, value in enumerate(values) if _is_floating(value)]
    if not floating:
        raise ValueError(
            f"{who}: expected parameters with floating leaves, found "
            f"{[(leaf.path, str(getattr(leaf.value, 'dtype', leaf.value))) for leaf in leaves]}."
        )
    rng = np.random.default_rng(0)
    args = jax.tree.map(lambda arg: _generic_input(arg, rng), tuple(args))

    def forward(point: list[Any]) -> list[jax.Array]:
        # The identity map makes NNX variables among the arguments anew, free to be mutated.
        outputs = jax.tree.leaves(fn(treedef.unflatten(point), *jax.tree.map(lambda a: a, args)))
        return [output for output in outputs if _is_floating(output)]

    @jax.jit
    def evaluate(point: list[Any], key: jax.Array) -> tuple[list[jax.Array], dict[int, jax.Array]]:
        def random_function(
            varied: dict[int, jax.Array],
        ) -> tuple[jax.Array, list[jax.Array]]:
            outputs = forward([varied.get(i, value) for i, value in enumerate(point)])
            total = jnp.zeros(())
            for number, output in enumerate(outputs):
                wide = geometry.wide(output)
                size = jax.lax.stop_gradient(jnp.max(jnp.abs(wide), initial=0))
                weights = jax.random.normal(jax.random.fold_in(key, number), wide.shape, wide.dtype)
                total = total + jnp.sum(weights * wide) / jnp.where(size == 0, 1, size)
            return total, outputs

        varied = {i: point[i] for i in floating}
        (_, outputs), grads = jax.value_and_grad(random_function, has_aux=True)(varied)
        products = {i: geometry.wide(grads[i]) * geometry.wide(point[i]) for i in floating}
        largest = jnp.max(jnp.stack([jnp.max(jnp.abs(p), initial=0) for p in products.values()]))
        return outputs, jax.tree.map(lambda p: p / jnp.where(largest == 0, 1, largest), products)

    def draw(number: int, scale: float) -> list[Any]:
        rng = np.random.default_rng(number)
        return [_generic(value, rng, scale) for value in values]

    _check_runs(who, forward, draw(0, 1.0), len(args))
    for scale in SCALES:
        again, _ = evaluate(draw(0, scale), jax.random.key(0))
        evaluations = [
            evaluate(draw(number, scale), jax.random.key(number)) for number in range(DRAWS)
        ]
        finite = all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(evaluations))
        if finite:
            break
    outputs = [np.asarray(output, np.float64) for output in evaluations[0][0]]
    if not finite:
        raise ValueError(
            f"{who}: expected finite outputs of fn, found NaN or infinity in them or in their "
            "gradients, at random parameters."
        )
    _check_same(who, _change(outputs, again))
    products = [{i: np.asarray(p) for i, p in each.items()} for _, each in evaluations]
    coarsest = max(float(jnp.finfo(values[i].dtype).eps) for i in floating)
    thresholds = _Thresholds(max(5e-3, 4 * coarsest), max(1.5e-2, 12 * coarsest))
    passes = 3 * (DRAWS + 1) * (SCALES.index(scale) + 1)
    return _Experiment(
        leaves, evaluate, lambda: draw(0, scale), outputs, products, thresholds, passes
    )


def _is_floating(value: Any) -> bool:
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating)


def _generic(value: Any, rng: np.random.Generator, scale: float) -> Any:
    """A random leaf; a kernel multiplies its input's size by about `scale`.

    The larger the scale, the less a normalization layer's epsilon disturbs, but the more a
    softmax without normalization saturates.
    """
    if isinstance(value, jax.ShapeDtypeStruct) and not _is_floating(value):
        return jnp.zeros(value.shape, value.dtype)
    if not _is_floating(value):
        return value
    shape = tuple(value.shape)
    sizes = [size for size in shape if size > 1]
    if len(sizes) > 1:
        scale = scale / math.sqrt(math.prod(sizes) / max(sizes))
        uniform = rng.random(shape, np.float32) - np.float32(0.5)
        return jnp.asarray(np.float32(math.sqrt(12) * scale) * uniform, value.dtype)
    # A vector keeps its signs: it may be the argument of a root or a logarithm. What is
    # zero, as biases are, stays smaller, for fewer dead units.
    size, sign = rng.uniform(0.75, 1.5, shape), rng.choice([-1.0, 1.0], size=shape)
    given = np.zeros(shape)
    if not isinstance(value, jax.ShapeDtypeStruct):
        given = np.sign(np.asarray(value, np.float64))
    return jnp.asarray(np.where(given == 0, 0.4 * sign, given) * size, value.dtype)


def _generic_input(arg: Any, rng: np.random.Generator) -> Any:
    """The input itself, or random numbers for a constant array of two or more axes."""
    if not (isinstance(arg, jax.Array | np.ndarray) and _is_floating(arg) and arg.ndim > 1):
        return arg
    if isinstance(arg, jax.core.Tracer) or arg.size < 2 or not bool((arg == arg.ravel()[0]).all()):
        return arg
    return jnp.asarray(rng.standard_normal(arg.shape), arg.dtype)


def _check_runs(
    who: str, forward: Callable[[list[Any]], list[jax.Array]], point: list[Any], further: int
) -> None:
    """Traces the forward pass twice: it must run, return something, and be the same."""
    try:
        # A new function each time: JAX remembers the trace of an old one.
        traces = [jax.make_jaxpr(lambda point: forward(point))(point) for _ in range(2)]
    except TypeError as error:
        raise TypeError(
            f"{who}: fn(params, *args) was called with params and {further} further arguments "
            f"and raised: {error}. Pass what fn needs after params, or bind it: "
            "lambda params, x: model.apply({'params': params}, x, train=True)."
        ) from error
    except Exception as error:
        if type(error).__name__ != "TraceContextError":  # flax.errors; flax is not required
            raise
        raise ValueError(
            f"{who}: fn mutates variables made outside of it: {error}. Make them inside, "
            "with nnx.merge(graphdef, params, rest, copy=True)."
        ) from error
    if not traces[0].out_avals:
        raise ValueError(
            f"{who}: expected fn to return the network's outputs, found no floating array in "
            "what it returned."
        )
    texts = [re.sub(r" at 0x[0-9a-f]+", "", str(trace.jaxpr)) for trace in traces]
    same = texts[0] == texts[1] and len(traces[0].consts) == len(traces[1].consts)
    for a, b in zip(traces[0].consts, traces[1].consts, strict=False):
        same = same and a.shape == b.shape and a.dtype == b.dtype and _same_values(a, b)
    _check_same(who, 0.0 if same else math.inf)


def _same_values(a: Any, b: Any) -> bool:
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return a is b or bool(np.array_equal(np.asarray(a), np.asarray(b)))


def _check_same(who: str, change: float) -> None:
    if change > 1e-3:
        raise ValueError(
            f"{who}: expected the same outputs from the same arguments, found that two calls of fn "
            "differ; turn dropout off, or give it a fixed key."
        )


def _change(outputs: Sequence[Any], others: Sequence[Any]) -> float:
    """The largest relative change among the outputs."""
    change = 0.0
    for a, b in zip(outputs, others, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        size = np.linalg.norm(a)
        change = max(change, float(np.linalg.norm(a - b) / (size or 1.0)))
    return change


def _deviation(products: dict[int, np.ndarray], unit: Unit) -> float:
    total: Any = 0.0
    square = 0.0
    for i, group in unit.items():
        p = products[i]
        axes = group.axes(p.ndim)
        others = tuple(axis for axis in range(p.ndim) if axis not in axes)
        sums = p.sum(axis=others, dtype=np.float64)
        if group.num_blocks is not None:
            sums = sums.reshape(*sums.shape[:-1], group.num_blocks, -1).sum(-1)
        total = total + sums.ravel()
        square += float(np.vdot(p, p))
    return float(np.linalg.norm(total)) / math.sqrt(square) if square > 0 else 0.0


# --- the search -------------------------------------------------------------------------

Tried = dict[int, list[tuple[str, float]]]


def _search(experiment: _Experiment, vectors: bool) -> tuple[list[Unit], Tried, dict[int, str]]:
    """The finest invariant units, what was tried for each leaf, and the verdicts."""
    thresholds = experiment.thresholds
    tried: Tried = {}
    verdicts: dict[int, str] = {}
    units: list[Unit] = []
    open_leaves = []
    for i, effect in experiment.effects().items():
        tried[i] = []
        if effect < NO_EFFECT:
            verdicts[i] = "no effect on the outputs"
            continue
        open_leaves.append(i)

    def try_jointly(numbers: tuple[int, ...]) -> None:
        """Looks for the finest invariant partition of some leaves together."""
        first, *others = numbers
        limit = thresholds.invariant
        names = " and ".join(experiment.leaves[i].keys[-1] for i in others)

        def invariant(name: str, unit: Unit) -> bool:
            nonlocal limit
            deviation = experiment.deviation(unit)
            tried[first].append((f"{name} with {names}" if others else name, deviation))
            if name == "whole" and not others:
                unclear = thresholds.invariant < deviation < thresholds.varying
                verdicts.update({first: "unclear"} if unclear else {})
            if deviation > limit:
                return False
            # Epsilon disturbs finer groups a little more: what it did to the whole says how much.
            limit = max(limit, 3 * deviation) if name == "whole" else limit
            return True

        best = _finest(invariant, {i: experiment.products[0][i].shape for i in numbers})
        if best is None:
            return
        if others:
            label = "/".join(experiment.leaves[first].keys[:-1]) or "joint"
            taken = {group.joint for unit in units for group in unit.values()}
            while label in taken:
                label += "'"
            best = {i: dataclasses.replace(group, joint=label) for i, group in best.items()}
        units.append(best)
        verdicts.update(dict.fromkeys(numbers, "jointly invariant" if others else "invariant"))

    def rank(i: int) -> tuple[int, int]:
        shape = experiment.products[0][i].shape
        return -sum(size > 1 for size in shape), -math.prod(shape)

    leaders = sorted(open_leaves, key=rank)
    leaders = [i for i in leaders if vectors or rank(i)[0] < -1]
    for i in leaders:
        try_jointly((i,))
    for i in leaders:
        module = experiment.leaves[i].keys[:-1]
        siblings = [j for j in open_leaves if j != i and experiment.leaves[j].keys[:-1] == module]
        for others in _subsets_of(siblings):
            if i in verdicts and verdicts[i] != "unclear":
                break
            if all(verdicts.get(j, "unclear") == "unclear" for j in others):
                try_jointly((i, *others))
    for i in open_leaves:
        verdicts.setdefault(i, "not invariant" if i in leaders else "one-dimensional, no kernel")
    return units, tried, verdicts


def _subsets_of(siblings: list[int]) -> Iterator[tuple[int, ...]]:
    """One other leaf, two, and all of them."""
    yield from ((i,) for i in siblings)
    if len(siblings) <= 8:
        yield from combinations(siblings, 2)
    if len(siblings) > 2:
        yield tuple(siblings)


def _finest(
    invariant: Callable[[str, Unit], bool], shapes: dict[int, tuple[int, ...]]
) -> Unit | None:
    """The finest partition that passes the test, from coarse to fine; `None` if none does.

    The first leaf's index axes are matched by axes of the same sizes in the others.
    """
    (first, shape), *_ = shapes.items()
    whole: Unit = {i: RadialGroup(index_axes=()) for i in shapes}
    if not invariant("whole", whole):
        return None
    passed = {1: whole}  # by number of groups

    def passes(name: str, axes: tuple[int, ...], num_blocks: int | None = None) -> bool:
        count = math.prod(shape[axis] for axis in axes[:-1]) * (num_blocks or shape[axes[-1]])
        for unit in _matched(axes, shapes):
            split = {i: dataclasses.replace(g, num_blocks=num_blocks) for i, g in unit.items()}
            if invariant(name, split):
                passed[count] = split
                return True
        return False

    single = [a for a, size in enumerate(shape) if size > 1 and passes(f"axis {a}", (a,))]
    for n in range(2, len(single) + 1):
        for axes in combinations(single, n):
            passes(f"axes {axes}", axes)
    # Blocks of an axis after those that already index the groups.
    axes = passed[max(passed)][first].axes(len(shape))
    for axis in range(max(axes, default=-1) + 1, len(shape)):
        for blocks in range(2, shape[axis] // 2 + 1):
            if shape[axis] % blocks == 0:
                passes(f"{blocks} blocks of axis {axis}", (*axes, axis), blocks)
    return passed[max(passed)]


def _matched(axes: tuple[int, ...], shapes: dict[int, tuple[int, ...]]) -> Iterator[Unit]:
    """The given axes of the first leaf, with all choices of such axes in the others."""
    (first, shape), *others = shapes.items()
    sizes = [shape[axis] for axis in axes]
    choices = [
        [
            chosen
            for chosen in combinations(range(len(other)), len(axes))
            if [other[axis] for axis in chosen] == sizes
        ]
        for _, other in others
    ]
    for chosen in product(*choices):
        unit = {first: _group(axes, shape)}
        for (i, other), each in zip(others, chosen, strict=True):
            unit[i] = _group(each, other)
        yield unit


def _group(axes: tuple[int, ...], shape: tuple[int, ...]) -> RadialGroup:
    """With the last axis as -1, as one writes it."""
    return RadialGroup(tuple(-1 if axis == len(shape) - 1 else axis for axis in axes))


# --- the confirmation -------------------------------------------------------------------


def _confirm(experiment: _Experiment, units: list[Unit], verdicts: dict[int, str]) -> list[Unit]:
    """Scales all groups by random factors; drops those that change the outputs."""
    still = [i for i, verdict in verdicts.items() if verdict == "no effect on the outputs"]

    def change(units: list[Unit], still: list[int]) -> float:
        rng = np.random.default_rng(1)
        point = experiment.first_draw()
        for unit in units:
            count = math.prod(unit[next(iter(unit))].shape(point[next(iter(unit))].shape))
            # Powers of two: scaling by them rounds nothing.
            factors = np.resize(2.0 ** rng.permutation([-2, -1, 1, 2]), count)
            scaled = geometry.scale(jnp.asarray(factors), {i: point[i] for i in unit}, unit)
            for i in unit:
                point[i] = scaled[i]
        for i in still:
            point[i] = point[i] * jnp.asarray(rng.uniform(0.5, 2, point[i].shape), point[i].dtype)
        outputs, _ = experiment.evaluate(point, jax.random.key(0))
        return _change(experiment.outputs, outputs)

    if change(units, still) <= CHANGED:
        return units
    kept = []
    for unit in units:
        moved = change([unit], [])
        if moved <= CHANGED:
            kept.append(unit)
        else:
            for i in unit:
                verdicts[i] = f"unclear: scaling changes the outputs by {moved:.0e}"
    for i in still:
        if change([], [i]) > CHANGED:
            verdicts[i] = "not invariant: no gradient, but an effect on the outputs"
    return kept
