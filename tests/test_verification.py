"""`fused_kopt.verify` and `verify_every`: what they see, what they refuse, what they leave alone."""

import math

import pytest
import support
import torch

import fused_kopt
from fused_kopt import StaleVariableError, TornStepError, verification

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("expected", "actual", "ulp", "absolute"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0, 0.0),
        ([1.0, NAN], [1.0, NAN], 0, 0.0),
        ([0.0], [-0.0], 0, 0.0),
        ([1.0], [1.0 + 2**-23], 1, 2**-23),
        ([-1.0, 4.0], [-1.0, 4.0 + 2**-20], 2, 2**-20),
        ([2**-149], [-(2**-149)], 2, 2**-148),
        ([3.4028234663852886e38], [INF], 1, 0.0),
        ([1.0], [NAN], 2**63 - 1, 0.0),
    ],
)
def test_comparison(expected: list[float], actual: list[float], ulp: int, absolute: float) -> None:
    found = verification.compare(3, "m", torch.tensor(expected), torch.tensor(actual))
    assert (found.variable, found.tensor, found.equal, found.max_ulp, found.max_abs) == (3, "m", ulp == 0, ulp, absolute)


def test_float64_distances_are_exact() -> None:
    found = verification.compare(0, "v", torch.tensor([1.7e308], dtype=torch.float64), torch.tensor([-1.7e308], dtype=torch.float64))
    assert found.max_ulp > 2**63


def sabotage(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    support.after_each(monkeypatch, lambda update: next(v for v in update.variables if v is not None).mul_(factor))


@pytest.mark.parametrize("factor", [1 + 2**-23, 2.0])
def test_one_bit_stops_an_exact_rule(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    variable = torch.ones(5)
    sabotage(monkeypatch, factor)
    optimizer = fused_kopt.Adam(executor="triton", verify_every=1)
    with pytest.raises(fused_kopt.FusedMismatchError, match="Nothing was written"):
        optimizer.apply_gradients([(torch.ones(5), variable)])
    assert torch.equal(variable, torch.ones(5))


def test_a_general_power_may_differ_in_last_bits_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        sabotage(patch, 1 + 2**-22)
        fused_kopt.Ftrl(learning_rate_power=-0.7, executor="triton", verify_every=1).apply_gradients([(torch.ones(5), torch.ones(5))])
    sabotage(monkeypatch, 1.01)
    with pytest.raises(fused_kopt.FusedMismatchError):
        fused_kopt.Ftrl(learning_rate_power=-0.7, executor="triton", verify_every=1).apply_gradients([(torch.ones(5), torch.ones(5))])


def test_verify_refuses_what_a_step_refuses() -> None:
    variable = torch.zeros(64)
    optimizer = fused_kopt.SGD(executor="triton")
    optimizer.apply_gradients([(torch.ones(64), variable)])
    optimizer._torn = True
    with pytest.raises(TornStepError):
        fused_kopt.verify(optimizer, [(torch.ones(64), variable)])
    optimizer._torn = False
    variable.data = torch.ones(2)
    with pytest.raises(StaleVariableError):
        fused_kopt.verify(optimizer, [(torch.ones(2), variable)])


@pytest.mark.parametrize("aggregated", [True, False])
def test_verify_aggregates_as_the_step_does(aggregated: bool) -> None:
    calls = []
    optimizer = fused_kopt.SGD(gradient_aggregator=lambda pairs: (calls.append(1), pairs)[1])
    report = fused_kopt.verify(optimizer, [(torch.ones(2), torch.ones(2))], experimental_aggregate_gradients=aggregated)
    assert report.equal
    assert len(calls) == aggregated
    assert optimizer.weights == []
