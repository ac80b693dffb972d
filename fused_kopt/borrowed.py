"""Fused steps on variables, gradients and slots that somebody else owns: what the Keras 3 and torch.optim classes call."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fused_kopt import clipping, execute, gradients, layout, tensors, updates, verification
from fused_kopt.buffers import Bucket
from fused_kopt.clipping import Clips
from fused_kopt.execute import Executor, Rule
from fused_kopt.layout import Segment
from fused_kopt.recording import Sums
from fused_kopt.repeat import Scalars
from fused_kopt.repeats import Repeats
from fused_kopt.slots import Slot
from fused_kopt.updates import Entry, Launch, Recipe

Pairs = Sequence[tuple[Tensor, Tensor]]
NO_CLIPS = Clips(1.0, None, None, None)


class Borrowed(NamedTuple):
    """What a step is given. It may lie elsewhere in every step."""

    variables: Sequence[Tensor]
    """Distinct leaves."""
    gradients: Sequence[Tensor]
    """Dense, of the variables' shapes and devices; float16, bfloat16, float32 or float64."""
    slots: Sequence[Sequence[Tensor]]
    """For each slot of the rule, in its order, one tensor per variable: its shape and device, the compute dtype or 16 bits."""
    names: Sequence[str] | None = None
    """What messages call the variables; by default their positions."""
    which: Any = None
    """int array: which of the step's scalars each variable takes. None: the only one, or its own."""


class Task(NamedTuple):
    """What a step does."""

    rule: Rule
    """A module-level function, or what `options.around` made of one."""
    scalars: Callable[[torch.dtype], Sequence[Any]]
    """Of a compute dtype (float32; float64 for float64 variables): NamedTuples of the rule's scalars, rounded to it."""
    clips: Clips = NO_CLIPS
    """What happens to gradients before the rule."""
    exact: bool = True
    """Whether executors owe each other equal bits."""
    sums: Sums | None = None
    """From `Recorder.start`, where the step is measured. Several tasks of a step may share it."""


