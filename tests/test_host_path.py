"""What a step costs on the host, and that it allocates, compiles and uploads nothing that an earlier one did not. No GPU needed."""

import contextlib
import gc
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import support
import torch
from test_reliability_d2 import Driver, forget
from torch import nn
from triton.runtime import driver

import fused_kopt
from fused_kopt.kernels import launch

# Seconds of this thread, at most 8 times what an idle machine of 2.4 GHz took: other tests share the cores.
STEP, PER_TENSOR, FLAT_PER_TENSOR = 60e-6, 0.6e-6, 0.25e-6
SLACK = 8


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Driver]:
    """Tensors on the CPU take the path of a GPU, up to a driver that launches nothing."""
    fake = Driver()
    monkeypatch.setattr(driver, "_active", fake)
    monkeypatch.setattr(launch, "interprets", lambda device: False)
    monkeypatch.setattr("fused_kopt.verification.proven", lambda update, executor, requested: executor)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    forget()
    yield fake
    forget()


def median(call: Callable[[], object], count: int = 50) -> float:
    seconds = []
    for _ in range(count):
        start = time.thread_time()
        call()
        seconds.append(time.thread_time() - start)
    return sorted(seconds)[count // 2]


def trained(count: int) -> tuple[Any, list[nn.Parameter]]:
    variables = [nn.Parameter(torch.ones(16)) for _ in range(count)]
    for v in variables:
        v.grad = torch.ones(16)
    return fused_kopt.Adam(executor="triton"), variables


@pytest.mark.parametrize("count", [1, 1000])
def test_borrowed(count: int, stub: Driver) -> None:
    optimizer, variables = trained(count)

    def step() -> None:
        optimizer.apply_gradients(zip([v.grad for v in variables], variables, strict=True))

    step()
    assert median(step) < SLACK * (STEP + PER_TENSOR * count)
    assert len(stub.grids) == 51
    assert len(stub.kernels) == 1


@pytest.mark.parametrize("count", [1, 1000])
def test_flattened(count: int, stub: Driver) -> None:
    optimizer, variables = trained(count)
    flat = optimizer.flatten(variables)

    def step() -> None:
        optimizer.apply_gradients(flat)

    step()
    assert median(step) < SLACK * (STEP + FLAT_PER_TENSOR * count)
    assert set(stub.grids[1:]) == {(-(-64 * count // 1024), 1, 1)}  # whole blocks, not one for every variable, which takes 64 elements


def test_a_variable_that_never_has_a_gradient(caplog: pytest.LogCaptureFixture) -> None:
    """Keras warns at every step; the launches are repeated all the same."""
    optimizer, variables = fused_kopt.Adam(executor="compiled"), [torch.ones(3) for _ in range(3)]
    pairs = [(torch.ones(3), variables[0]), (None, variables[1]), (torch.ones(3), variables[2])]
    for _ in range(3):
        optimizer.apply_gradients(pairs)
    (repeat,) = optimizer._repeats._kept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "_apply", lambda pairs: pytest.fail("the long way"))
        optimizer.apply_gradients(pairs)
    assert [len(r.variables) for r in (repeat,)] == [2]
    assert [record.message.count("variable 1 (3,)") for record in caplog.records] == [1] * 4
    assert torch.equal(variables[1], torch.ones(3))
    assert torch.equal(variables[0], variables[2])


@pytest.mark.parametrize("executor", ["compiled", "triton"])
def test_a_thousand_steps_leave_nothing_behind(executor: Any) -> None:
    """Other learning rates, gradients at new addresses, variables missing now and then: no compilation, no growth."""
    optimizer = fused_kopt.Adam(executor=executor)
    variables = [support.randn(n, seed=n) for n in (3, 70, 1025)]

    def steps(count: int) -> None:
        for step in range(count):
            optimizer.learning_rate = 1e-3 / (step + 1)
            pairs = [(torch.ones_like(v), v) for v in variables]
            optimizer.apply_gradients(pairs[step % 5 == 4 :])

    steps(50)
    compiled = fused_kopt.stats().compilations
    gc.collect()
    tracemalloc.start()
    try:
        steps(1000 if executor == "compiled" else 100)  # what Python and numpy keep for reuse grows to 45 kB first
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        steps(850 if executor == "compiled" else 150)  # the interpreter takes milliseconds a step
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert fused_kopt.stats().compilations == compiled
    assert grown < 20_000


def test_an_interrupted_step_leaves_gradients_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C may come between the entry of torch.no_grad and its block, and then nothing leaves it."""

    def interrupted(*arguments: Any) -> None:
        torch._C._set_grad_enabled(False)
        raise KeyboardInterrupt

    monkeypatch.setattr("fused_kopt.reference.run", interrupted)
    monkeypatch.setattr("fused_kopt.execute.torch.no_grad", contextlib.nullcontext)
    with pytest.raises(KeyboardInterrupt):
        fused_kopt.SGD(executor="reference").apply_gradients([(torch.ones(3), torch.ones(3))])
    recording = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert recording
