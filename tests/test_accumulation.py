"""Gradients in a dtype of their own, and buffers that add them up."""

from typing import Any

import pytest
import support
import torch
from torch import Tensor, nn

import fused_kopt
from fused_kopt.mixed_precision import GradientBuffers, LossScaleOptimizer

EXECUTORS = (*support.EXECUTORS, "compiled")
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("variable", "gradient"), [(BF16, F32), (F16, F32), (F32, BF16), (F32, F16), (F64, BF16), (F32, F64)], ids=str)
def test_gradients_keep_their_dtype(variable: torch.dtype, gradient: torch.dtype, executor: Any) -> None:
    """They are read as they are, not rounded to the variable's dtype first; float64 ones are rounded once to float32."""
    start, grads = support.randn(1030).to(variable), [support.randn(1030, seed=i).to(gradient) for i in range(3)]
    compute = F64 if variable == F64 else F32
    _, (found,) = support.run("adam", executor, [start], [[g] for g in grads])
    _, (expected,) = support.run("adam", "reference", [start], [[g.to(compute)] for g in grads])
    assert torch.equal(found, expected)
    if (variable, gradient) == (BF16, F32):  # a control: rounded first, they give another result
        _, (rounded,) = support.run("adam", "reference", [start.float()], [[g.to(variable).float()] for g in grads])
        _, (exact,) = support.run("adam", "reference", [start.float()], [[g] for g in grads])
        assert not torch.equal(rounded, exact)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_many_small_gradients_are_not_lost(executor: Any) -> None:
    """512 micro-batches of 1/512: 1 in a float32 buffer; a bfloat16 sum stalls at 1/2, where 1/512 is half a unit in the last place."""
    variables = [torch.zeros(n, dtype=BF16) for n in (5, 64, 1030)]
    buffers, control = GradientBuffers(variables, executor), torch.zeros(5, dtype=BF16)
    count = 512 if executor == "compiled" else 16
    for _ in range(count):
        buffers.add([torch.full_like(v, 1 / 512) for v in variables])
        control += 1 / 512
    assert [b.unique().tolist() for b in buffers.buffers] == [[count / 512]] * 3
    if count == 512:
        assert control.unique().tolist() == [0.5]


@pytest.mark.parametrize("executor", ["compiled", "triton"])
def test_one_launch_adds_all(executor: Any) -> None:
    variables = [torch.zeros(n, dtype=BF16) for n in (3, 70)]
    buffers = GradientBuffers(variables, executor)
    gradients = [torch.ones_like(v) for v in variables]
    for _ in range(3):
        with support.launches(1):
            buffers.add(gradients, weight=0.5)
    assert all(bool((b == 1.5).all()) for b in buffers.buffers)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_micro_batches_equal_one_batch(executor: Any) -> None:
    """In float32 and with sums that are exact; layouts, missing gradients and loss scaling included."""
    variables = [
        nn.Parameter(support.randn(4, 6).bfloat16().t()),
        nn.Parameter(torch.ones(3)),
        nn.Parameter(torch.ones(2)),
        nn.Parameter(torch.ones(2).double()),
    ]
    twins = [v.detach().clone() for v in variables]
    optimizer: Any = LossScaleOptimizer(support.build("adam", executor), initial_scale=4)
    plain, buffers = support.build("adam", executor), GradientBuffers(variables, executor)
    for step in range(3):
        whole: list[Tensor] = [torch.zeros(v.shape, dtype=F64 if v.dtype == F64 else F32) for v in variables]
        for micro in range(4):
            for i, v in enumerate(variables):
                if i != 2 and not (i == 1 and micro):
                    v.grad = torch.full_like(v, float(micro + step + i))
                    whole[i] += v.grad * 0.25
            buffers.add(weight=0.25 * 4)
            assert all(v.grad is None for v in variables)
        pairs = list(buffers)
        assert [g is None for g, _ in pairs] == [False, False, True, False]
        optimizer.apply_scaled_gradients(pairs)
        plain.apply_gradients([(g, t) for i, (g, t) in enumerate(zip(whole, twins, strict=True)) if i != 2])
        buffers.zero()
        assert all(g is None for g, _ in buffers)
        assert not any(b.any() for b in buffers.buffers)
    support.assert_same([support.bits(v) for v in variables], [support.bits(t) for t in twins])


def test_bad_input_adds_nothing() -> None:
    variables = [torch.ones(3), torch.ones(2)]
    buffers = GradientBuffers(variables)
    with pytest.raises(ValueError, match="for each of 2 variables"):
        buffers.add([torch.ones(3)])
    with pytest.raises(ValueError, match="shape"):
        buffers.add([torch.ones(3), torch.ones(3)])
    sparse = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (2,), check_invariants=True)
    with pytest.raises(TypeError, match="sparse"):
        buffers.add([torch.ones(3), sparse])
    assert not any(b.any() for b in buffers.buffers)
    assert all(g is None for g, _ in buffers)
    with pytest.raises(TypeError, match="floating"):
        GradientBuffers([torch.ones(3, dtype=torch.int64)])
    buffers.add([None, None])
    with pytest.raises(ValueError, match="No gradients provided"):
        fused_kopt.SGD().apply_gradients(buffers)
