"""`ema_momentum`: the average of the variables as a slot that the same launch keeps."""

import copy
from typing import Any

import numpy as np
import pytest
import support
import torch
from support import randn
from torch import Tensor

import fused_kopt
from fused_kopt import optimizers
from fused_kopt.mixed_precision import LossScaleOptimizer

SHAPES = [(3, 5), (), (130,)]
M = 0.75


def train(rule: str, executor: str, precision: str = "float32", **options: Any) -> tuple[Any, list[Tensor], list[list[Tensor]]]:
    """The optimizer, the variables, and what they stood for before the first step and after each."""
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    optimizer = support.build(rule, executor, precision=precision, **options)
    variables = [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(SHAPES)]
    past = [[v.clone().float() for v in variables]]
    for step in range(5):
        optimizer.apply_gradients([(randn(*v.shape, seed=10 * step + i, dtype=dtype), v) for i, v in enumerate(variables)])
        past.append([optimizer.get_master(v).clone().float() for v in variables])
    return optimizer, variables, past


def averaged(past: list[Tensor]) -> Tensor:
    """In float32, an operation at a time: the start is a copy."""
    average, *later = past
    for value in later:
        average = average * M + value * (1 - M)
    return average


@pytest.mark.parametrize("executor", ["reference", "compiled", "triton"])
@pytest.mark.parametrize("rule", ["sgd", "adam", "nadam", "ftrl", "lion"])
def test_the_average_of_what_every_step_left(rule: str, executor: str) -> None:
    optimizer, variables, past = train(rule, executor, ema_momentum=M)
    for i, variable in enumerate(variables):
        assert torch.equal(optimizer.get_slot(variable, "average"), averaged([values[i] for values in past]))
    plain, others, _ = train(rule, executor)
    support.assert_same(list(map(support.bits, variables)), list(map(support.bits, others)))
    assert len(optimizer.weights) == len(plain.weights) + len(SHAPES)  # the last ones
    support.assert_same(list(map(support.bits, optimizer.weights[: len(plain.weights)])), list(map(support.bits, plain.weights)))


@pytest.mark.parametrize("precision", ["bf16_split", "bf16_8bit"])
def test_under_a_policy_it_averages_the_master_in_float32(precision: str) -> None:
    for executor in ("reference", "compiled"):
        optimizer, variables, past = train("adam", executor, precision, ema_momentum=M)
        for i, variable in enumerate(variables):
            average = optimizer.get_slot(variable, "average")
            assert average.dtype == torch.float32
            # int8 remainders round what comes back: past has the rounded values
            bound = 0 if precision == "bf16_split" else 2.0**-15 * past[-1][i].abs().max()
            assert (average - averaged([values[i] for values in past])).abs().max() <= bound


def test_a_variable_that_comes_later_starts_from_itself() -> None:
    optimizer, first, second = fused_kopt.SGD(0.5, ema_momentum=M), torch.ones(3), torch.full((2,), 4.0)
    optimizer.apply_gradients([(torch.ones(3), first)])
    optimizer.apply_gradients([(torch.ones(3), first), (torch.ones(2), second)])
    assert optimizer.get_slot(second, "average").tolist() == [4.0 * M + 3.5 * (1 - M)] * 2
    optimizer.finalize_variable_values([first, second])
    assert second.tolist() == [4.0 * M + 3.5 * (1 - M)] * 2
    assert torch.equal(first, optimizer.get_slot(first, "average"))


def test_a_skipped_step_averages_nothing() -> None:
    optimizer, variable = LossScaleOptimizer(fused_kopt.SGD(0.5, ema_momentum=M)), torch.ones(3)
    optimizer.apply_scaled_gradients([(torch.full((3,), 2.0**15), variable)])
    before = optimizer.get_slot(variable, "average").clone()
    optimizer.apply_scaled_gradients([(torch.tensor([1.0, torch.inf, 0.0]), variable)])
    assert torch.equal(optimizer.get_slot(variable, "average"), before)


def test_configuration_and_copies() -> None:
    optimizer, variable = fused_kopt.Adam(ema_momentum=M), torch.ones(3)
    assert "ema_momentum" not in fused_kopt.Adam().get_config()
    twin = optimizers.deserialize(optimizers.serialize(optimizer))
    assert twin.ema_momentum == M
    optimizer.apply_gradients([(torch.ones(3), variable)])
    memo: dict[int, Any] = {}
    other, same = copy.deepcopy((optimizer, variable), memo)
    other.apply_gradients([(torch.ones(3), same)])
    optimizer.apply_gradients([(torch.ones(3), variable)])
    assert torch.equal(other.get_slot(same, "average"), optimizer.get_slot(variable, "average"))
    twin.build([variable])
    twin.set_weights(optimizer.get_weights())
    assert np.array_equal(twin.get_weights()[-1], optimizer.get_weights()[-1])


def test_wrong_calls() -> None:
    for wrong in (1.5, -0.1, "0.9", float("nan")):
        with pytest.raises(ValueError, match="ema_momentum"):
            fused_kopt.Adam(ema_momentum=wrong)
    with pytest.raises(ValueError, match="There are no averages"):
        fused_kopt.Adam().finalize_variable_values([])
    optimizer, variable = fused_kopt.Adam(ema_momentum=M), torch.ones(3, 2)
    with pytest.raises(KeyError, match="No slot 'average'"):
        optimizer.finalize_variable_values([variable])
    sparse = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1, 2), (3, 2), check_invariants=True)
    with pytest.raises(TypeError, match="an average moves all rows"):
        optimizer.apply_gradients([(sparse, variable)])
    assert torch.equal(variable, torch.ones(3, 2))
