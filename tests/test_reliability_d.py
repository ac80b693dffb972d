"""Catalogue D: a step happens or does not, whatever goes wrong at whatever point of it."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support import EXECUTORS, assert_same, build, randn, state
from torch import Tensor

import fused_kopt
from fused_kopt import TornStepError, execute, reference
from fused_kopt.optimizer import Optimizer

DTYPES = (torch.float32, torch.bfloat16, torch.float64)  # three buckets
BAD: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda v: torch.ones(2, 2),
    "integers": lambda v: torch.ones(v.shape, dtype=torch.int64),
    "no storage": lambda v: torch.ones(v.shape, device="meta"),
    "text": lambda v: "gradient",
    "csr": lambda v: torch.ones(1, 1).to_sparse_csr(),
}


def fresh(rule: str, executor: str, built: bool) -> tuple[Optimizer, list[Tensor]]:
    optimizer, variables = build(rule, executor), [randn(5, seed=i, dtype=d) for i, d in enumerate(DTYPES)]
    if built:
        optimizer.apply_gradients(pairs_of(variables, 1))
    return optimizer, variables


def pairs_of(variables: list[Tensor], step: int) -> list[tuple[Any, Tensor]]:
    return [(randn(5, seed=10 * step + i), v) for i, v in enumerate(variables)]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("fault", BAD)
def test_D1_a_bad_gradient_at_any_position_changes_nothing(fault: str, built: bool, executor: str) -> None:
    for position in range(3):
        optimizer, variables = fresh("amsgrad", executor, built)
        before = state(optimizer, variables)
        pairs = pairs_of(variables, 2)
        pairs[position] = (BAD[fault](variables[position]), variables[position])
        with pytest.raises((TypeError, ValueError), match=f"variable {position}"):
            optimizer.apply_gradients(pairs)
        assert_same(state(optimizer, variables), before, position)
        assert built or optimizer.weights == []


class Failing:
    """torch.full, out of memory at one call."""

    def __init__(self) -> None:
        self.full, self.calls, self.fail_at = torch.full, 0, 0

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        self.calls += 1
        if self.calls == self.fail_at:
            raise torch.OutOfMemoryError("out of memory")
        return self.full(*arguments, **options)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("rule", ["amsgrad", "nadam", "ftrl"])
def test_D2_a_failed_allocation_leaves_nothing_half_built(rule: str, executor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, variables = fresh(rule, executor, built=False)
    failing = Failing()
    monkeypatch.setattr(torch, "full", failing)
    late = [*variables, torch.ones(7)]
    for wanted in (variables, late):
        before, failing.fail_at = state(optimizer, late), 0
        for _ in range(20):
            failing.calls, failing.fail_at = 0, failing.fail_at + 1
            try:
                optimizer.apply_gradients([(torch.ones(v.shape), v) for v in wanted])
                break
            except torch.OutOfMemoryError:
                assert_same(state(optimizer, late), before)
        assert 2 < failing.fail_at < 20
    monkeypatch.undo()
    expected, copies = fresh(rule, "reference", built=False)
    copies.append(torch.ones(7))
    for wanted in (copies[:3], copies):
        expected.apply_gradients([(torch.ones(v.shape), v) for v in wanted])
    assert_same(state(optimizer, late), state(expected, copies))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
@pytest.mark.parametrize("position", range(3))
def test_D3_D4_an_interruption_between_launches_is_remembered(
    position: int, error: type[BaseException], executor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, variables = fresh("amsgrad", executor, built=True)
    weights, copies = optimizer.get_weights(), [v.clone() for v in variables]
    runs = 0

    def interrupted(run: Any) -> Any:
        def counted(*arguments: Any) -> None:
            nonlocal runs
            runs += 1
            if runs == position + 1:
                raise error("interrupted")
            run(*arguments)

        return counted

    bind = execute.bind
    monkeypatch.setattr(reference, "run", interrupted(reference.run))
    monkeypatch.setattr(execute, "bind", lambda *arguments: interrupted(bind(*arguments)))
    with pytest.raises(error, match="interrupted"):
        optimizer.apply_gradients(pairs_of(variables, 2))
    monkeypatch.undo()
    moved = [not torch.equal(v, c) for v, c in zip(variables, copies, strict=True)]
    assert moved == [i < position for i in range(3)]
    for _ in range(2):
        with pytest.raises(TornStepError, match=r"interrupted between launches.*then call set_weights\(\)"):
            optimizer.apply_gradients(pairs_of(variables, 2))
    for v, c in zip(variables, copies, strict=True):
        v.copy_(c)
    optimizer.set_weights(weights)
    optimizer.apply_gradients(pairs_of(variables, 2))
    expected, others = fresh("amsgrad", "reference", built=True)
    expected.apply_gradients(pairs_of(others, 2))
    assert_same(state(optimizer, variables), state(expected, others))


@contextmanager
def interrupt(line: int) -> Iterator[list[int]]:
    """Raise KeyboardInterrupt at the n-th line that the package executes, as Ctrl-C does; yields how many lines there were."""
    package, count = str(Path(fused_kopt.__file__).parent), [0]

    def trace(frame: Any, event: str, argument: Any) -> Any:
        # the lines that begin and end a step are the interpreter's own bookkeeping, too short to protect
        if not frame.f_code.co_filename.startswith(package) or frame.f_code.co_name == "_one_step":
            return None
        if event == "line":
            count[0] += 1
            if count[0] == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


def at_stage(stage: str) -> tuple[Optimizer, list[Tensor]]:
    """Before its first step, before a step with new variables in the same buckets, or built."""
    optimizer, variables = fresh("nadam", "reference", stage != "new")
    return optimizer, variables + ([randn(5, seed=i, dtype=d) for i, d in enumerate(DTYPES)] if stage == "growing" else [])


@pytest.mark.parametrize("stage", ["new", "growing", "built"])
def test_D3_an_interruption_at_any_line_leaves_a_whole_or_a_torn_step(stage: str, slow: bool) -> None:
    optimizer, variables = at_stage(stage)
    with interrupt(0) as count:
        optimizer.apply_gradients(pairs_of(variables, 2))
    expected, steps, outcomes = state(optimizer, variables), int(optimizer.iterations), set()
    lines = range(1, count[0] + 1)
    for line in lines if slow else random.Random(0).sample(lines, 400):
        optimizer, variables = at_stage(stage)
        before = state(optimizer, variables)
        with pytest.raises(KeyboardInterrupt), interrupt(line):
            optimizer.apply_gradients(pairs_of(variables, 2))
        if optimizer._torn:
            outcomes.add("torn")
            continue
        count_now = optimizer._state.iterations
        whole = count_now is not None and int(count_now) == steps
        outcomes.add("whole" if whole else "not begun")
        if not whole:
            assert_same(state(optimizer, variables)[: len(before)], before, line)
            optimizer.apply_gradients(pairs_of(variables, 2))
        assert_same(state(optimizer, variables), expected, line)
    assert outcomes >= {"torn", "not begun"}


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_D9_D10_a_step_inside_a_graph_capture_is_refused(executor: str, built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, variables = fresh("adam", executor, built)
    before = state(optimizer, variables)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"would replay this step's scalars for ever\. Call prepare_replays\(\) first"):
        optimizer.apply_gradients(pairs_of(variables, 2))
    monkeypatch.undo()
    assert_same(state(optimizer, variables), before)
    optimizer.apply_gradients(pairs_of(variables, 2))
