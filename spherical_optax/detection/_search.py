"""The search: for each leaf the finest invariant partition, alone or with others."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from spherical_optax.detection._experiment import Experiment, Progress
from spherical_optax.detection._points import is_vector
from spherical_optax.groups import Joint, RadialGroup

NEAR = 13  # leaves that may join the group of another leaf; all their subsets are tried
MODULES = 3  # modules that a joint group may span

NO_EFFECT = "no effect on the outputs"  # a verdict

Module: TypeAlias = tuple[str, ...]
"""The path of a module."""


class Result(NamedTuple):
    """What the search found.

    Attributes:
      joints: The finest invariant joints.
      tried: For each leaf, the partitions tried and their deviations.
      verdicts: For each leaf, the conclusion.
      finer: For leaves whose finest groups `RadialGroup` cannot express, a description of these.
    """

    joints: list[Joint]
    tried: dict[int, list[tuple[str, float]]]
    verdicts: dict[int, str]
    finer: dict[int, str]


def search(experiment: Experiment, vectors: bool, progress: Progress) -> Result:
    """Finds the finest invariant partition of each leaf, alone or jointly with others."""
    modules = {i: _module_of(experiment.leaves[i].keys) for i in experiment.floating}
    shapes = {i: experiment.shape(i) for i in experiment.floating}
    result = Result([], {i: [] for i in experiment.floating}, {}, {})

    def has_effect(i: int) -> bool:
        near = [j for j in experiment.floating if _near(modules[i], modules[j])]
        return experiment.has_effect(i, near)

    open_leaves = list(filter(has_effect, experiment.floating))
    result.verdicts.update({i: NO_EFFECT for i in experiment.floating if i not in open_leaves})
    kernels = _kernels(experiment, open_leaves, modules, shapes)
    leaders = sorted(
        open_leaves if vectors else kernels,
        key=lambda i: (i not in kernels, -math.prod(shapes[i]), i),
    )

    def accept(numbers: tuple[int, ...], best: Joint) -> None:
        if len(numbers) > 1:
            label = _common([modules[i] for i in numbers])
            taken = {group.joint for joint in result.joints for group in joint.values()}
            while label in taken:
                label += "'"
            best = {i: dataclasses.replace(group, joint=label) for i, group in best.items()}
        result.joints.append(best)
        verdict = "jointly invariant" if len(numbers) > 1 else "invariant"
        result.verdicts.update(dict.fromkeys(numbers, verdict))

    for n, i in enumerate(leaders):
        progress(f"leaf {n + 1} of {len(leaders)}: {experiment.leaves[i].path}")
        best = _finest(experiment, (i,), result.tried[i], "")
        if best is not None:
            accept((i,), best)
            finer = experiment.crossed(i, best[i].axes(len(shapes[i])))
            result.finer.update({i: finer} if finer and best[i].num_blocks is None else {})
        elif result.tried[i][0][1] < experiment.thresholds.varying:
            result.verdicts[i] = "unclear"

    decided = ("invariant", "jointly invariant")
    left = [i for i in leaders if result.verdicts.get(i) not in decided]
    candidates: dict[frozenset[int], tuple[Any, tuple[int, ...], Joint]] = {}
    for i in left:
        around = sorted(
            (modules[j] != modules[i], abs(j - i), j)
            for j in open_leaves
            if j != i and result.verdicts.get(j) not in decided and _near(modules[i], modules[j])
        )
        others_of = _cancelling(experiment, i, [j for *_, j in around[:NEAR]], kernels, modules)
        for others in others_of:
            members = frozenset((i, *others))
            if members in candidates:  # already found from another of its leaves
                continue
            names = " and ".join(_name(experiment, j, modules[i]) for j in others)
            best = _finest(experiment, (i, *others), result.tried[i], f" with {names}")
            if best is not None:
                count = math.prod(best[i].shape(shapes[i]))
                order = len({modules[j] for j in members}), len(members), -count, left.index(i)
                candidates[members] = order, (i, *others), best
    # The best set of a leaf has the fewest modules, then the fewest leaves, then the finest groups.
    for _, numbers, best in sorted(candidates.values(), key=lambda candidate: candidate[0]):
        if not any(result.verdicts.get(j) in decided for j in numbers):
            accept(numbers, best)
    for i in open_leaves:
        verdict = "not invariant" if i in leaders else "one-dimensional, no kernel"
        result.verdicts.setdefault(i, verdict)
    return result


def _kernels(
    experiment: Experiment,
    open_leaves: Sequence[int],
    modules: dict[int, Module],
    shapes: dict[int, tuple[int, ...]],
) -> set[int]:
    """The leaves that are kernels, not biases or scales."""

    def is_stacked(i: int) -> bool:
        """Whether all leaves around this one, with a kernel among them, share its first axis."""
        for depth in range(len(modules[i]) + 1):
            around = [j for j in modules if modules[j][:depth] == modules[i][:depth]]
            sizes = {shapes[j][:1] if len(shapes[j]) > 1 else () for j in around}
            if len(sizes) == 1 and experiment.kernels & set(around):
                return True
        return False

    def is_kernel(i: int) -> bool:
        if i not in experiment.kernels and is_vector(shapes[i][1:]) and is_stacked(i):
            return False
        others = (shapes[j] for j in open_leaves if j != i and modules[j] == modules[i])
        return not is_vector(shapes[i], others)

    return set(filter(is_kernel, open_leaves))


def _near(a: Module, b: Module) -> bool:
    """Whether two modules are equal, siblings, or parent and child."""
    above_a, above_b = (module[:-1] if module else None for module in (a, b))
    return a in (b, above_b) or above_a in (b, above_b)


def _module_of(keys: tuple[str, ...]) -> Module:
    """The path of a leaf's module. Keys may contain slashes, as in Keras's paths."""
    return tuple("/".join(keys).split("/")[:-1])


def _common(modules: Sequence[Module]) -> str:
    """The common part of the modules' paths, as a label."""
    names = zip(*modules, strict=False)
    common = itertools.takewhile(lambda name: len(set(name)) == 1, names)
    return "/".join(name for name, *_ in common) or "joint"


