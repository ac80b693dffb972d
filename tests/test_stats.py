"""`stats_every` and `last_stats()`: which steps are measured, what the numbers mean, and that nothing else changes."""

import contextlib
import copy
import math
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import support
import torch
from support import randn
from torch import Tensor

import fused_kopt
from fused_kopt import SGD, Adam, execute, optimizers, verification
from fused_kopt.borrowed import NO_CLIPS, Borrowed, Borrower
from fused_kopt.clipping import Clips
from fused_kopt.optimizers.adam import Scalars, adam
from fused_kopt.optimizers.schedules import ExponentialDecay
from fused_kopt.recording import Recorder, StepStats, Sums

EXECUTORS = ("reference", "triton", "compiled")
each_executor = pytest.mark.parametrize("executor", EXECUTORS)


def norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float((t.double().numpy() ** 2).sum()) for t in tensors))


def last(optimizer: Any) -> StepStats:
    stats: StepStats | None = optimizer.last_stats()
    assert stats is not None
    return stats


def check(stats: StepStats, gradients: Sequence[Tensor], before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    step = [b.double() - a.double() for a, b in zip(before, after, strict=True)]
    expected = {"gradient_norm": norm(gradients), "update_norm": norm(step), "weight_norm": norm(after)}
    # another order of float64 additions
    assert {name: stats[name] for name in expected} == pytest.approx(expected, rel=1e-12)  # type: ignore[literal-required]
    assert stats["update_ratio"] == stats["update_norm"] / stats["weight_norm"]


def world(seed: int = 0) -> list[Tensor]:
    """Three buckets."""
    return [
        randn(70_000, seed=seed),
        randn(3, 5, seed=seed + 1),
        randn(40, seed=seed + 2).bfloat16(),
        randn(8, seed=3, dtype=torch.float64),
    ]


@each_executor
@pytest.mark.parametrize("rule", ["adam", "ftrl", "momentum"])
def test_numbers_and_bits(rule: str, executor: str) -> None:
    """The first step takes the long way, later ones are repeated; every second one is measured."""
    measured, plain = support.build(rule, executor, stats_every=2), support.build(rule, executor)
    variables, twins = world(), world()
    for step in range(1, 7):
        gradients, before = world(10 * step), [v.clone() for v in variables]
        launches = fused_kopt.stats().launches
        measured.apply_gradients(list(zip(gradients, variables, strict=True)))
        if step > 2:  # the kernels are proven
            assert fused_kopt.stats().launches - launches == (0 if executor == "reference" else 3)
        plain.apply_gradients(list(zip(gradients, twins, strict=True)))
        support.assert_same(support.state(measured, variables), support.state(plain, twins))
        if step % 2:
            assert (measured.last_stats() is None) == (step == 1)
        else:
            stats = last(measured)
            check(stats, gradients, before, variables)
            assert stats["iterations"] == step
            assert stats["skipped_steps"] == 0
            assert stats["learning_rate"] == np.float32(0.001 if rule != "momentum" else 0.01)


@each_executor
def test_the_gradient_norm_is_that_before_clipping(executor: str) -> None:
    for clips in ({"clipvalue": 0.1}, {"clipnorm": 0.5}, {"global_clipnorm": 0.5}):
        optimizer = SGD(1.0, executor=executor, stats_every=1, **clips)
        optimizer.grad_scale = 0.5
        for step in range(3):
            variables, gradients = world(), world(step + 1)
            before = [v.clone() for v in variables]
            optimizer.apply_gradients(list(zip(gradients, variables, strict=True)))
            check(last(optimizer), [g * 0.5 for g in gradients], before, variables)
        if "global_clipnorm" in clips:
            assert last(optimizer)["update_norm"] == pytest.approx(0.5, rel=1e-3)  # bfloat16 variables are among them


SPARSE = ("sgd", "momentum", "rmsprop", "adam", "adagrad", "ftrl", "lion")


@each_executor
@pytest.mark.parametrize("rule", SPARSE)
def test_of_sparse_gradients_the_rows_that_move_count(rule: str, executor: str) -> None:
    optimizer = support.build(rule, executor, stats_every=1, clipnorm=0.5)
    optimizer.grad_scale = 0.5
    variable, dense = randn(6, 4), randn(5)
    for step in range(2):
        values, gradient = randn(3, 4, seed=step), randn(5, seed=9 + step)
        sparse = torch.sparse_coo_tensor(torch.tensor([[4, 1, 4]]), values, (6, 4), check_invariants=True)
        before = [variable.clone(), dense.clone()]
        optimizer.apply_gradients([(sparse, variable), (gradient, dense)])
        rows = slice(None) if optimizer.sparse_rows == "all" else [1, 4]
        check(last(optimizer), [values * 0.5, gradient * 0.5], [before[0][rows], before[1]], [variable[rows], dense])


def test_every_kind_of_sparse_step_is_among_them() -> None:
    assert {support.build(rule).sparse_rows for rule in SPARSE} == {support.build(rule).sparse_rows for rule in support.RULES}


@each_executor
def test_what_has_no_gradient_does_not_count(executor: str) -> None:
    optimizer, variables = Adam(executor=executor, stats_every=1), [randn(7), randn(9)]
    optimizer.build(variables)
    for _ in range(2):
        optimizer.apply_gradients([(variables[1].clone(), variables[1])])
    optimizer.apply_gradients([])
    assert last(optimizer)["weight_norm"] == pytest.approx(norm(variables[1:]), rel=1e-12)


@each_executor
def test_gaps_of_a_flat_do_not_count(executor: str) -> None:
    """With an epsilon that is 0 in float32 they are 0 / 0."""
    variables = [torch.nn.Parameter(randn(5)), torch.nn.Parameter(randn(3))]
    optimizer = optimizers.Adagrad(0.1, initial_accumulator_value=0.0, epsilon=1e-50, executor=executor, stats_every=2)
    with optimizer.flatten(variables) as flat:
        for step in range(6):
            for v in variables:
                assert v.grad is not None
                v.grad.copy_(randn(*v.shape, seed=step))
            before = [v.detach().clone() for v in variables]
            optimizer.apply_gradients(flat)
        check(last(optimizer), [v.grad for v in variables if v.grad is not None], before, [v.detach() for v in variables])


def test_the_learning_rate_is_asked_for_once_and_is_the_one_used() -> None:
    calls = []

    def rate() -> float:
        calls.append(1)
        return 0.5

    optimizer, variable = SGD(rate, stats_every=1), torch.ones(1)
    optimizer.apply_gradients([(torch.ones(1), variable)])
    assert len(calls) == 1
    assert last(optimizer)["learning_rate"] == last(optimizer)["update_norm"] == 0.5
    decayed = SGD(ExponentialDecay(0.5, 1, 0.5), decay=1.0, stats_every=1)
    for expected in (0.5, 0.125):
        decayed.apply_gradients([(torch.ones(1), variable)])
        assert last(decayed)["learning_rate"] == last(decayed)["update_norm"] == expected


@each_executor
def test_a_ratio_of_nothing(executor: str) -> None:
    optimizer, variable = SGD(1.0, executor=executor, stats_every=1), torch.zeros(3)
    optimizer.apply_gradients([(torch.zeros(3), variable)])
    assert last(optimizer)["update_ratio"] == 0.0
    variable.fill_(1.0)
    optimizer.apply_gradients([(torch.ones(3), variable)])
    assert last(optimizer)["update_ratio"] == math.inf
    optimizer.apply_gradients([(torch.full((3,), math.nan), variable)])
    assert math.isnan(last(optimizer)["gradient_norm"])


def test_who_asks_and_when() -> None:
    optimizer, variable = SGD(), torch.ones(2)
    optimizer.apply_gradients([(torch.ones(2), variable)])
    with pytest.raises(RuntimeError, match="stats_every=1"):
        optimizer.last_stats()
    optimizer.stats_every = 2
    assert optimizer.last_stats() is None
    optimizer.apply_gradients([(torch.ones(2), variable)])
    assert last(optimizer)["iterations"] == 2
    optimizer.stats_every = 0
    optimizer.apply_gradients([(torch.ones(2), variable)])
    assert last(optimizer)["iterations"] == 2
    for value in (-1, 1.5, "1"):
        with pytest.raises(ValueError, match=r"`stats_every` must be an int >= 0 \(0: never\). Received"):
            SGD(stats_every=value)
        with pytest.raises(ValueError, match="`stats_every` must be"):
            optimizer.stats_every = value  # type: ignore[assignment]
        with pytest.raises(ValueError, match="`stats_every` must be"):
            Recorder(value)  # type: ignore[arg-type]


def test_copies_measure_on() -> None:
    optimizer, variable = Adam(stats_every=1), torch.ones(2)
    optimizer.apply_gradients([(torch.ones(2), variable)])
    assert "stats_every" not in optimizer.get_config()
    twin, twins_variable = pickle.loads(pickle.dumps((optimizer, variable)))
    other, others_variable = copy.deepcopy((optimizer, variable))
    for o, v in ((optimizer, variable), (twin, twins_variable), (other, others_variable)):
        assert (o.last_stats() is None) == (o is not optimizer)
        o.apply_gradients([(torch.ones(2), v)])
    assert last(optimizer) == last(twin) == last(other)


@pytest.mark.parametrize("flattened", [False, True])
def test_steps_of_a_graph_are_not_measured(flattened: bool) -> None:
    """They take the prepared launches, which for a Flat are not those of a measured step."""
    optimizer, variable = SGD(executor="triton", stats_every=1), torch.nn.Parameter(torch.ones(2))
    variable.grad = torch.ones(2)
    pairs: Any = optimizer.flatten([variable]) if flattened else [(variable.grad, variable)]
    for _ in range(2):
        optimizer.apply_gradients(pairs)
    optimizer.stats_every = 3
    optimizer.prepare_replays(pairs, steps=10)
    optimizer.apply_gradients(pairs)
    assert optimizer._replays is not None
    assert (int(optimizer.iterations), last(optimizer)["iterations"], optimizer._replays.left) == (3, 2, 9)


def test_a_step_that_is_not_measured_changes_no_numbers() -> None:
    """Repeats of the step that was."""
    optimizer, variable = SGD(executor="compiled", stats_every=1), torch.ones(2)
    optimizer.apply_gradients([(torch.ones(2), variable)])
    before = last(optimizer)
    optimizer.stats_every = 0
    for _ in range(2):
        optimizer.apply_gradients([(torch.ones(2), variable)])
    assert last(optimizer) == before


def test_an_unusable_measured_kernel_leaves_the_step_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` and a kernel that fails its proof: repeated steps too."""
    honest = verification._known_answer
    monkeypatch.setattr(verification, "_known_answer", lambda rule, key, *more: "it is bad" if key[-1] else honest(rule, key, *more))
    execute.warn_fallback.cache_clear()
    optimizer, variables, twins = Adam(stats_every=3), world(), world()
    plain = Adam(executor="reference")
    for step in range(1, 5):
        told = pytest.warns(RuntimeWarning, match="it is bad") if step == 3 else contextlib.nullcontext()
        launches = fused_kopt.stats().launches
        with told:
            optimizer.apply_gradients(list(zip(world(step), variables, strict=True)))
        if step > 1:  # the plain kernels are proven
            assert fused_kopt.stats().launches - launches == (0 if step == 3 else 3)
        plain.apply_gradients(list(zip(world(step), twins, strict=True)))
    assert last(optimizer)["weight_norm"] > 0
    support.assert_same(support.state(optimizer, variables), support.state(plain, twins))
    named = Adam(stats_every=2, executor="compiled")
    named.apply_gradients([(torch.ones(3), torch.ones(3))])
    with pytest.raises(RuntimeError, match="it is bad"):
        named.apply_gradients([(torch.ones(3), torch.ones(3))])


@each_executor
@pytest.mark.parametrize("clips", [NO_CLIPS, Clips(0.5, 0.4, None, 1.0)], ids=["plain", "clipped"])
def test_borrowed_steps(executor: Any, clips: Clips) -> None:
    """Two calls make one step, as groups do; slots are replaced in between."""
    variables, twins = ([randn(70_000), randn(5), randn(3).bfloat16()] for _ in range(2))
    slots, others = ([[torch.zeros(v.shape) for v in variables] for _ in range(2)] for _ in range(2))
    numbers, recorder = Scalars(*(float(np.float32(0.3 + i / 64)) for i in range(len(Scalars._fields)))), Recorder(2)
    measured, plain = Borrower(executor), Borrower(executor)
    for step in range(1, 6):
        gradients, before = [randn(*v.shape, seed=step).to(v.dtype) for v in variables], [v.clone() for v in variables]
        sums = recorder.start(step)
        assert (sums is None) == bool(step % 2)
        for part in (slice(0, 1), slice(1, 3)):
            given = Borrowed(variables[part], gradients[part], [column[part] for column in slots])
            measured.step(adam, given, lambda _: [numbers], clips, sums=sums)
            given = Borrowed(twins[part], gradients[part], [column[part] for column in others])
            plain.step(adam, given, lambda _: [numbers], clips)
        recorder.finish(sums, 0.3, step)
        support.assert_same(*([support.bits(t) for t in (*v, *s[0], *s[1])] for v, s in ((variables, slots), (twins, others))))
        if step % 2 == 0:
            stats = recorder.last()
            assert stats is not None
            check(stats, [g * clips.grad_scale for g in gradients], before, variables)
            assert (stats["learning_rate"], stats["iterations"]) == (0.3, step)
        if step == 2:
            slots[1][0] = slots[1][0].clone()


def test_skipped_steps_are_counted_by_those_who_skip() -> None:
    recorder, sums = Recorder(1), Sums()
    sums.on(torch.device("cpu")).fill_(4.0)
    recorder.finish(sums, 0.1, 1)
    recorder.skipped += 2
    assert recorder.last() == StepStats(
        gradient_norm=2.0, update_norm=2.0, weight_norm=2.0, update_ratio=1.0, skipped_steps=2, learning_rate=0.1, iterations=1
    )
    assert pickle.loads(pickle.dumps(recorder)).skipped == 2


class Event:
    """Stands for a torch.cuda.Event: the numbers arrive when it is waited for."""

    def __init__(self, host: Tensor) -> None:
        self.host = host

    def synchronize(self) -> None:
        self.host.copy_(torch.tensor([9.0, 1.0, 4.0]))


def test_numbers_under_way_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    host, recorder = torch.zeros(3, dtype=torch.float64), Recorder(1)
    monkeypatch.setattr(Sums, "fetched", lambda self: [(host, Event(host)), (torch.tensor([16.0, 0.0, 0.0]), None)])
    recorder.finish(Sums(), 0.1, 1)
    assert float(host.sum()) == 0.0
    stats = recorder.last()
    assert stats is not None
    assert (stats["gradient_norm"], stats["update_norm"], stats["weight_norm"]) == (5.0, 1.0, 2.0)


@pytest.mark.gpu
def test_no_step_waits_for_the_device() -> None:
    variables = [v.cuda() for v in world()]
    gradients = [torch.ones_like(v) for v in variables]
    optimizer = Adam(stats_every=2, global_clipnorm=1.0)
    pairs = list(zip(gradients, variables, strict=True))
    for _ in range(2):
        optimizer.apply_gradients(pairs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            before = [v.clone() for v in variables]
            optimizer.apply_gradients(pairs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check(last(optimizer), [g.cpu() for g in gradients], [v.cpu() for v in before], [v.cpu() for v in variables])


@pytest.mark.parametrize("rule", support.RULES)
def test_every_optimizer_can_be_measured(rule: str) -> None:
    optimizer, variable = support.build(rule, stats_every=1), torch.ones(3)
    optimizer.apply_gradients([(torch.ones(3), variable)])
    check(last(optimizer), [torch.ones(3)], [torch.ones(3)], [variable])
    assert last(optimizer)["learning_rate"] == float(optimizer.learning_rate)
