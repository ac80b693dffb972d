"""The steady state: launches that an earlier step proved, run again at this step's addresses. About 0.4 us per variable."""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

from fused_kopt import clipping, execute, layout, tensors
from fused_kopt.buffers import Bucket
from fused_kopt.clipping import Clips
from fused_kopt.execute import Chosen, Executor, Rule, Update
from fused_kopt.flat import Flat
from fused_kopt.updates import Launch

# Launches kept: of the full set of variables, and of subsets that come again (alternating losses, frozen parts).
KEPT = 4

_data_ptr = Tensor.data_ptr

# A step's scalars, and per segment its own where they differ.
Scalars = tuple[Sequence[float], Sequence[Sequence[float]] | None]

# By gradient dtype: rows of the segment table, and the positions of their pairs.
Places = Mapping[torch.dtype, tuple[Any, Any]]


class Repeat:
    """What one step launched, and the test that another step is like it: the same variables in the same order, unmoved, and
    gradients of the same type, dtype, shape, strides and device, which may lie elsewhere."""

    def __init__(
        self, pairs: Sequence[tuple[Tensor, Tensor]], updates: Sequence[Update], chosen: Sequence[Chosen], executor: Executor
    ) -> None:
        gradients, self.variables = zip(*pairs, strict=True)
        both = (*gradients, *self.variables)
        layouts: Any = [list(t.shape) for t in both], [list(t.stride()) for t in both]
        self.guards = TensorGuards(*both, dynamic_dims_sizes=layouts[0], dynamic_dims_strides=layouts[1])
        self.executor, self.chosen = executor, tuple(chosen)
        self.computes = list(dict.fromkeys(update.bucket.compute for update in updates))
        self.variable_addresses = list(map(_data_ptr, self.variables))
        self.gradient_addresses: list[int] = []
        self.sizes = np.array([g.numel() * g.element_size() for g in gradients])
        self.tables = [update.bucket.tables for update in updates]
        self.written = tensors.Written([*self.variables, *(flat for update in updates for flat in update.bucket.flat.values())])
        self.places = [_places(update, pairs) for update in updates]
        clipped = any(update.factors is not None for update in updates)
        self.groups = clipping.groups(pairs) if clipped else []
        self.takes = [_take(update, places, self.groups) for update, places in zip(updates, self.places, strict=True)] if clipped else []
        self.launches: list[Callable[[Sequence[float], Tensor | None], None]] = []
        self.updates = [replace(update, variables=[], gradients=[], tables=update.segment_tables()) for update in updates]

    def meets(self, gradients: Sequence[Any], variables: Sequence[Any]) -> bool:
        """Whether the launches fit; if so, they hold the gradients' addresses."""
        if len(variables) != len(self.variables) or not all(map(is_, variables, self.variables)):
            return False
        if not self.guards.check(*gradients, *variables) or list(map(_data_ptr, variables)) != self.variable_addresses:
            return False
        addresses = list(map(_data_ptr, gradients))
        return self.stays() and (addresses == self.gradient_addresses or self._move(addresses))

    def stays(self) -> bool:
        """Whether the slots are where they were."""
        return all(update.bucket.tables is tables for update, tables in zip(self.updates, self.tables, strict=True))

    def _move(self, addresses: list[int]) -> bool:
        """Put new addresses into the segment tables, unless a gradient lies in memory that the step writes, or nowhere."""
        starts = np.array(addresses)
        if ((starts == 0) & (self.sizes > 0)).any() or self.written.touches_any(starts, starts + self.sizes):
            return False
        for update, places in zip(self.updates, self.places, strict=True):
            tables = {}
            for dtype, table in update.segment_tables().items():
                rows, positions = places[dtype]
                tables[dtype] = table.copy()
                tables[dtype][rows, 1] = starts[positions]
                tables[dtype].flags.writeable = False  # executors know an unchanged table by its identity
            update.tables = tables
        self.gradient_addresses = addresses
        self.bind()
        return True

    def bind(self) -> None:
        """Make the launches anew, for what changed in the updates."""
        self.launches = [execute.bind(update, executor) for update, executor in zip(self.updates, self.chosen, strict=True)]

    def applies(self, rule: Rule, clips: Clips) -> bool:
        """Whether the kernels are those of this rule, with or without factors."""
        return all(update.rule is rule and (update.factors is None) == clips.neutral for update in self.updates)

    def run(self, scalars: Callable[[Update], Scalars]) -> None:
        """Launch with each update's scalars."""
        for update, launch in zip(self.updates, self.launches, strict=True):
            common, update.rows = scalars(update)
            launch(common, update.factors)

    def together(self, flat: Flat) -> "Repeat":
        """The same step with a Flat's buffers as one segment each: 5,000 variables of 64 elements are 40 blocks, not 5,000.

        What lies between the variables is updated too and read by nobody. Without limits on each gradient's norm only: these
        need a row of factors for every segment.
        """
        twin = copy.copy(self)
        twin.updates = [_together(update, flat) or update for update in self.updates]
        merged = [new is not old for new, old in zip(twin.updates, self.updates, strict=True)]
        twin.takes = [
            (members, torch.zeros(1, dtype=torch.int64, device=update.bucket.device)) if one else (members, take)
            for one, update, (members, take) in zip(merged, self.updates, self.takes, strict=False)
        ]
        twin.bind()
        twin.tables = [update.bucket.tables for update in twin.updates]
        return twin

    def clip(self, clips: Clips) -> None:
        """Put the factors of this step's gradients into the launches."""
        if clips.neutral:
            return
        squares = None
        if clips.by_norm:
            starts = np.array(self.gradient_addresses)
            executors = {update.bucket.device: executor for update, executor in zip(self.updates, self.chosen, strict=True)}
            squares = [g.norms.squares(starts[g.positions], g.table(clips)[0], executors[g.device]) for g in self.groups]
        tables = clipping.factors(self.groups, clips, squares)
        for update, (members, take) in zip(self.updates, self.takes, strict=True):
            table = torch.cat([tables[i] for i in members]) if len(members) > 1 else tables[members[0]]
            update.factors = table if take is None else table.index_select(0, take)


