"""The experiment: gradients of random functions of the outputs, at several points.

Let g be the gradient at a point x, and p = g x, entry by entry. A group is invariant if its entries
of p sum to zero. The deviation from zero does not depend on how much a group matters:

    deviation = |sums of p over the groups| / |p|

It is of order 1 where entries have no reason to cancel, and of the size of rounding where they must
cancel. One point is not enough: a layer seems invariant if its output is added to a far larger or
smaller one. So there are several points. One is near the given parameters, and one is random, with
signals of size one. At two more points, the leaves that seem invariant are made larger than at the
first, or smaller than at the second. A leaf that only seemed invariant then deviates.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from spherical_optax import _complex, _trees
from spherical_optax._numerics import wide
from spherical_optax.detection import _flow, _program, _widened
from spherical_optax.detection._arguments import is_floating, varied
from spherical_optax.detection._points import drawn, is_known, jittered
from spherical_optax.groups import Joint, RadialGroup

Progress = Callable[[str], Any]

POINTS = 4
NOISE = 0.05  # relative change of p under jitter; in most networks, only rounding has more
OUTLIER = 1e4  # size of an output entry relative to the median; masked logits have more
SMALL = 1e-4  # size of p relative to the largest in its module; only rounding has less


class Thresholds(NamedTuple):
    """The limits of the deviation."""

    invariant: float  # up to this, groups are invariant
    varying: float  # from this on, they are not; in between, it is unclear


class Point(NamedTuple):
    """A point at which the gradient was taken, with the outputs and products there."""

    draw: Callable[[], list[np.ndarray]]  # the floating leaves
    outputs: list[np.ndarray]
    products: dict[int, np.ndarray]  # p = g x of the floating leaves, by number


class Experiment:
    """Products p at several points, and their sums, each computed once.

    Attributes:
      leaves: All leaves of the parameters.
      floating: The numbers of the leaves that are floating arrays.
      points: The points at which gradients were taken.
      noise: How much p of each leaf changes when the parameters change in their last digit.
      unrest: How much the outputs change then.
      thresholds: The limits of the deviation.
      is_narrow: Whether the program computes in half precision. It does only if it cannot be
        computed in float32, for example because it reads the bits of narrow numbers.
      sums: Which leaves the program adds to which, as pairs of sets of floating leaves.
      used: Whether the outputs depend on the floating leaves at all.
      kernels: The numbers of the leaves that are contracted with data or used as lookup tables.
      varied: Descriptions of the constant arguments that were varied.
      forward_passes: The cost so far. A gradient counts as three forward passes.
    """

    def __init__(self, who: str, fn: Callable[..., Any], params: Any, args: Sequence[Any],
                 progress: Progress) -> None:  # fmt: skip
        self.leaves = _trees.visible_leaves(params)
        values, treedef = _trees.flatten(params)
        self.floating = [i for i, value in enumerate(values) if is_floating(value)]
        if not self.floating:
            dtypes = [
                (leaf.path, str(getattr(leaf.value, "dtype", leaf.value))) for leaf in self.leaves
            ]
            raise ValueError(f"{who}: expected parameters with floating leaves, found {dtypes}.")
        values = [_concrete(value) for value in values]
        floats = [values[i] for i in self.floating]

        def outputs_of(args: Any, point: list[Any]) -> list[jax.Array]:
            arrays = dict(enumerate(values)) | dict(zip(self.floating, point, strict=True))
            # The identity map copies NNX variables among the arguments, so fn may mutate them.
            fresh = jax.tree.map(lambda a: a, args)
            outputs = _complex.split(fn(treedef.unflatten(arrays.values()), *fresh))
            return list(filter(is_floating, jax.tree.leaves(outputs)))

        shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in floats]
        progress("tracing the forward pass")
        args, self.varied = varied(tuple(args), outputs_of, shapes)
        for name in self.varied:
            progress(f"varied because it is constant and multiplied by a kernel: {name}")
        forward = functools.partial(outputs_of, args)
        program = _program.trace(who, forward, shapes, len(args))
        self.sums = _flow.sums(program)
        self.used = _flow.is_used(program)
        self.kernels = {self.floating[n] for n in _flow.kernels(program)}
        try:
            program = _widened.widened(program)
            floats = [_widened.wide(value) for value in floats]
        except Exception as error:  # an unknown operation
            warnings.warn(
                f"{who}: expected a program that can be computed in float32, found half precision "
                f"that cannot ({error}). Groups are judged in half precision. Pass a float32 fn.",
                UserWarning,
                stacklevel=4,
            )
        self._evaluate = _evaluation(_program.without_epsilon(program))
        narrowest = jnp.finfo(_widened.narrowest(program))
        self.is_narrow = bool(narrowest.bits < 32)
        coarsest = float(narrowest.eps)
        self.thresholds = Thresholds(max(2e-3, 4 * coarsest), max(1e-2, 12 * coarsest))
        self.forward_passes = 0
        self.points: list[Point] = []
        self._sums: dict[Any, np.ndarray] = {}
        self._counted = [np.ones(out.shape, bool) for out in program.out_avals]
        self._look_at_first(floats, progress)
        if len(self.points) < 2:
            raise ValueError(
                f"{who}: expected finite outputs of fn, found NaN or infinity in them or in their "
                "gradients, at random parameters."
            )
        progress("the gradient again, to measure rounding")
        first = self.points[0]
        outputs, again = self.at(jittered(first.draw()), 0)
        self.noise = {i: _relative(p, again[i]) for i, p in first.products.items()}
        self.unrest = max(map(_relative, first.outputs, outputs), default=0.0)

    def _look_at_first(self, floats: list[Any], progress: Progress) -> None:
        """Adds two points: one near the values of the leaves, if known, and a random one."""
        known = all(map(is_known, floats))
        first = self._first_point(floats, known)
        for near in (known, False):
            number = len(self.points)
            progress(f"gradient at point {number + 1} of {POINTS}")
            if number == 0 and first is not None:
                self.points.append(first)
                continue
            self._look(
                functools.partial(drawn, floats, number, near, shrink)
                for shrink in (1.0, 0.5, 0.25, 0.0625)
            )

    def _first_point(self, floats: list[Any], known: bool) -> Point | None:
        """The first point, or `None` if it must be taken again without outliers or infinities.

        If output entries are not finite or drown the others, the outputs are computed at a second
        point. From then on, entries are left out that are not finite, or equal at both points. For
        example, logits that are masked with -1e9 or -inf say nothing about the weights.
        """
        draw = functools.partial(drawn, floats, 0, known, 1.0)
        outputs, products = self.at(draw())
        if any(map(_has_outliers, outputs)):
            others, _ = self.at(drawn(floats, 1, False, 1.0))
            for counted, a, b in zip(self._counted, outputs, others, strict=True):
                counted &= np.isfinite(a) & np.isfinite(b) & (a != b)
            return None
        return Point(draw, outputs, products) if _all_finite(products.values()) else None

    def look_at_scales(self, numbers: set[int], progress: Progress) -> None:
        """Adds two points: one where these leaves are larger, and one where they are smaller."""

        def scaled(number: int, factor: float) -> list[np.ndarray]:
            point = zip(self.floating, self.points[number].draw(), strict=True)
            return [
                (x * np.float32(factor)).astype(x.dtype, copy=False) if i in numbers else x
                for i, x in point
            ]

        for number, factors in enumerate(((64.0, 8.0, 2.0), (1 / 8,))):
            progress(f"gradient at point {len(self.points) + 1} of {POINTS}")
            self._look(functools.partial(scaled, number, factor) for factor in factors)

    def _look(self, draws: Iterable[Callable[[], list[np.ndarray]]]) -> None:
        """Adds the first of the points at which nothing overflows, if there is one."""
        for draw in draws:
            outputs, products = self.at(draw(), len(self.points))
            if _all_finite((*outputs, *products.values())):
                self.points.append(Point(draw, outputs, products))
                return

    def at(self, point: list[np.ndarray], number: int = 0) -> tuple[list[np.ndarray], Any]:
        """The outputs and products at a point, for a random function of the outputs."""
        self.forward_passes += 3
        outputs, products = self._evaluate(point, jax.random.key(number), self._counted)
        return (
            [np.asarray(output, np.float64) for output in outputs],
            {i: np.asarray(p) for i, p in zip(self.floating, products, strict=True)},
        )

    def shape(self, i: int) -> tuple[int, ...]:
        """A leaf's shape."""
        return tuple(self.leaves[i].value.shape)

    def has_effect(self, i: int, others: Iterable[int]) -> bool:
        """Whether the outputs depend on a leaf. Products of rounding error are small and noisy."""
        if not any(point.products[i].any() for point in self.points):
            return False
        largest = max((self.squares(0, j) for j in others), default=0.0)
        return self.noise[i] < NOISE or self.squares(0, i) > SMALL**2 * largest

    def sums_over(self, number: int, i: int, axes: tuple[int, ...]) -> np.ndarray:
        """The sums of a leaf's p at a point over all axes except `axes`."""
        key = number, i, axes
        if key not in self._sums:
            p = self.points[number].products[i]
            others = tuple(axis for axis in range(p.ndim) if axis not in axes)
            self._sums[key] = p.sum(axis=others, dtype=np.float64)
        return self._sums[key]

    def squares(self, number: int, i: int) -> float:
        """The sum of a leaf's p^2 at a point."""
        key = number, i, "squares"
        if key not in self._sums:
            p = self.points[number].products[i]
            self._sums[key] = np.vdot(p, p)
        return float(self._sums[key])

    def deviation(self, joint: Joint) -> float:
        """The largest deviation of a joint over the points."""
        return max(self._deviation(number, joint) for number in range(len(self.points)))

    def _deviation(self, number: int, joint: Joint) -> float:
        total: Any = 0.0
        for i, group in joint.items():
            axes = group.axes(self.points[number].products[i].ndim)
            sums = self.sums_over(number, i, axes)
            if group.num_blocks is not None:
                sums = sums.reshape(*sums.shape[:-1], group.num_blocks, -1).sum(-1)
            total = total + sums.ravel()
        square = sum(self.squares(number, i) for i in joint)
        return float(np.linalg.norm(total)) / math.sqrt(square) if square > 0 else 0.0

    def crossed(self, i: int, axes: tuple[int, ...]) -> str | None:
        """Invariant groups finer than `axes`: these crossed with blocks of an earlier axis."""
        shape = self.shape(i)
        for axis in (a for a in range(max(axes, default=0)) if a not in axes):
            kept = tuple(sorted((*axes, axis)))
            place = kept.index(axis)
            for blocks in range(2, shape[axis] // 2 + 1):
                if shape[axis] % blocks:
                    continue
                worst = 0.0
                for number in range(len(self.points)):
                    sums, square = self.sums_over(number, i, kept), self.squares(number, i)
                    split = (*sums.shape[:place], blocks, -1, *sums.shape[place + 1 :])
                    total = sums.reshape(split).sum(place + 1)
                    worst = max(worst, float(np.linalg.norm(total)) / math.sqrt(square or 1))
                if worst <= self.thresholds.invariant:
                    return f"{blocks} blocks of axis {axis}, crossed with {axes}"
        return None

    def change(self, number: int, joints: Iterable[Joint], leaves: Iterable[int] = ()) -> float:
        """How much the outputs at a point change when groups are scaled by random factors.

        The groups of `joints` are scaled by powers of two, which is exact. In `leaves`, each entry
        is scaled by a factor of its own.
        """
        rng = np.random.default_rng(number)
        point = dict(zip(self.floating, self.points[number].draw(), strict=True))
        for joint in joints:
            first = next(iter(joint))
            count = math.prod(joint[first].shape(point[first].shape))
            factors = np.resize(2.0 ** rng.permutation([-2, -1, 1, 2]), count)
            for i, group in joint.items():
                spread = _spread(factors, point[i].shape, group)
                point[i] = (point[i] * spread).astype(point[i].dtype)
        for i in leaves:
            factors = rng.uniform(0.5, 2, point[i].shape)
            point[i] = (point[i] * factors).astype(point[i].dtype)
        outputs, _ = self.at([point[i] for i in self.floating], number)
        pairs = zip(self.points[number].outputs, outputs, strict=True)
        return max((_relative(a, b) for a, b in pairs), default=0.0)


def _spread(values: np.ndarray, shape: tuple[int, ...], group: RadialGroup) -> np.ndarray:
    """Values per group, in a shape that broadcasts against the array."""
    axes = group.axes(len(shape))
    values = values.reshape(group.shape(shape))
    if group.num_blocks is not None:
        values = np.repeat(values, shape[axes[-1]] // group.num_blocks, axis=-1)
    return np.expand_dims(values, tuple(axis for axis in range(len(shape)) if axis not in axes))


def _evaluation(program: core.ClosedJaxpr) -> Callable[..., Any]:
    forward = core.jaxpr_as_fun(program)

    @jax.jit
    def evaluate(
        point: list[jax.Array], key: jax.Array, counted: list[jax.Array]
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        def random_function(point: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
            pairs = zip(counted, forward(*point), strict=True)
            outputs = [jnp.where(mask, output, 0) for mask, output in pairs]
            total = jnp.zeros(())
            for number, output in enumerate(outputs):
                output = wide(output)
                size = jax.lax.stop_gradient(jnp.max(jnp.abs(output), initial=0))
                key_of = jax.random.fold_in(key, number)
                weights = jax.random.normal(key_of, output.shape, output.dtype)
                total = total + jnp.sum(weights * output) / jnp.where(size == 0, 1, size)
            return total, outputs

        (_, outputs), grads = jax.value_and_grad(random_function, has_aux=True)(point)
        products = [wide(g) * wide(x) for g, x in zip(grads, point, strict=True)]
        largest = jnp.max(jnp.stack([jnp.max(jnp.abs(p), initial=0) for p in products]))
        return outputs, [p / jnp.where(largest == 0, 1, largest) for p in products]

    return evaluate


def _all_finite(arrays: Iterable[np.ndarray]) -> bool:
    return all(np.isfinite(array).all() for array in arrays)


def _has_outliers(output: np.ndarray) -> bool:
    """Whether some entries are not finite, or drown the others."""
    size = np.abs(output)
    return not np.isfinite(size).all() or bool(size.size and size.max() > OUTLIER * np.median(size))


def _concrete(value: Any) -> Any:
    """Zeros in place of an abstract array of integers, which needs fixed values."""
    if isinstance(value, jax.ShapeDtypeStruct) and not is_floating(value):
        return jnp.zeros(value.shape, value.dtype)
    return value


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| / |a|, or 0 if both are zero."""
    size, change = float(np.linalg.norm(a)), float(np.linalg.norm(a - b))
    return change / size if size else float(change > 0)
