"""Square norms in float64, summed in one order that every executor keeps, so that clipped steps have equal bits.

A gradient is cut into blocks of BLOCK elements, the last one filled with zeros. In a block the second half is added to the
first until LANES numbers are left, then neighbours are added until one is left. The blocks' sums are added up in LANES
running sums, and these by neighbours.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_kopt import execute, layout, prepare
from fused_kopt.execute import Chosen

BLOCK, LANES = 8192, 1024


def _summed(rows: Tensor) -> Tensor:
    """The sum of each row, whose length is a power of two and at least LANES."""
    while rows.shape[1] > LANES:
        half = rows.shape[1] // 2
        rows = rows[:, :half] + rows[:, half:]
    while rows.shape[1] > 1:
        rows = rows[:, ::2] + rows[:, 1::2]
    return rows[:, 0]


def _padded(values: Tensor, length: int) -> Tensor:
    """1-D values in rows of `length`, the last one filled with zeros; at least one row."""
    count = max(-(-values.numel() // length), 1)
    filled = torch.zeros(count * length, dtype=values.dtype, device=values.device)
    filled[: values.numel()] = values
    return filled.view(count, length)


def fold(values: Tensor) -> Tensor:
    """The sum of float64 [n]; 0-d."""
    total = torch.zeros((1, LANES), dtype=torch.float64, device=values.device)
    for row in _padded(values, LANES):
        total = total + row
    return _summed(total)[0]


def square_norm(values: Tensor) -> Tensor:
    """The sum of the squares of 1-D values; 0-d float64. What the kernels are compared with."""
    return fold(_summed(_padded(values.double().square(), BLOCK)))


class Norms:
    """The square norms of gradients of one dtype on one device, as one launch computes them."""

    BLOCK, LANES = BLOCK, LANES

    def __init__(self, counts: Sequence[int], dtypes: tuple[torch.dtype, torch.dtype], device: torch.device) -> None:
        """counts: elements of each gradient; dtypes: of the computation, and of the gradients."""
        self.dtypes = dtypes
        self.device = device
        self.blocks = layout.blocks(counts, BLOCK)
        self.starts = np.concatenate([[0], np.cumsum(-(-np.array(counts, dtype=np.int64) // BLOCK))])
        self.table = np.zeros((len(counts), 3), dtype=np.int64)
        self.table[:, 2] = counts
        self.tables: Any = None  # what the triton executor keeps between launches

    def squares(self, addresses: Any, row: Tensor, executor: Chosen) -> Tensor:
        """float64 [n] of the gradients at these addresses, scaled and clipped by the factors in `row` (compute dtype [5]) first."""
        self.table[:, 1] = addresses
        return execute.square_norms(self, self.table, row, executor)


def reference(gradients: Sequence[Tensor], row: Tensor) -> Tensor:
    """float64 [n] of 1-D gradients, as `Norms.squares`."""
    return torch.stack([square_norm(prepare.scale_and_bound(g.to(row.dtype), row.unbind())) for g in gradients])
