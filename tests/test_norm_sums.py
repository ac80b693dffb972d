"""Square norms, continued: other compute dtypes, more blocks than lanes, and threads."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import support
import torch
from torch import Tensor

from fused_kopt import norms, prepare
from fused_kopt.execute import Chosen
from fused_kopt.kernels import cpp_launch, launch
from fused_kopt.kernels import norms as kernels

BLOCK, LANES = norms.BLOCK, norms.LANES
CPU = torch.device("cpu")
EXECUTORS: tuple[Chosen, ...] = ("triton", "compiled")
SIZES = (1, 0, 7, LANES - 1, LANES + 1, 3000, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 1025)
ROW = (0.5, 1.25, 1.0, 1.0, 1.0)


def squares(gradients: Sequence[Tensor], compute: torch.dtype, executor: Chosen) -> Tensor:
    row = torch.tensor(ROW, dtype=compute)
    if executor == "reference":
        return norms.reference(gradients, row)
    found = norms.Norms([g.numel() for g in gradients], (compute, gradients[0].dtype), CPU)
    return found.squares(np.array([g.data_ptr() for g in gradients], dtype=np.int64), row, executor)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
def test_gradients_of_float64_variables(dtype: torch.dtype, executor: Chosen) -> None:
    # each starts one element past another's end, where what lies behind is not zero
    memory = support.randn(sum(SIZES) + len(SIZES), seed=1).exp().to(dtype)
    gradients: list[Tensor] = list(memory.split([n for size in SIZES for n in (size, 1)]))[::2]
    expected, actual = (squares(gradients, torch.float64, name) for name in ("reference", executor))
    support.assert_same([support.bits(expected)], [support.bits(actual)])


def folds() -> Iterator[tuple[str, Tensor]]:
    """The sums of 1, 1,024 and 2,500 numbers, and of none, by each of the three."""
    counts = [1, LANES, 0, 2500]
    values, starts = support.randn(sum(counts), seed=2, dtype=torch.float64).exp(), torch.tensor(np.cumsum([0, *counts]))
    yield "reference", torch.stack([norms.fold(part) for part in values.split(counts)])
    sums = torch.zeros(len(counts), dtype=torch.float64)
    launch._run(kernels.fold, len(counts), (values, starts, sums), (LANES,))
    yield "triton", sums
    sums = torch.zeros(len(counts), dtype=torch.float64)
    _, fold = cpp_launch.norm_kernels(prepare.scale_and_bound, (torch.float32, torch.float32), BLOCK)
    fold(values.data_ptr(), starts.data_ptr(), len(counts), sums.data_ptr())
    yield "compiled", sums
    yield "numpy", torch.stack([part.sum() for part in values.split(counts)])


def test_folds_of_more_blocks_than_lanes() -> None:
    found = dict(folds())
    assert torch.allclose(found["reference"], found.pop("numpy"), rtol=1e-12)
    for name, sums in found.items():
        support.assert_same([support.bits(found["reference"])], [support.bits(sums)], name)


def test_threads_do_not_share_sums() -> None:
    gradients, threads = [support.randn(150 * BLOCK, seed=i) for i in range(2)], torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        found = [squares(gradients, torch.float32, "compiled") for _ in range(5)]
    finally:
        torch.set_num_threads(threads)
    expected = squares(gradients, torch.float32, "reference")
    assert all(torch.equal(expected, sums) for sums in found)
