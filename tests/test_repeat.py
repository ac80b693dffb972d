"""Steps that repeat an earlier one's launches (`fused_kopt.repeat`): what may differ from it, and what must be looked at anew."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import support
import torch
from torch import Tensor, nn

from fused_kopt import TornStepError, verification
from fused_kopt.optimizer import Optimizer
from fused_kopt.repeats import KEPT

FUSED = ("compiled", "triton")
every_executor = pytest.mark.parametrize("executor", FUSED)
Scenario = Callable[[Optimizer], Sequence[Tensor]]


def repeats(optimizer: Optimizer) -> int:
    return len(optimizer._repeats._kept)


def same(executor: str, scenario: Scenario, rule: str = "adam", **options: Any) -> Optimizer:
    """A scenario, which returns its variables, ends in the same bits as on the reference, which repeats nothing."""
    states = []
    for name in ("reference", executor):
        optimizer = support.build(rule, name, **options)
        states.append(support.state(optimizer, scenario(optimizer)))
    support.assert_same(*states)
    return optimizer


def variables(*sizes: int) -> list[Tensor]:
    return [support.randn(n, seed=i) for i, n in enumerate(sizes)]


def gradients(like: Sequence[Tensor], step: int) -> list[Tensor]:
    return [support.randn(*v.shape, seed=100 * step + i) * (i + 1) for i, v in enumerate(like)]


def steps(optimizer: Optimizer, mine: Sequence[Tensor], count: int, first: int = 0) -> None:
    for step in range(first, first + count):
        optimizer.apply_gradients(list(zip(gradients(mine, step), mine, strict=True)))


@every_executor
def test_a_repeat_launches_once_per_bucket(executor: str) -> None:
    optimizer, mine = support.build("adam", executor), [*variables(3, 40), support.randn(5, dtype=torch.float64)]
    steps(optimizer, mine, 1)
    with support.launches(4):
        steps(optimizer, mine, 2, 1)
    assert repeats(optimizer) == 1


@every_executor
def test_another_tensor_at_the_same_address_is_another_variable(executor: str) -> None:
    def scenario(optimizer: Optimizer) -> Sequence[Tensor]:
        mine = variables(9)
        steps(optimizer, mine, 3)
        steps(optimizer, [mine[0].detach()], 2)
        steps(optimizer, mine, 2)
        return mine

    optimizer = same(executor, scenario)
    assert len(optimizer.weights) == 1 + 2 * 2


@every_executor
def test_variables_in_another_order(executor: str) -> None:
    def scenario(optimizer: Optimizer) -> Sequence[Tensor]:
        mine = variables(9, 9, 4)
        for step in range(6):
            steps(optimizer, mine if step % 2 else mine[::-1], 1, step)
        return mine

    same(executor, scenario, "momentum", clipnorm=1.5)


@every_executor
def test_factors_follow_their_variables(executor: str) -> None:
    """Pairs in an order that is not the slots', of several dtypes, each clipped by a norm of its own; then a part of them."""

    def scenario(optimizer: Optimizer) -> Sequence[Tensor]:
        mine = [support.randn(n, seed=n, dtype=d) for d in support.DTYPES for n in (3, 20, 9)]
        optimizer.build(mine)
        given = [*mine[::2], *mine[::-2]]
        for step in range(4):
            found = gradients(given, step)
            pairs = [(g.to(support.DTYPES[i % 3 + 1]) if i % 2 else g, v) for i, (g, v) in enumerate(zip(found, given, strict=True))]
            optimizer.apply_gradients(pairs)
        steps(optimizer, given[1:4], 3)
        return mine

    optimizer = same(executor, scenario, "momentum", clipnorm=2.5)
    assert repeats(optimizer) == 2


@every_executor
def test_limits_come_go_and_change(executor: str) -> None:
    def scenario(optimizer: Optimizer) -> Sequence[Tensor]:
        mine = variables(30, 7)
        for step, (clip, limit) in enumerate((("clipvalue", 0.5), ("clipvalue", 0.25), ("clipvalue", None), ("clipnorm", 1.0)) * 2):
            setattr(optimizer, clip, limit)
            steps(optimizer, mine, 2, 2 * step)
            if clip == "clipnorm":
                optimizer.clipnorm = None
        optimizer.grad_scale = 0.5
        steps(optimizer, mine, 2, 20)
        return mine

    same(executor, scenario, "momentum")


@every_executor
def test_the_rule_may_change(executor: str) -> None:
    def scenario(optimizer: Any) -> Sequence[Tensor]:
        mine = variables(30, 7)
        for nesterov in (False, True, False):
            optimizer.nesterov = nesterov
            steps(optimizer, mine, 2)
        return mine

    same(executor, scenario, "momentum")


