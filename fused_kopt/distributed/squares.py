"""Norms of gradients of which every rank has pieces."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_kopt import clipping, collectives, norms
from fused_kopt.collectives import Group


class Squares:
    """Adds squares up over the ranks: one number for a global norm, one for each variable where each has a limit of its own."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._count = 0
        self._numbers: list[Tensor] = []

    def arrange(self, pairs: Sequence[tuple[Tensor, Tensor]], numbers: Sequence[int], count: int) -> None:
        """From now on these pairs are measured. numbers: for each its variable's among `count`, the same on all ranks."""
        self._count = count
        self._numbers = [torch.tensor([numbers[p] for p in g.positions], device=g.device) for g in clipping.groups(pairs)]

    def whole(self, squares: list[Tensor], each: bool) -> tuple[list[Tensor], list[Tensor]]:
        """See clipping.Across."""
        home = squares[0].device
        if not each:
            total = norms.fold(torch.cat([s.to(home) for s in squares])).reshape(1)
            collectives.reduce(total, self._group)()
            return [total], [total]
        every = torch.zeros(self._count, dtype=torch.float64, device=home)
        for numbers, mine in zip(self._numbers, squares, strict=True):
            every[numbers.to(home)] = mine.to(home)
        collectives.reduce(every, self._group)()
        return [every[numbers.to(home)].to(s.device) for numbers, s in zip(self._numbers, squares, strict=True)], [every]
