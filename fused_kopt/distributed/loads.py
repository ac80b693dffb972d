"""What an offloaded step copies, worked out once for pairs that come again."""

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import numpy as np
from torch import Tensor

from fused_kopt import layout, tensors
from fused_kopt.distributed import transfers
from fused_kopt.distributed.homes import Home
from fused_kopt.state import Key

_data_ptr = Tensor.data_ptr


class Load:
    """What one launch needs from a device, and gives back. None of its tensors is empty."""

    def __init__(self, positions: Sequence[int], gradients: Sequence[Tensor], homes: Sequence[Home]) -> None:
        self.link = homes[0].buffer.link
        self.homes = homes
        self.positions = np.array(positions)
        self.arriving: Any = None
        self._places = [home.buffer.gradient(home.segment, g.dtype) for home, g in zip(homes, gradients, strict=True)]
        strides = [(home.segment.shape, home.segment.stride, g.stride()) for home, g in zip(homes, gradients, strict=True)]
        self._strange = [i for i, s in enumerate(strides) if not layout.same_layout(*s)]  # laid out otherwise than their places
        starts = np.array(list(map(_data_ptr, self._places)))
        self._offsets = starts - starts[0]
        one = not self._strange and len({p.untyped_storage().data_ptr() for p in self._places}) == 1
        last = self._places[-1]
        elements = (last.data_ptr() - self._places[0].data_ptr()) // last.element_size() + last.numel()
        self._together = self._places[0].as_strided((elements,), (1,)) if one and (np.diff(self._offsets) > 0).all() else None
        self._targets, self._sources = _joined(homes)
        self.bytes_down = sum(p.numel() * p.element_size() for p in self._places)
        self.bytes_up = sum(home.twin.numel() * home.twin.element_size() for home in homes)

    def start(self, gradients: Sequence[Tensor], addresses: Any, stale: Sequence[Home]) -> None:
        """Start to copy the gradients down, and the values of variables that somebody else wrote."""
        mine = [gradients[position] for position in self.positions]
        with self.link.down():
            if stale:
                transfers.copy([home.twin for home in stale], [home.variable.detach() for home in stale])
            if self._together is not None and self._side_by_side(mine[0], addresses[self.positions]):
                transfers.copy([self._together], [mine[0].as_strided(self._together.shape, (1,))])
            else:
                for i in self._strange:  # on their device: the copy down is then of memory as it lies, and nobody waits for it
                    mine[i] = layout.clone(mine[i], self.homes[i].segment.stride)
                transfers.copy(self._places, mine)
            self.arriving = self.link.arriving()

    def _side_by_side(self, first: Tensor, addresses: Any) -> bool:
        """Whether the gradients lie in one storage as their places do. What lies between them is read too, and used by nobody."""
        assert self._together is not None
        storage = first.untyped_storage()
        end = first.data_ptr() + self._together.numel() * first.element_size()
        return np.array_equal(addresses - addresses[0], self._offsets) and end <= storage.data_ptr() + storage.nbytes()

    def wait(self) -> None:
        """Until the gradients are there."""
        if self.arriving is not None:
            self.arriving.synchronize()
            self.arriving = None

    def give_back(self) -> None:
        """Copy the variables up."""
        self.link.up(self._targets, self._sources)


def _joined(homes: Sequence[Home]) -> tuple[list[Tensor], list[Tensor]]:
    """Variables and their twins; those that follow each other without a gap in both memories as one 1-D tensor.

    A gap may be somebody's, and is not written.
    """
    runs: list[list[Home]] = []
    for home in homes:
        if runs and _follows(home, runs[-1][-1]):
            runs[-1].append(home)
        else:
            runs.append([home])
    targets, sources = [], []
    for run in runs:
        variable, twin, elements = run[0].variable.detach(), run[0].twin, sum(home.twin.numel() for home in run)
        plain = _plain(run[0])
        targets.append(variable.as_strided((elements,), (1,)) if plain else variable)
        sources.append(twin.as_strided((elements,), (1,)) if plain else twin)
    return targets, sources


def _plain(home: Home) -> bool:
    """Whether variable and twin are the same bytes in the same order."""
    return not home.variable.is_neg() and layout.same_layout(home.segment.shape, home.segment.stride, home.variable.stride())


def _follows(home: Home, before: Home) -> bool:
    both = [(before.variable, home.variable), (before.twin, home.twin)]
    beside = all(b.data_ptr() == a.data_ptr() + a.numel() * a.element_size() for a, b in both)
    same = all(a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() for a, b in both)
    return beside and same and _plain(home) and _plain(before)


class Plan:
    """Pairs like those of an earlier step, the pairs on the host that stand for them, and the loads between both."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], homes: Sequence[Home], keys: Sequence[Key]) -> None:
        """keys: of each twin's bucket."""
        gradients, self.variables = zip(*pairs, strict=True)
        all_ = (*gradients, *self.variables)
        self._guards = tensors.guards(all_)
        self._addresses = list(map(_data_ptr, self.variables))
        self._sizes = np.array([g.numel() * g.element_size() for g in gradients])
        self._written = tensors.Written(self.variables)
        self.homes = homes
        self.pairs = [(h.buffer.gradient(h.segment, g.dtype), h.twin) for h, g in zip(homes, gradients, strict=True)]
        members: dict[Key, list[int]] = {}
        for position, key in enumerate(keys):
            if homes[position].twin.numel():
                members.setdefault(key, []).append(position)
        self.loads: Mapping[Key, Load] = {
            key: Load(mine, [gradients[i] for i in mine], [homes[i] for i in mine]) for key, mine in members.items()
        }

    def meets(self, gradients: Sequence[Any], variables: Sequence[Any]) -> bool:
        """Whether these are the same variables, unmoved, with gradients of the same kind."""
        if len(variables) != len(self.variables) or not all(map(is_, variables, self.variables)):
            return False
        if not self._guards.check(*gradients, *variables) or list(map(_data_ptr, variables)) != self._addresses:
            return False
        addresses = np.array(list(map(_data_ptr, gradients)))
        return not ((addresses == 0) & (self._sizes > 0)).any()  # memory that was freed

    def start(self, gradients: Sequence[Tensor], stale: Sequence[Home]) -> None:
        """Start to copy down, in the order of the launches."""
        links = list({id(load.link): load.link for load in self.loads.values()}.values())
        for link in links:
            link.begin()
        addresses, marked = np.array(list(map(_data_ptr, gradients))), set(map(id, stale))
        for load in self.loads.values():
            load.start(gradients, addresses, [home for home in load.homes if id(home) in marked] if marked else [])
        if self._written.touches_any(addresses, addresses + self._sizes):  # a gradient in a variable's memory
            for link in links:
                link.keep_apart()
