"""Where the variables of a bucket lie in its flat buffers. Pure shapes; allocates nothing."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# Segments start at multiples of so many elements: 16 bytes in slots of 1 byte, and at a group's first element (`fused_kopt.op.GROUP`).
ALIGNMENT = 64


class Segment(NamedTuple):
    """One variable's place in its bucket."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]  # of the slots' views, and of the variable where it is dense
    numel: int
    offset: int  # first element in every flat buffer of the bucket
    number: int | None = None  # of the first element, among those that random bits are made for; None: the offset

    def of(self, flat: Tensor) -> Tensor:
        """Its place in a flat buffer."""
        return flat.as_strided(self.shape, self.stride, int(flat.storage_offset()) + self.offset)

    @property
    def first(self) -> int:
        """The number of the first element, which the others follow."""
        return self.offset if self.number is None else self.number

    @property
    def end(self) -> int:
        """The first element after this segment and its padding."""
        return self.offset + -(-self.numel // ALIGNMENT) * ALIGNMENT


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that slots are kept and the rule is computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """The row-major strides of a shape, in elements."""
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def same_layout(shape: Sequence[int], first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether two strides address a shape's elements alike; dimensions of size 1 do not count."""
    return all(a == b for size, a, b in zip(shape, first, second, strict=True) if size > 1)


def dense_stride(variable: Tensor) -> tuple[int, ...]:
    """The variable's strides if it is dense (a permutation of row-major), else row-major strides."""
    shape = variable.shape
    order = sorted((d for d in range(variable.dim()) if shape[d] > 1), key=lambda d: variable.stride(d))
    step = 1
    for d in order:
        if variable.stride(d) != step:
            return contiguous_stride(shape)
        step *= shape[d]
    return tuple(variable.stride()) if variable.numel() else contiguous_stride(shape)


def clone(tensor: Tensor, stride: Sequence[int]) -> Tensor:
    """A copy with the given strides."""
    return torch.empty_strided(tensor.size(), tuple(stride), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def memory_order(tensor: Tensor) -> Tensor:
    """A tensor's elements as they lie in memory, 1-D: a view where it is dense, else a copy in row-major order."""
    if same_layout(tensor.shape, dense_stride(tensor), tensor.stride()):
        return tensor.as_strided((tensor.numel(),), (1,))
    return tensor.contiguous().view(-1)


def shaped(flat: Tensor, like: Tensor) -> Tensor:
    """Elements as they lie in memory, in the shape and strides of a dense tensor: `memory_order`'s inverse."""
    return flat.as_strided(like.shape, dense_stride(like))


def plan(variables: Iterable[Tensor], offset: int = 0) -> list[Segment]:
    """Segments for variables, one after another from `offset` (elements, a multiple of ALIGNMENT)."""
    segments = []
    for variable in variables:
        segment = Segment(tuple(variable.shape), dense_stride(variable), variable.numel(), offset)
        segments.append(segment)
        offset = segment.end
    return segments


def runs(sizes: Iterable[int], least: int) -> list[list[int]]:
    """Positions of sizes in their order, cut into runs that add up to at least `least`; the last may be smaller."""
    found: list[list[int]] = [[]]
    total = 0
    for position, size in enumerate(sizes):
        if total >= least:
            found.append([])
            total = 0
        found[-1].append(position)
        total += size
    return found


def blocks(counts: Any, block: int) -> Any:
    """The block table of segments of so many elements, int32 [grid, 2]: (segment, block of it) for every program of a launch."""
    each = -(-np.asarray(counts, dtype=np.int64) // block)
    index = np.repeat(np.arange(len(each)), each)
    return np.stack([index, np.arange(len(index)) - np.repeat(np.cumsum(each) - each, each)], axis=1).astype(np.int32)
