"""The lift: turns steps, written for one group, into transformations of trees."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import optax

from spherical_optax._engine.layout import Layout, check_type, per_entry
from spherical_optax._engine.passes import two_passes
from spherical_optax._engine.state import pick
from spherical_optax._engine.step import NOT_PER_LEAF, Step
from spherical_optax._engine.vector import Vector
from spherical_optax.groups import Joint


class Lifted(optax.GradientTransformationExtraArgs):
    """A transformation made of one step, which can be lifted together with its neighbors."""

    step: Step


def lift(step: Step) -> Lifted:
    """Turns a step into a transformation."""
    update_all = lift_together([step])

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        updates, [state] = update_all(updates, [state], params, **extra_args)
        return updates, state

    lifted = Lifted(step.init, update)
    lifted.step = step
    return lifted


def lift_together(steps: Sequence[Step], made_before: bool = False, who: str | None = None) -> Any:
    """The update of several steps with equal groups, one after another, in two passes over arrays.

    The returned function takes updates, a list of states and params. It returns updates and a list
    of states. With `made_before`, another transformation computes the updates in the same program,
    and no pass should compute them again. Error messages name `who`, or the step if it is `None`.
    """
    groups = steps[0].groups
    needs_params = any(step.needs_params for step in steps)
    shapes: list[Any]
    treedef: Any
    shapes, treedef = jax.tree.flatten([step.state_shapes for step in steps])
    places = [place for place, shape in enumerate(shapes) if shape is not NOT_PER_LEAF]

    def update(
        updates: Any, states: list[Any], params: Any, **extra_args: Any
    ) -> tuple[Any, list[Any]]:
        states = list(states)
        for step, state in zip(steps, states, strict=True):
            if step.state_shapes is not NOT_PER_LEAF:
                check_type(who or step.who, state, type(step.state_shapes))
        fields = treedef.flatten_up_to(states)
        trees = [(fields[place], shapes[place]) for place in places]
        like = None
        if params is None and not needs_params:  # any tree with all leaves will do
            like = next((tree for tree, shape in trees if shape is per_entry), updates)
        layout = Layout.read(
            who or steps[0].who,
            groups,
            params,
            updates,
            *trees,
            like=like,
            skips_single_entries=steps[0].skips_single_entries,
        )._replace(extra_args=extra_args)
        for place, leaves in zip(places, layout.fields, strict=True):
            fields[place] = leaves
        functions = []
        for n, (step, state) in enumerate(zip(steps, treedef.unflatten(fields), strict=True)):
            states[n], on_group = step.prepare(layout, state)
            functions.append(on_group)
        fields = treedef.flatten_up_to(states)

        def on_groups(update: Vector, point: Vector, states: list[Any]) -> tuple[Vector, Any]:
            states = list(states)
            for n, on_group in enumerate(functions):
                update, states[n] = on_group(update, point, states[n])
            return update, states

        shared = [None if place in places else value for place, value in enumerate(fields)]
        per_kind = _of_each_kind(on_groups, shapes, shared, treedef, made_before)
        for joint in layout.present():
            lists = [layout.updates, layout.params, *(fields[place] for place in places)]
            leaves = [pick(joint, each) for each in lists]
            new, *kept = per_kind(joint, *leaves)
            for target, found in zip([layout.updates, *lists[2:]], [new, *kept], strict=True):
                for i, leaf in found.items():
                    target[i] = leaf
        updates, *kept = layout.trees(layout.updates, *(fields[place] for place in places))
        for place, tree in zip(places, kept, strict=True):
            fields[place] = tree
        return updates, treedef.unflatten(fields)

    return update


def _of_each_kind(on_groups: Any, shapes: Any, shared: Any, treedef: Any, made_before: bool) -> Any:
    """The update of a joint. Inside a traced program, joints that are alike are traced once."""
    functions: dict[Any, Any] = {}

    def step(joint: Joint, *leaves: dict[int, jax.Array]) -> list[dict[int, jax.Array]]:
        by_place = [dict(enumerate(each.values())) for each in leaves]
        groups = tuple(joint.values())
        alike = tuple(dataclasses.replace(group, joint=None) for group in groups)
        if alike not in functions:
            own = functools.partial(
                two_passes,
                on_groups,
                dict(enumerate(groups)),
                shapes,
                shared,
                treedef,
                made_before,
            )
            functions[alike] = own
            if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(leaves)):
                functions[alike] = jax.jit(own)
        found = functions[alike](*by_place)
        return [dict(zip(joint, each.values(), strict=True)) for each in found]

    return step
