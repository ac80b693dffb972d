"""Square norms: the same bits from torch, C++ and Triton, close to the exact sum, and what their machine code looks like."""

import math
import re

import numpy as np
import pytest
import support
import torch
from torch import Tensor
from triton.compiler import ASTSource, compile

from fused_kopt import norms, prepare
from fused_kopt.kernels import launch, offline, rules
from fused_kopt.kernels.norms import square_blocks
from fused_kopt.layout import compute_dtype

BLOCK = norms.BLOCK
SIZES = (0, 1, 5, norms.LANES - 1, norms.LANES, norms.LANES + 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7)


def drawn(dtype: torch.dtype, shift: int = 0) -> list[Tensor]:
    """Numbers of six decades; `shift` elements past an aligned address."""
    found = []
    for i, size in enumerate(SIZES):
        values = support.randn(size + shift, seed=i) * 10 ** support.randn(size + shift, seed=50 + i).clamp(-3, 3)
        found.append(values.to(dtype)[shift:])
    return found


def squares(gradients: list[Tensor], row: Tensor, executor: str) -> Tensor:
    first = gradients[0]
    table = norms.Norms([g.numel() for g in gradients], (row.dtype, first.dtype), first.device)
    return table.squares(np.array([g.data_ptr() for g in gradients]), row, executor)  # type: ignore[arg-type]


@pytest.mark.parametrize("executor", ["compiled", "triton"])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
@pytest.mark.parametrize("bounds", [(1.0, math.inf), (0.5, 0.75)], ids=str)
def test_every_executor_sums_in_the_same_order(bounds: tuple[float, float], dtype: torch.dtype, shift: int, executor: str) -> None:
    gradients = drawn(dtype, shift)
    row = torch.tensor([*bounds, 1.0, 1.0, 1.0], dtype=compute_dtype(dtype))
    expected = norms.reference(gradients, row)
    assert torch.equal(squares(gradients, row, executor), expected)
    exact = [
        math.fsum((np.clip(g.to(row.dtype).numpy() * bounds[0], -bounds[1], bounds[1]).astype(float) ** 2).tolist()) for g in gradients
    ]
    assert np.allclose(expected.numpy(), exact, rtol=1e-14, atol=0)  # 20 additions of 2^-53 each


@pytest.mark.parametrize("executor", ["compiled", "triton"])
def test_the_order_matters(executor: str) -> None:
    """What the test above compares is not the same in any order: reversed gradients give other bits."""
    row = torch.tensor([1.0, math.inf, 1.0, 1.0, 1.0], dtype=torch.float64)
    gradients = drawn(torch.float64)
    reverse = [g.flip(0) for g in gradients]
    assert not torch.equal(squares(reverse, row, executor), norms.reference(gradients, row))


@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
def test_special_values_reach_the_norm(special: float) -> None:
    gradient = torch.ones(BLOCK + 3)
    gradient[BLOCK + 1] = special
    row = torch.tensor([1.0, math.inf, 1.0, 1.0, 1.0])
    found = [norms.reference([gradient], row), *(squares([gradient], row, e) for e in ("compiled", "triton"))]
    assert all(torch.equal(f.isnan(), found[0].isnan()) and torch.equal(f.nan_to_num(), found[0].nan_to_num()) for f in found)
    assert not found[0].isfinite().any()


def test_a_fold_of_thousands() -> None:
    values = support.randn(5 * norms.LANES + 3, dtype=torch.float64)
    assert math.isclose(float(norms.fold(values)), math.fsum(values.tolist()), rel_tol=1e-12)
    assert float(norms.fold(torch.zeros(0, dtype=torch.float64))) == 0.0


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_machine_code(dtype: torch.dtype, target: str) -> None:
    """One read of the gradient at full width; float64 sums without fma; no spills."""
    constants = {
        "PREPARE": rules.compiled(prepare.scale_and_bound), "GRADIENT": launch.TRITON_DTYPE[dtype],
        "COMPUTE": launch.TRITON_DTYPE[torch.float32], "TILE": norms.BLOCK // 8,
    }  # fmt: skip
    pointers = {"segments": "*i64", "blocks": "*i32", "factors": "*fp32", "sums": "*fp64"}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    source = ASTSource(square_blocks, pointers | dict.fromkeys(constants, "constexpr"), constexprs=constants, attrs=aligned)
    machine = offline.TARGETS[target]
    kernel = compile(source, target=machine, options={"num_warps": launch.THREADS // machine.warp_size, "enable_fp_fusion": False})
    if target == "gfx942":
        text = kernel.asm["amdgcn"]
        assert offline._amd_resources(text)[1] == 0
        assert not re.search(r"v_fma_f64|v_pk_fma", text)
        return
    registers, text = offline._disassembled(kernel.asm["cubin"])
    assert registers <= 168  # one program of 256 threads fits; each has 8 loads of 128 bits under way
    assert not re.search(r"\b(?:STL|LDL|DFMA|FFMA)\b", text)
    width = "128" if dtype == torch.float32 else "64"
    assert len(re.findall(rf"LDG\.E\.{width}\b", text)) >= 8
