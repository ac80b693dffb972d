"""An optimizer's state as ranges of 1-D tensors: which of them this rank has, and which it writes, whatever the number of ranks."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kopt import layout
from fused_kopt.layout import ALIGNMENT
from fused_kopt.optimizer import Optimizer

KINDS = (*(torch.float16, torch.bfloat16, torch.float32, torch.float64), *(torch.uint8, torch.int8, torch.int16, torch.int64))
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in KINDS}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Chunk(NamedTuple):
    """A range of a 1-D tensor of which ranks have different ranges."""

    start: int
    size: int
    """Of the whole tensor."""
    data: Tensor
    """The range's elements, 1-D, on the CPU."""


class Piece(NamedTuple):
    """What an optimizer has slots for on this rank: a variable, a 1-D piece of one, or nothing."""

    tensor: Tensor | None
    start: int
    """First element in the variable's memory order, a multiple of ALIGNMENT."""
    end: int
    sharded: bool
    """Whether other ranks have the other elements; else they have the same ones."""


def pieces(optimizer: Optimizer, variables: Mapping[str, Tensor]) -> dict[str, Piece]:
    """By name what the optimizer steps on in the place of each variable."""
    found = {name: Piece(variable, 0, variable.numel(), False) for name, variable in variables.items()}
    for stage in optimizer._stages:
        theirs = stage.pieces()
        for name, (tensor, start, _, sharded) in found.items():
            if id(tensor) in theirs:
                piece, first, end = theirs[id(tensor)]
                found[name] = Piece(piece, start + first, start + end, sharded or stage.aggregates)
    return found


def shares(sizes: Sequence[int], rank: int, ranks: int) -> list[tuple[int, int]]:
    """The ranges that a rank writes of variables that every rank has: an equal part of all elements, cut where groups end."""
    cuts = [-(-sum(sizes) // ranks) * number for number in (rank, rank + 1)]
    found, offset = [], 0
    for size in sizes:
        start, end = (min(max(-(-(cut - offset) // ALIGNMENT) * ALIGNMENT, 0), size) for cut in cuts)
        found.append((start, end))
        offset += size
    return found


class Part(NamedTuple):
    """How a slot, or a part of one, is stored."""

    dtype: str
    group: int
    """How many elements of the variable share a value."""
    shape: list[int] | None = None
    """Of a slot of a shape of its own, which has no `group`."""

    def range(self, start: int, end: int) -> tuple[int, int]:
        """Where its values for a range of the variable's elements lie in the global tensor; all of them for one of its own shape."""
        if self.shape is not None:
            return 0, torch.Size(self.shape).numel()
        return start // self.group, -(-end // self.group) if end > start else start // self.group


def described(variable: Tensor) -> list[Any]:
    """Shape, strides of the dimensions above 1, dtype: what elements in memory order mean."""
    strides = [step for size, step in zip(variable.shape, layout.dense_stride(variable), strict=True) if size > 1]
    return [list(variable.shape), strides, NAMES[variable.dtype]]


def some(chunks: Mapping[str, Chunk]) -> dict[str, Chunk]:
    """Those that are not empty: DCP has none for them."""
    return {key: chunk for key, chunk in chunks.items() if chunk.data.numel()}