def _name(experiment: Experiment, j: int, module: Module) -> str:
    keys = "/".join(experiment.leaves[j].keys).split("/")
    return keys[-1] if tuple(keys[:-1]) == module else "/".join(keys[-2:])


# --- jointly ----------------------------------------------------------------------------


def _cancelling(
    experiment: Experiment, i: int, near: list[int], kernels: set[int], modules: dict[int, Module]
) -> Iterator[tuple[int, ...]]:
    """The smallest sets of leaves whose p sum to zero together with those of leaf i.

    Kernels belong together only if their outputs are added. The layers of a whole residual stream
    may also be scaled together, but this says nothing about a single layer. A leaf with fewer axes
    than another leaf of its module is a bias.
    """
    numbers = [i, *near]
    points = range(len(experiment.points))
    sums = np.array([[experiment.sums_over(k, j, ()) for j in numbers] for k in points])
    squares = np.array([[experiment.squares(k, j) for j in numbers] for k in points])
    sets = np.array([(1.0, *others) for others in itertools.product((0.0, 1.0), repeat=len(near))])
    size = np.sqrt(sets @ squares.T)
    deviations = np.abs(sets @ sums.T) / np.where(size == 0, 1, size)
    passing = sets[deviations.max(1) <= experiment.thresholds.invariant].astype(bool)
    smaller: list[np.ndarray] = []
    for row in sorted(passing, key=lambda row: (row.sum(), *(~row))):
        if any((row | other == row).all() for other in smaller) or row.sum() < 2:
            continue
        smaller.append(row)
        members = [j for j, chosen in zip(numbers, row, strict=True) if chosen]
        pairs = [
            (a, b)
            for a, b in itertools.combinations([j for j in members if j in kernels], 2)
            if modules[a] != modules[b] or len(experiment.shape(a)) == len(experiment.shape(b))
        ]
        few = len({modules[j] for j in members}) <= MODULES
        if few and all(_added(experiment, *pair) for pair in pairs):
            yield tuple(members[1:])


def _added(experiment: Experiment, i: int, j: int) -> bool:
    """Whether two values are added that each depend on one of the two leaves, not on the other."""
    a, b = (1 << experiment.floating.index(leaf) for leaf in (i, j))
    sides = ({side & (a | b) for side in pair} for pair in experiment.sums)
    return any(each == {a, b} for each in sides)


# --- the finest partition ---------------------------------------------------------------


def _finest(
    experiment: Experiment, numbers: tuple[int, ...], tried: list[tuple[str, float]], suffix: str
) -> Joint | None:
    """The finest invariant partition, searched from coarse to fine; `None` if none is invariant.

    The index axes of the first leaf are matched with axes of the same sizes in the others.
    """
    shapes = {i: experiment.shape(i) for i in numbers}
    shape = shapes[numbers[0]]

    def invariant(name: str, joint: Joint) -> bool:
        deviation = experiment.deviation(joint)
        tried.append((name + suffix, deviation))
        return deviation <= experiment.thresholds.invariant

    whole: Joint = {i: RadialGroup(index_axes=()) for i in shapes}
    if not invariant("whole", whole):
        return None
    passed = {1: whole}  # by number of groups

    def passes(name: str, axes: tuple[int, ...], num_blocks: int | None = None) -> bool:
        count = math.prod(shape[axis] for axis in axes[:-1]) * (num_blocks or shape[axes[-1]])
        for joint in _matched(axes, shapes):
            split = {i: dataclasses.replace(g, num_blocks=num_blocks) for i, g in joint.items()}
            if invariant(name, split):
                passed[count] = split
                return True
        return False

    single = [a for a, size in enumerate(shape) if size > 1 and passes(f"axis {a}", (a,))]
    for n in range(2, len(single) + 1):
        for axes in itertools.combinations(single, n):
            passes(f"axes {axes}", axes)
    # Blocks of an axis after those that already index the groups.
    axes = passed[max(passed)][numbers[0]].axes(len(shape))
    for axis in range(max(axes, default=-1) + 1, len(shape)):
        for blocks in range(2, shape[axis] // 2 + 1):
            if shape[axis] % blocks == 0:
                passes(f"{blocks} blocks of axis {axis}", (*axes, axis), blocks)
    return passed[max(passed)]


def _matched(axes: tuple[int, ...], shapes: dict[int, tuple[int, ...]]) -> Iterator[Joint]:
    """The given axes of the first leaf, with every choice of matching axes in the others."""
    first, *others = shapes.values()
    sizes = [first[axis] for axis in axes]
    choices = [
        [
            chosen
            for chosen in itertools.combinations(range(len(other)), len(axes))
            if [other[axis] for axis in chosen] == sizes
        ]
        for other in others
    ]
    for chosen in itertools.product([axes], *choices):
        pairs = zip(shapes.items(), chosen, strict=True)
        yield {i: _group(own_axes, shape) for (i, shape), own_axes in pairs}


def _group(axes: tuple[int, ...], shape: tuple[int, ...]) -> RadialGroup:
    """A group with these index axes, the last axis written as -1."""
    return RadialGroup(tuple(-1 if axis == len(shape) - 1 else axis for axis in axes))