def _together(update: Update, flat: Flat) -> Update | None:
    """An update of a bucket's one flat variable; None where its segments lie in another order."""
    bucket = update.bucket
    for variables, gradients, members, segments in flat.buffers:
        if segments == bucket.segments and all(map(is_, members, bucket.variables)):
            one = Bucket(bucket.device, bucket.dtype)
            one.adopt([variables], layout.plan([variables]), bucket.flat)
            return replace(update, bucket=one, variables=[variables], gradients=[gradients], tables=None)
    return None


def _take(update: Update, places: Places, groups: Sequence[clipping.Group]) -> tuple[list[int], Tensor | None]:
    """Which groups' factors an update needs, and for every segment its row among theirs; None where they are in order."""
    bucket = update.bucket
    members = [i for i, group in enumerate(groups) if (group.device, group.compute) == (bucket.device, bucket.compute)]
    order = {position: k for k, position in enumerate(p for i in members for p in groups[i].positions)}
    take = np.zeros(len(bucket.segments), dtype=np.int64)  # absent segments read any row
    for rows, positions in places.values():
        take[rows] = [order[p] for p in positions]
    if np.array_equal(take, np.arange(len(order))):
        return members, None
    return members, torch.from_numpy(take).to(bucket.device)


def _places(update: Update, pairs: Sequence[tuple[Tensor, Tensor]]) -> Places:
    found: dict[torch.dtype, list[tuple[int, int]]] = {}
    for position, (gradient, variable) in enumerate(pairs):
        row = update.bucket.index.get(id(variable))
        if row is not None:
            found.setdefault(gradient.dtype, []).append((row, position))
    return {dtype: tuple(np.array(both).T) for dtype, both in found.items()}


class Known(NamedTuple):
    """A Flat's launches."""

    flat: Flat
    each: Repeat
    """Segment by segment."""
    together: Repeat
    """A buffer as one segment, where the slots lie in the same order."""
    addresses: list[int]
    """Of the gradients; another list once `each` has served others."""


def flattened(pairs: Any) -> tuple[Any, list[Any]]:
    """The pairs, to be read once more, and gradients and variables in turn; of anything but a list or zip of pairs an empty list.

    5,000 tuples cost 2 ms, most of it the garbage collector's; zip makes one and uses it again.
    """
    if isinstance(pairs, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        return pairs, list(itertools.chain.from_iterable(pairs))
    if isinstance(pairs, zip):
        first = list(itertools.islice(pairs, 1))
        if not first or len(first[0]) != 2:
            return itertools.chain(first, pairs), []
        flat = [*first[0], *itertools.chain.from_iterable(pairs)]
        return zip(flat[::2], flat[1::2], strict=True), flat
    return pairs, []


class Repeats:
    """The last few steps that can be repeated, the latest first."""

    def __init__(self) -> None:
        self._kept: list[Repeat] = []
        self._flat: Known | None = None

    def find(self, flat: Sequence[Any], executor: Executor) -> Repeat | None:
        """The launches for gradients and variables in turn, holding their addresses; None where the long way must be taken."""
        for position, repeat in enumerate(self._kept):
            if repeat.executor == executor and repeat.meets(flat[::2], flat[1::2]):
                self._kept.insert(0, self._kept.pop(position))
                return repeat
        return None

    def of(self, flat: Flat, together: bool, executor: Executor) -> Repeat | None:
        """The launches for a Flat that is whole, in constant time; None where its tensors must be looked at.

        together: whether its variables share their scalars and factors.
        """
        if self._flat is None or self._flat.flat is not flat or not flat.whole():
            return None
        repeat = self._flat.together if together else self._flat.each
        same = repeat.executor == executor and self._flat.each.stays() and self._flat.each.gradient_addresses is self._flat.addresses
        return repeat if same else None

    def remember(self, flat: Flat) -> None:
        """The latest step was this Flat's: if it is whole and the step can be repeated, the next ones need not look at its tensors."""
        repeat = self._kept[0] if flat.whole() and self._kept else None
        if repeat and repeat.meets([gradient for gradient, _ in flat], flat.variables):
            self._flat = Known(flat, repeat, repeat.together(flat), repeat.gradient_addresses)

    def learn(
        self, pairs: Sequence[tuple[Tensor, Tensor]], launches: Sequence[Launch], chosen: Sequence[Chosen], executor: Executor
    ) -> None:
        """Keep a step's launches if they can run again: in place, each variable once, on executors that read addresses only."""
        updates = [launch.update for launch in launches]
        borrowed = {g.data_ptr() for update in updates for g in update.gradients if g is not None}
        if (
            "reference" in chosen
            or any(launch.finish for launch in launches)
            or len({id(update.bucket) for update in updates}) != len(updates)
            or sum(g is not None for update in updates for g in update.gradients) != len(pairs)
            or any(g.layout != torch.strided or g.data_ptr() not in borrowed for g, _ in pairs)
        ):
            return
        self._kept = [Repeat(pairs, updates, chosen, executor), *self._kept[: KEPT - 1]]
