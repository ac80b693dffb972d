"""Fused steps on variables, gradients and slots that somebody else owns: what the Keras 3 and torch.optim classes call."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fused_kopt import clipping, execute, gradients, layout, precision, tensors, updates, verification
from fused_kopt.buffers import Bucket
from fused_kopt.clipping import Clips
from fused_kopt.execute import Executor, Rule
from fused_kopt.precision import Precision
from fused_kopt.recording import Sums
from fused_kopt.repeat import Scalars
from fused_kopt.repeats import Repeats
from fused_kopt.slots import Slot
from fused_kopt.updates import Entry, Launch, Recipe

Pairs = Sequence[tuple[Tensor, Tensor]]
NO_CLIPS = Clips(1.0, None, None, None)
ORDER = "is laid out otherwise than its variable, by whose order in memory elements share scales"


class Borrowed(NamedTuple):
    """What a step is given. It may lie elsewhere in every step."""

    variables: Sequence[Tensor]
    """Distinct leaves."""
    gradients: Sequence[Tensor]
    """Dense, of the variables' shapes and devices; float16, bfloat16, float32 or float64."""
    slots: Sequence[Sequence[Tensor]]
    """For each slot of the rule, in its order, one tensor per variable: its shape and device, the compute dtype or 16 bits.
    Under a precision policy for each of `Task.planes` that is stored: of its dtype; 1-D where elements share a value."""
    names: Sequence[str] | None = None
    """What messages call the variables; by default their positions."""
    which: Any = None
    """int array: which of the step's scalars each variable takes. None: the only one, or its own."""
    positions: Sequence[int] | None = None
    """Where each variable's elements begin among those that random bits are made for; multiples of 64 where elements share scales.
    None: one variable after another, in buckets. A Borrower that gets the same tensors again expects the same ones."""


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
    policy: Precision = precision.DEFAULT
    """How variables and slots are stored. Where it is random, the scalars are `policy.extended`."""
    slots: tuple[Slot, ...] = ()
    """The rule's, where there is such a policy."""

    def planes(self, dtype: torch.dtype, columns: int) -> tuple[Slot, ...]:
        """What a launch on variables of a dtype reads and writes besides them. columns: how many slots are given."""
        if self.policy == precision.DEFAULT:
            return tuple(Slot(f"slot {i}") for i in range(columns))
        return self.policy.planes(dtype, (self.slots,))

    def around(self, dtype: torch.dtype) -> Rule:
        """The rule on what is stored."""
        return self.policy.rule(dtype, self.slots, self.rule)


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
        if repeat is None or not repeat.applies((task.around(u.bucket.dtype) for u in repeat.updates), task.clips, task.sums):
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
        _check_slots(pairs, given.slots, names, task)
        executors = {}
        for device in dict.fromkeys(variable.device for _, variable in pairs):
            mine = [variable.numel() for _, variable in pairs if variable.device == device]
            executors[device] = execute.choose(self.executor, device, sum(mine), len(mine))
        rows = clipping.rows(pairs, task.clips, executors, self.executor)
        entries = [Entry(g, v, row) for (g, v), row in zip(pairs, rows, strict=True)]
        with torch.no_grad():
            launches = [_launch(bucket, members, entries, given, task) for bucket, members in _buckets(pairs, given.slots, task.policy)]
        for each in launches:
            each.update.sums = None if task.sums is None else task.sums.on(each.update.bucket.device)
        chosen = [verification.proven(launch.update, executors[launch.update.bucket.device], self.executor) for launch in launches]

        def launch() -> None:
            updates.run(launches, chosen, task.sums)
            self._repeats.learn(pairs, launches, chosen, self.executor, slots)
            for each in launches:
                each.update.bucket.borrow({})  # repeats need addresses only: the owner of the slots may free them

        return launch


def _buckets(pairs: Pairs, slots: Sequence[Sequence[Tensor]], policy: Precision) -> list[tuple[Bucket, list[int]]]:
    """The buckets of variables and borrowed slots, and which pairs are theirs."""
    found: dict[Any, list[int]] = {}
    whole = slots and policy == precision.DEFAULT
    for position, (_, variable) in enumerate(pairs):
        stored = slots[0][position].dtype if whole else layout.compute_dtype(variable.dtype)
        found.setdefault((variable.device, variable.dtype, stored), []).append(position)
    return [(Bucket(device, dtype, stored, policy), members) for (device, dtype, stored), members in found.items()]