def check(pairs: Pairs, names: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """`gradients.check`, and TypeError for sparse gradients: `pairs` of gradients and variables as every step here needs them."""
    checked = gradients.check(pairs, names)
    for (gradient, _), name in zip(checked, names, strict=True):
        if gradient.layout != torch.strided:
            raise TypeError(f"The gradient of {name} is sparse; dense ones are supported here. Use Embedding(sparse=False).")
    return checked


class Borrower:
    """Takes steps on tensors that are looked at anew in every step: whoever owns them may replace or move them in between.

    executor: as for every optimizer.
    """

    def __init__(self, executor: Executor = "auto") -> None:
        self.executor = executor
        self._repeats = Repeats()

    def step(
        self,
        rule: Rule,
        given: Borrowed,
        scalars: Callable[[torch.dtype], Sequence[Any]],
        clips: Clips = NO_CLIPS,
        exact: bool = True,
        sums: Sums | None = None,
    ) -> None:
        """Update variables and slots in place: one launch per device and dtypes. Arguments: see Borrowed and Task.

        Raises what `Optimizer.apply_gradients` raises for gradients and variables, and ValueError or TypeError for slots that
        do not fit; nothing has been written then.
        """
        self.prepare(Task(rule, scalars, clips, exact, sums), given)()

    def prepare(self, task: Task, given: Borrowed) -> Callable[[], None]:
        """What takes the step: to be called once, before another is prepared. Raises what `step` raises; nothing is written before."""
        slots = list(itertools.chain.from_iterable(given.slots))
        repeat = self._repeats.match(given.gradients, given.variables, self.executor, slots)
        if repeat is None or not repeat.applies(itertools.repeat(task.rule), task.clips, task.sums):
            launch = self._anew(task, given, slots)
        else:
            found = {
                id(u): _numbers(task.scalars(u.bucket.compute), given, order)
                for u, order in zip(repeat.updates, repeat.orders, strict=True)
            }
            if any((update.rows is None) != (found[id(update)][1] is None) for update in repeat.updates):
                for update in repeat.updates:
                    update.rows = found[id(update)][1]
                repeat.bind()
            repeat.clip(task.clips)
            launch = functools.partial(repeat.run, lambda update: found[id(update)], task.sums)

        def take() -> None:
            launch()
            torch.autograd.graph.increment_version(given.variables)

        return take

    def _anew(self, task: Task, given: Borrowed, slots: list[Tensor]) -> Callable[[], None]:
        names = given.names or [gradients.name(variable, i) for i, variable in enumerate(given.variables)]
        pairs = check(list(zip(given.gradients, given.variables, strict=True)), names)
        _check_slots(pairs, given.slots, names)
        executors = {}
        for device in dict.fromkeys(variable.device for _, variable in pairs):
            mine = [variable.numel() for _, variable in pairs if variable.device == device]
            executors[device] = execute.choose(self.executor, device, sum(mine), len(mine))
        rows = clipping.rows(pairs, task.clips, executors, self.executor)
        entries = [Entry(g, v, row) for (g, v), row in zip(pairs, rows, strict=True)]
        with torch.no_grad():
            launches = [_launch(bucket, members, entries, given, task) for bucket, members in _buckets(pairs, given.slots)]
        for each in launches:
            each.update.sums = None if task.sums is None else task.sums.on(each.update.bucket.device)
        chosen = [verification.proven(launch.update, executors[launch.update.bucket.device], self.executor) for launch in launches]

        def launch() -> None:
            updates.run(launches, chosen, task.sums)
            self._repeats.learn(pairs, launches, chosen, self.executor, slots)
            for each in launches:
                each.update.bucket.borrow({})  # repeats need addresses only: the owner of the slots may free them

        return launch


def _buckets(pairs: Pairs, slots: Sequence[Sequence[Tensor]]) -> list[tuple[Bucket, list[int]]]:
    """The buckets of variables and borrowed slots, and which pairs are theirs."""
    found: dict[Any, list[int]] = {}
    for position, (_, variable) in enumerate(pairs):
        stored = slots[0][position].dtype if slots else layout.compute_dtype(variable.dtype)
        found.setdefault((variable.device, variable.dtype, stored), []).append(position)
    return [(Bucket(*key), members) for key, members in found.items()]


def _launch(bucket: Bucket, members: Sequence[int], entries: Sequence[Entry], given: Borrowed, task: Task) -> Launch:
    """One bucket's launch. A slot laid out otherwise than its variable is updated as a copy and written back."""
    variables = [entries[p].variable for p in members]
    bucket.adopt(variables, layout.plan(variables), {})
    slots = {f"slot {i}": [column[p].detach() for p in members] for i, column in enumerate(given.slots)}
    own = [(name, i) for name, column in slots.items() for i, slot in enumerate(column) if _elsewhere(slot, bucket.segments[i])]
    finish = []
    for name, i in own:
        copy = layout.clone(slots[name][i], bucket.segments[i].stride)
        finish.append(updates.copier(slots[name][i], copy))
        slots[name][i] = copy
    bucket.borrow(slots)
    common, rows = _numbers(task.scalars(bucket.compute), given, members)
    recipe = Recipe(tuple(map(Slot, slots)), task.rule, lambda _: task.rule, "touched", common, task.exact, {})
    written = tensors.Written([*given.variables, *itertools.chain.from_iterable(given.slots)])
    launch = updates.dense_launch(bucket, [entries[p] for p in members], recipe, task.rule, written)
    launch.update.rows = rows
    launch.finish += finish
    return launch


def _elsewhere(slot: Tensor, segment: Segment) -> bool:
    return slot.is_neg() or not layout.same_layout(segment.shape, segment.stride, slot.stride())


def _numbers(distinct: Sequence[Any], given: Borrowed, members: Any) -> Scalars:
    """A bucket's scalars; where they differ between its variables, the first ones and a row for each."""
    common = distinct[0]._make(map(float, distinct[0]))
    if len(distinct) == 1:
        return common, None
    table = np.array(distinct)
    return common, table[members if given.which is None else given.which[members]]


def _check_slots(pairs: Pairs, slots: Sequence[Sequence[Tensor]], names: Sequence[str]) -> None:
    """Raises TypeError or ValueError for gradients and slots that one launch cannot serve."""
    for column in slots:
        if len(column) != len(pairs):
            raise ValueError(f"There are {len(column)} slots of a kind for {len(pairs)} variables; each variable needs one.")
        for (_, variable), slot, first, name in zip(pairs, column, slots[0], names, strict=True):
            tensors.check_storage(slot, f"a slot of {name}")
            wanted = (layout.compute_dtype(variable.dtype), torch.float16, torch.bfloat16)
            if slot.shape != variable.shape or slot.device != variable.device:
                raise ValueError(f"{name} ({tensors.describe(variable)}) has a slot of {tensors.describe(slot)}: both must be alike.")
            if slot.dtype not in wanted or slot.dtype != first.dtype:
                raise TypeError(
                    f"{name} ({variable.dtype}) has a slot of {slot.dtype}, others of {first.dtype}. Use one of {wanted} for all."
                )
    everything = [variable for _, variable in pairs] + [slot for column in slots for slot in column]
    overlap = tensors.first_overlap(everything)
    if overlap or len({id(tensor) for tensor in everything}) != len(everything):
        one, other = (names[i % len(pairs)] for i in overlap or (0, 0))
        raise ValueError(f"Variables or slots of {one} and {other} share memory: one would be updated through the other.")
