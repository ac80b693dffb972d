"""The steady state: launches that an earlier step proved, run again at this step's addresses. About 0.4 us per variable."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

from fused_kopt import clipping, tensors
from fused_kopt.clipping import Clips
from fused_kopt.execute import Chosen, Executor, Update
from fused_kopt.updates import Launch, Recipe

# Launches kept: of the full set of variables, and of subsets that come again (alternating losses, frozen parts).
KEPT = 4

_data_ptr = Tensor.data_ptr

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
        self.variable_addresses = list(map(_data_ptr, self.variables))
        self.gradient_addresses: list[int] = []
        self.sizes = np.array([g.numel() * g.element_size() for g in gradients])
        self.tables = [update.bucket.tables for update in updates]
        self.written = tensors.Written([*self.variables, *(flat for update in updates for flat in update.bucket.flat.values())])
        self.places = [_places(update, pairs) for update in updates]
        clipped = any(update.factors is not None for update in updates)
        self.groups = clipping.groups(pairs) if clipped else []
        self.takes = [_take(update, places, self.groups) for update, places in zip(updates, self.places, strict=True)] if clipped else []
        self.updates = [replace(update, variables=[], gradients=[], tables=update.segment_tables()) for update in updates]

    def meets(self, gradients: Sequence[Any], variables: Sequence[Any]) -> bool:
        """Whether the launches fit; if so, they hold the gradients' addresses."""
        if len(variables) != len(self.variables) or not all(map(is_, variables, self.variables)):
            return False
        if not self.guards.check(*gradients, *variables) or list(map(_data_ptr, variables)) != self.variable_addresses:
            return False
        if any(update.bucket.tables is not tables for update, tables in zip(self.updates, self.tables, strict=True)):
            return False  # the buffers moved
        addresses = list(map(_data_ptr, gradients))
        return addresses == self.gradient_addresses or self._move(addresses)

    def _move(self, addresses: list[int]) -> bool:
        """Put new addresses into the segment tables, unless a gradient lies in memory that the step writes, or nowhere."""
        starts = np.array(addresses)
        if ((starts == 0) & (self.sizes > 0)).any() or self.written.touches_any(starts, starts + self.sizes):
            return False
        for update, places in zip(self.updates, self.places, strict=True):
            for dtype, table in update.segment_tables().items():
                rows, positions = places[dtype]
                table[rows, 1] = starts[positions]
        self.gradient_addresses = addresses
        return True

    def runs(self, recipes: Sequence[Recipe], clips: Clips) -> bool:
        """Whether the rules are the same; if so, the launches hold this step's scalars and factors."""
        for update, recipe in zip(self.updates, recipes, strict=True):
            if recipe.rule is not update.rule or (update.factors is None) != clips.neutral:
                return False
            update.scalars = recipe.scalars
        if not clips.neutral:
            self._clip(clips)
        return True

    def _clip(self, clips: Clips) -> None:
        """Put the factors of this step's gradients into the launches."""
        squares = None
        if clips.by_norm:
            starts = np.array(self.gradient_addresses)
            executors = {update.bucket.device: executor for update, executor in zip(self.updates, self.chosen, strict=True)}
            squares = [g.norms.squares(starts[g.positions], g.row(clips), executors[g.device]) for g in self.groups]
        tables = clipping.factors(self.groups, clips, squares)
        for update, (members, take) in zip(self.updates, self.takes, strict=True):
            table = torch.cat([tables[i] for i in members]) if len(members) > 1 else tables[members[0]]
            update.factors = table if take is None else table.index_select(0, take)


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

    def find(self, flat: Sequence[Any], executor: Executor) -> Repeat | None:
        """The launches for gradients and variables in turn, holding their addresses; None where the long way must be taken."""
        for position, repeat in enumerate(self._kept):
            if repeat.executor == executor and repeat.meets(flat[::2], flat[1::2]):
                self._kept.insert(0, self._kept.pop(position))
                return repeat
        return None

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
