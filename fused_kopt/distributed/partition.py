"""How variables are divided among ranks: flat buffers, of which every rank owns an equal share."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_kopt import layout, tensors
from fused_kopt.layout import ALIGNMENT, Segment

_data_ptr = Tensor.data_ptr
logger = logging.getLogger("fused_kopt")


class Share(NamedTuple):
    """What a rank owns of one variable."""

    member: int
    """The variable's position in its part."""
    start: int
    """The first element, in memory order; a multiple of ALIGNMENT."""
    end: int
    """One past the last."""


class Part:
    """Variables of one device and dtype, side by side in one flat buffer of `ranks` equal shares. Padding comes last.

    Attributes: `variables`, which are views of `flat` from now on; `segments`; `share`, elements of each rank's, a multiple of ALIGNMENT.
    """

    def __init__(self, variables: Sequence[Tensor], ranks: int) -> None:
        """Moves the variables in; their values are kept."""
        self.variables = list(variables)
        self.segments: list[Segment] = layout.plan(variables)
        self.share = share(self.segments[-1].end, ranks)
        like = variables[0]
        with torch.no_grad():
            self.flat = torch.zeros(self.share * ranks, dtype=like.dtype, device=like.device)
            for variable, segment in zip(variables, self.segments, strict=True):
                variable.data = segment.of(self.flat).copy_(variable)
        self._addresses = [variable.data_ptr() for variable in variables]
        self._versions = [-1] * len(variables)

    def of(self, rank: int) -> list[Share]:
        """What a rank owns: a share for every variable of which it has elements."""
        low, high = rank * self.share, (rank + 1) * self.share
        ends = [(i, max(low, s.offset) - s.offset, min(high, s.offset + s.numel) - s.offset) for i, s in enumerate(self.segments)]
        return [Share(*found) for found in ends if found[1] < found[2]]

    def bring_back(self) -> None:
        """Variables that were moved out of the buffer (`.data =`, `.to()`) bring their new values and return."""
        if list(map(_data_ptr, self.variables)) == self._addresses:
            return
        for variable, segment, address in zip(self.variables, self.segments, self._addresses, strict=True):
            if variable.data_ptr() != address:
                if tuple(variable.shape) != segment.shape or variable.dtype != self.flat.dtype or variable.device != self.flat.device:
                    raise ValueError(f"A sharded variable became {tensors.describe(variable)}. Shard a new optimizer for it.")
                logger.warning("A sharded variable of shape %s was moved: its value is copied back into its flat buffer.", segment.shape)
                with torch.no_grad():
                    variable.data = segment.of(self.flat).copy_(variable)
                torch.autograd.graph.increment_version([variable])

    def written(self) -> list[Tensor]:
        """The variables that were written since the last call."""
        before, self._versions = self._versions, [variable._version for variable in self.variables]
        return [v for v, then, now in zip(self.variables, before, self._versions, strict=True) if then != now]


def share(elements: int, ranks: int) -> int:
    """The elements of a buffer that each rank owns, padding included."""
    return -(-elements // (ranks * ALIGNMENT)) * ALIGNMENT