def _launch(bucket: Bucket, members: Sequence[int], entries: Sequence[Entry], given: Borrowed, task: Task) -> Launch:
    """One bucket's launch. A slot laid out otherwise than its variable is updated as a copy and written back."""
    variables = [entries[p].variable for p in members]
    segments = layout.plan(variables)
    if given.positions is not None:
        segments = [segment._replace(number=given.positions[p]) for segment, p in zip(segments, members, strict=True)]
    bucket.adopt(variables, segments, {})
    planes, rule = task.planes(bucket.dtype, len(given.slots)), task.around(bucket.dtype)
    bucket.kinds |= {plane.name: (plane.stored or bucket.stored, plane.group) for plane in planes}
    columns = zip((plane for plane in planes if plane.group), given.slots, strict=True)
    slots = {plane.name: [column[p].detach() for p in members] for plane, column in columns}
    finish = []
    for name, column in slots.items():
        for i, (slot, segment) in enumerate(zip(column, segments, strict=True)):
            stride = segment.stride if bucket.kind(name)[1] == 1 else (1,)
            if slot.is_neg() or not layout.same_layout(slot.shape, stride, slot.stride()):
                column[i] = layout.clone(slot, stride)
                finish.append(updates.copier(slot, column[i]))
    bucket.borrow(slots)
    common, rows = _numbers(task.scalars(bucket.compute), given, members)
    recipe = Recipe(planes, rule, lambda _: rule, "touched", common, task.exact, {})
    written = tensors.Written([*given.variables, *itertools.chain.from_iterable(given.slots)])
    launch = updates.dense_launch(bucket, [entries[p] for p in members], recipe, rule, written)
    launch.update.rows = rows
    launch.finish += finish
    return launch


def _numbers(distinct: Sequence[Any], given: Borrowed, members: Any) -> Scalars:
    """A bucket's scalars; where they differ between its variables, the first ones and a row for each."""
    common = distinct[0]._make(map(float, distinct[0]))
    if len(distinct) == 1:
        return common, None
    table = np.array(distinct)
    return common, table[members if given.which is None else given.which[members]]


def _check_slots(pairs: Pairs, slots: Sequence[Sequence[Tensor]], names: Sequence[str], task: Task) -> None:
    """Raises TypeError or ValueError for gradients and slots that one launch cannot serve."""
    for column in slots:
        if len(column) != len(pairs):
            raise ValueError(f"There are {len(column)} slots of a kind for {len(pairs)} variables; each variable needs one.")
    check = _check_whole if task.policy == precision.DEFAULT else _check_stored
    for position, ((_, variable), name) in enumerate(zip(pairs, names, strict=True)):
        check(variable, [column[position] for column in slots], name, task)
    everything = [variable for _, variable in pairs] + [slot for column in slots for slot in column]
    overlap = tensors.first_overlap(everything)
    if overlap or len({id(tensor) for tensor in everything}) != len(everything):
        one, other = (names[i % len(pairs)] for i in overlap or (0, 0))
        raise ValueError(f"Variables or slots of {one} and {other} share memory: one would be updated through the other.")


def _check_whole(variable: Tensor, slots: Sequence[Tensor], name: str, task: Task) -> None:
    wanted = (layout.compute_dtype(variable.dtype), torch.float16, torch.bfloat16)
    for slot in slots:
        tensors.check_storage(slot, f"a slot of {name}")
        if slot.shape != variable.shape or slot.device != variable.device:
            raise ValueError(f"{name} ({tensors.describe(variable)}) has a slot of {tensors.describe(slot)}: both must be alike.")
        if slot.dtype not in wanted or slot.dtype != slots[0].dtype:
            raise TypeError(
                f"{name} ({variable.dtype}) has a slot of {slot.dtype}, others of {slots[0].dtype}. Use one of {wanted} for all."
            )


def _check_stored(variable: Tensor, slots: Sequence[Tensor], name: str, task: Task) -> None:
    task.policy.check(variable.dtype, task.slots, name)
    stored = [plane for plane in task.planes(variable.dtype, len(slots)) if plane.group]
    if len(stored) != len(slots):
        raise ValueError(f"{name} has {len(slots)} slots, but {task.policy} stores {[plane.name for plane in stored]}.")
    for plane, slot in zip(stored, slots, strict=True):
        dtype = plane.stored or layout.compute_dtype(variable.dtype)
        if slot.dtype != dtype or slot.shape != plane.shape(variable) or slot.device != variable.device:
            wanted = f"shape {plane.shape(variable)}, {dtype}, {variable.device}"
            raise ValueError(f"{plane.name!r} of {name} is of {tensors.describe(slot)}; under {task.policy} it must be of {wanted}.")
        tensors.check_storage(slot, f"{plane.name!r} of {name}", (dtype,))
        if dtype == torch.uint8 and not layout.same_layout(slot.shape, layout.dense_stride(variable), slot.stride()):
            raise ValueError(f"{plane.name!r} of {name} {ORDER}: strides {slot.stride()} beside {variable.stride()}.")