@every_executor
def test_the_executor_may_change(executor: str) -> None:
    optimizer, mine = support.build("adam", executor), variables(8)
    steps(optimizer, mine, 2)
    for name, launched in (("reference", 0), (executor, 2), ("triton" if executor == "compiled" else "compiled", 2)):
        optimizer.executor = name
        with support.launches(launched):
            steps(optimizer, mine, 2)


@every_executor
def test_a_variable_given_twice(executor: str) -> None:
    def scenario(optimizer: Optimizer) -> Sequence[Tensor]:
        a, b = variables(9, 4)
        steps(optimizer, [a, b, a], 4)
        for _ in range(3):
            optimizer.apply_gradients([(a / 2, a)] * 2)  # the same gradient too
        return [a, b]

    same(executor, scenario)


@every_executor
def test_what_runs_on_copies_is_copied_in_every_step(executor: str) -> None:
    """A variable with gaps, and a gradient laid out otherwise than its variable, at the same addresses."""

    def scenario(optimizer: Optimizer) -> Sequence[Tensor]:
        gaps, dense = support.randn(4, 12, seed=1)[:, ::2], support.randn(6, 4, seed=2)
        first, second = torch.zeros(4, 6), torch.zeros(4, 6).t()
        for step in range(5):
            first.copy_(support.randn(4, 6, seed=step))
            second.copy_(support.randn(6, 4, seed=50 + step))
            optimizer.apply_gradients([(first, gaps)] if step % 2 else [(second, dense)])
            optimizer.apply_gradients([(second, dense)])
        return [gaps, dense]

    same(executor, scenario)


@every_executor
def test_gradients_of_other_kinds(executor: str) -> None:
    """Same variables and shapes; another dtype, layout, sign or graph."""

    def scenario(optimizer: Optimizer) -> Sequence[Tensor]:
        mine = [support.randn(6, 6)]
        kinds: list[Callable[[Tensor], Any]] = [
            lambda g: g,
            lambda g: g.t(),
            lambda g: g.double(),
            lambda g: g.bfloat16(),
            torch._neg_view,
            lambda g: g.requires_grad_(),
            lambda g: g.clone().to_sparse(1),
            lambda g: g.numpy(),
            lambda g: g.tolist(),
        ]
        for step, kind in enumerate([kind for other in kinds for kind in (other, kinds[0], other, other)]):
            optimizer.apply_gradients([(kind(support.randn(6, 6, seed=step)), mine[0])])
        return mine

    same(executor, scenario)


@every_executor
def test_a_gradient_whose_storage_was_freed(executor: str) -> None:
    optimizer, mine = support.build("sgd", executor), variables(8)
    steps(optimizer, mine, 2)
    before, gradient = support.state(optimizer, mine), torch.ones(8)
    gradient.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="outgrows its storage"):
        optimizer.apply_gradients([(gradient, mine[0])])
    support.assert_same(support.state(optimizer, mine), before)


@every_executor
@pytest.mark.xfail(strict=True, reason="a repeat does not look at storages: it reads beyond one that was cut")
def test_a_gradient_whose_storage_was_cut(executor: str) -> None:
    optimizer, mine = support.build("sgd", executor), variables(8)
    steps(optimizer, mine, 2)
    gradient = torch.ones(8)
    gradient.untyped_storage().resize_(16)
    with pytest.raises(ValueError, match="outgrows its storage"):
        optimizer.apply_gradients([(gradient, mine[0])])


def test_no_more_than_a_few_are_kept() -> None:
    optimizer, mine = support.build("sgd", "compiled"), variables(*range(1, 11))
    for i in range(10):
        steps(optimizer, mine[: i + 1], 2)
    assert repeats(optimizer) == KEPT


@every_executor
def test_transformers_aggregators_and_verification_in_every_step(executor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(verification, "check", lambda *arguments: calls.append("verified"))
    optimizer, mine = support.build("sgd", executor, verify_every=2, gradient_aggregator=lambda p: calls.append("sum") or p), variables(4)
    steps(optimizer, mine, 4)
    assert calls == ["sum", "sum", "verified"] * 2
    calls.clear()
    optimizer = support.build("sgd", executor, verify_every=2)
    steps(optimizer, mine, 4)
    assert calls == ["verified"] * 2
    optimizer.gradient_transformers = [lambda pairs: calls.append("transformed") or pairs]
    steps(optimizer, mine, 1)
    assert calls == ["verified"] * 2 + ["transformed"]


@every_executor
def test_an_interrupted_repeat_is_a_torn_step(executor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(update: Any) -> None:
        if armed:
            raise KeyboardInterrupt

    armed: list[int] = []
    support.after_each(monkeypatch, interrupted)
    optimizer, mine = support.build("sgd", executor), [nn.Parameter(v) for v in variables(4, 3)]
    steps(optimizer, mine, 3)
    armed.append(1)
    with pytest.raises(KeyboardInterrupt):
        steps(optimizer, mine, 1)
    armed.clear()
    with pytest.raises(TornStepError):
        steps(optimizer, mine, 1)
