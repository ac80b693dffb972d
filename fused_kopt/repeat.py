"""The steady state: launches that an earlier step proved, run again at this step's addresses. About 0.4 us per variable."""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_kopt import clipping, execute, layout, tensors, verification
from fused_kopt.buffers import Bucket
from fused_kopt.clipping import Clips
from fused_kopt.execute import Chosen, Executor, Rule, Update
from fused_kopt.flat import Flat
from fused_kopt.loss_scale import Guard
from fused_kopt.recording import Sums
from fused_kopt.stages import Stage

_data_ptr = Tensor.data_ptr

# A step's scalars, and per segment its own where they differ.
Scalars = tuple[Sequence[float], Sequence[Sequence[float]] | None]

# By gradient dtype: rows of the segment table, and the positions of their pairs.
Places = Mapping[torch.dtype, tuple[Any, Any]]


class Repeat:
    """What one step launched, and the test that another step is like it: the same variables in the same order, unmoved, and
    gradients of the same type, dtype, shape, strides and device, which may lie elsewhere."""

    def __init__(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        updates: Sequence[Update],
        chosen: Sequence[Chosen],
        executor: Executor,
        slots: Sequence[Tensor] = (),
    ) -> None:
        gradients, self.variables = zip(*pairs, strict=True)
        all_ = (*gradients, *self.variables, *slots)
        self.guards = tensors.guards(all_)
        self.executor, self.chosen = executor, tuple(chosen)
        self.computes = list(dict.fromkeys(update.bucket.compute for update in updates))
        self.fixed_addresses = list(map(_data_ptr, (*self.variables, *slots)))
        self.gradient_addresses: list[int] = []
        self.sizes = np.array([g.numel() * g.element_size() for g in gradients])
        self.tables = [update.bucket.tables for update in updates]
        self.written = tensors.Written([*self.variables, *slots, *(flat for update in updates for flat in update.bucket.flat.values())])
        self.places = [_places(update, pairs) for update in updates]
        clipped = any(update.factors is not None for update in updates)
        self.groups = clipping.groups(pairs)
        self.takes = [_take(update, places, self.groups) for update, places in zip(updates, self.places, strict=True)] if clipped else []
        self.launches: list[Callable[[Sequence[float], Tensor | None], None]] = []
        self.updates = [replace(update, variables=[], gradients=[], tables=update.segment_tables(), sums=None) for update in updates]

    @functools.cached_property
    def orders(self) -> list[Any]:
        """Per update, for each of its segments, the position of its pair. For buckets in which no variable is absent."""
        found = []
        for places in self.places:
            rows, positions = (np.concatenate(both) for both in zip(*places.values(), strict=True))
            found.append(positions[np.argsort(rows)])
        return found

    def meets(self, gradients: Sequence[Any], variables: Sequence[Any], slots: Sequence[Any] = ()) -> bool:
        """Whether the launches fit; if so, they hold the gradients' addresses. slots: those that somebody else owns."""
        if len(variables) != len(self.variables) or not all(map(is_, variables, self.variables)):
            return False
        fixed = [*variables, *slots]
        if not self.guards.check(*gradients, *fixed) or list(map(_data_ptr, fixed)) != self.fixed_addresses:
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

    def applies(self, rules: Iterable[Rule], clips: Clips, sums: Sums | None) -> bool:
        """Whether the kernels are those of these rules, one for each update, with or without factors, and their measured twins
        usable where there are sums."""
        same = all(u.rule is rule and (u.factors is None) == clips.neutral for u, rule in zip(self.updates, rules, strict=False))
        if sums is None or not same:
            return same
        return all(verification.proven(_measured(u, sums), e, self.executor) == e for u, e in zip(self.updates, self.chosen, strict=True))

    def run(self, scalars: Callable[[Update], Scalars], sums: Sums | None = None, stages: Sequence[Stage] = ()) -> None:
        """Launch with each update's scalars; sums: where the step is measured."""
        for update, launch, executor in zip(self.updates, self.launches, self.chosen, strict=True):
            common, update.rows = scalars(update)
            if sums is not None:
                launch = execute.bind(_measured(update, sums), executor)
            for stage in stages:
                stage.before(update.bucket)
            launch(common, update.factors)
            for stage in stages:
                stage.after(update.bucket)

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

    def clip(self, clips: Clips, guard: Guard | None = None) -> None:
        """Put the factors of this step's gradients into the launches, and what a guard that checks them says."""
        squares = clipping.measure(self.groups, clips, self._squares, guard)
        for update in self.updates:
            update.gate = None if guard is None else guard.gate(update.bucket.device)
        if clips.neutral:
            return
        weights = [self._squares(group, clips, self.fixed_addresses) for group in self.groups] if clips.trust else None
        tables = clipping.factors(self.groups, clips, squares, weights)
        for update, (members, take) in zip(self.updates, self.takes, strict=True):
            table = torch.cat([tables[i] for i in members]) if len(members) > 1 else tables[members[0]]
            update.factors = table if take is None else table.index_select(0, take)

    def _squares(self, group: clipping.Group, clips: Clips, addresses: Sequence[int] | None = None) -> Tensor:
        """The square norms of what lies at these addresses, one for each pair; by default of the gradients."""
        executors = {update.bucket.device: executor for update, executor in zip(self.updates, self.chosen, strict=True)}
        starts = np.array(self.gradient_addresses if addresses is None else addresses)[group.positions]
        return group.norms.squares(starts, group.row(clips), executors[group.device])


def _measured(update: Update, sums: Sums) -> Update:
    return replace(update, sums=sums.on(update.bucket.device))


def _together(update: Update, flat: Flat) -> Update | None:
    """An update of a bucket's one flat variable; None where its segments lie in another order."""
    bucket = update.bucket
    for buffer in flat.buffers:
        if buffer.segments == bucket.segments and all(map(is_, buffer.members, bucket.variables)):
            one = Bucket(bucket.device, bucket.dtype, bucket.stored, bucket.policy)
            one.kinds = bucket.kinds
            one.adopt([buffer.variables], layout.plan([buffer.variables]), bucket.flat)
            return replace(update, bucket=one, variables=[buffer.variables], gradients=[buffer.gradients], tables=None)
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
