"""Captured steps: what a graph replays equals steps outside it, bit for bit. Without a GPU the launches are recorded by hand."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import support
import torch
from torch import Tensor

import fused_kopt
from fused_kopt.kernels import launch
from fused_kopt.optimizer import Optimizer
from fused_kopt.optimizers.schedules import ExponentialDecay

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class Graph:
    """Stands for torch.cuda.CUDAGraph: kernels launched during the capture do not run, and `replay` launches them."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_initialized", lambda: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            patch.setattr(launch, "_run", lambda *arguments: self.launches.append(arguments))
            yield

    def replay(self) -> None:
        for arguments in self.launches:
            launch._run(*arguments)


class Training:
    """Variables with gradients at fixed addresses."""

    def __init__(self, optimizer: Optimizer, device: str = "cpu") -> None:
        self.optimizer = optimizer
        self.variables = [support.randn(n, seed=n, dtype=d).to(device) for d in DTYPES for n in (5, 17)]
        self.gradients = [torch.zeros_like(v) for v in self.variables]

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.gradients, self.variables, strict=True))

    def set(self, step: int) -> None:
        for i, g in enumerate(self.gradients):
            g.copy_(support.randn(g.numel(), seed=100 * step + i, dtype=g.dtype))

    def eager(self, *steps: int) -> None:
        for step in steps:
            self.set(step)
            self.optimizer.apply_gradients(self.pairs)

    def state(self) -> list[Any]:
        return support.state(self.optimizer, self.variables)


MAKERS: dict[str, Callable[[], Optimizer]] = {
    "adam": lambda: fused_kopt.Adam(ExponentialDecay(0.1, 3, 0.5), executor="triton"),
    "nadam": lambda: fused_kopt.Nadam(0.01, executor="triton"),
    "decay": lambda: fused_kopt.SGD(0.1, momentum=0.9, decay=0.3, executor="triton"),
    "clipvalue": lambda: fused_kopt.Ftrl(0.1, clipvalue=0.5, executor="triton"),
}


def layered(optimizer: Optimizer, training: Training) -> None:
    optimizer.scale_learning_rate(training.variables[1:4], 0.25)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_replays_equal_steps(name: str, own: bool) -> None:
    expected, actual = Training(MAKERS[name]()), Training(MAKERS[name]())
    for training in (expected, actual):
        if own:
            layered(training.optimizer, training)
        training.eager(0, 1)
    graph = Graph()
    actual.optimizer.prepare_replays(actual.pairs, steps=4)
    with graph.capture():
        actual.optimizer.apply_gradients(actual.pairs)
    assert int(actual.optimizer.iterations) == 2
    for step in range(2, 12):  # through two uploads
        actual.set(step)
        graph.replay()
        actual.optimizer.replayed()
    actual.eager(12)  # the same launches outside the graph
    expected.eager(*range(2, 13))
    support.assert_same(expected.state(), actual.state())


def test_a_hyperparameter_that_changes_counts_from_the_next_report_on() -> None:
    expected, actual = (Training(fused_kopt.SGD(0.5, executor="triton")) for _ in range(2))
    for training in (expected, actual):
        training.eager(0)
    graph = Graph()
    actual.optimizer.prepare_replays(actual.pairs)
    with graph.capture():
        actual.optimizer.apply_gradients(actual.pairs)
    for step, rate in ((1, 0.5), (2, 0.125), (3, 2.0)):
        for training in (expected, actual):
            training.optimizer.learning_rate = rate
        actual.optimizer.replayed(0)
        actual.set(step)
        graph.replay()
        actual.optimizer.replayed()
        expected.eager(step)
    support.assert_same(expected.state(), actual.state())


def test_what_cannot_be_captured_is_refused() -> None:
    training, graph = Training(fused_kopt.Adam(executor="triton")), Graph()
    with graph.capture(), pytest.raises(RuntimeError, match=r"Call prepare_replays\(\) first"):
        training.eager(0)
    with pytest.raises(RuntimeError, match="Take one with these gradients and variables first"):
        training.optimizer.prepare_replays(training.pairs)
    training.eager(0)
    with pytest.raises(ValueError, match=r"at least 1\. Received: steps=0"):
        training.optimizer.prepare_replays(training.pairs, steps=0)
    with pytest.raises(RuntimeError, match="1 replays, but scalars for 0 were prepared"):
        training.optimizer.replayed()
    training.optimizer.prepare_replays(training.pairs, steps=3)
    with pytest.raises(RuntimeError, match="4 replays, but scalars for 3 were prepared"):
        training.optimizer.replayed(4)
    before = training.state()
    with graph.capture(), pytest.raises(RuntimeError, match="not the step that prepare_replays"):
        training.optimizer.apply_gradients(training.pairs[1:])
    support.assert_same(before, training.state())
    slow = Training(fused_kopt.Adam(executor="reference"))
    slow.eager(0)
    with pytest.raises(RuntimeError, match="on a fused executor"):
        slow.optimizer.prepare_replays(slow.pairs)


def test_a_flat_can_be_captured() -> None:
    states = []
    for captured in (False, True):
        training = Training(fused_kopt.Adam(0.1, executor="triton"))
        flat = training.optimizer.flatten(training.variables)
        for step in range(6):
            for i, g in enumerate(flat.gradients):
                g.copy_(support.randn(g.numel(), seed=100 * step + i, dtype=g.dtype))
            if not captured or step < 2:
                training.optimizer.apply_gradients(flat)
                continue
            if step == 2:
                training.optimizer.prepare_replays(flat, 10)
                graph = Graph()
                with graph.capture():
                    training.optimizer.apply_gradients(flat)
            graph.replay()
            training.optimizer.replayed()
        states.append(training.state())
    support.assert_same(*states)


@pytest.mark.parametrize("executor", ["reference", "compiled", "triton"])
@pytest.mark.parametrize("rule", support.RULES)
def test_learning_rates_of_their_own(rule: str, executor: str) -> None:
    """As separate optimizers of the multiplied rate (1/4 is exact), in one launch; sparse gradients too."""
    if rule.startswith("ftrl_power"):
        pytest.skip("executors differ in the last bits of a power")
    config = dict(support.RULES[rule][1])
    rate = config.pop("learning_rate", 0.5)
    make = getattr(fused_kopt, support.RULES[rule][0])
    together = make(rate, executor=executor, **config)
    alone = [make(r, executor="reference", **config) for r in (rate, rate / 4)]
    mine, others = ([support.randn(4, 3, seed=i) for i in range(4)] for _ in range(2))
    together.scale_learning_rate(mine[2:], 0.25)
    for step in range(3):
        gradients = [support.randn(4, 3, seed=10 * step + i + 1) for i in range(4)]
        if step == 2:
            gradients[3] = gradients[3].mul(torch.tensor([[1.0], [0.0], [1.0], [0.0]])).to_sparse(1)
        with support.launches(1) if step < 2 and executor == "triton" else contextlib.nullcontext():
            together.apply_gradients(list(zip(gradients, mine, strict=True)))
        for optimizer, half in zip(alone, (slice(0, 2), slice(2, 4)), strict=True):
            optimizer.apply_gradients(list(zip(gradients[half], others[half], strict=True)))
    support.assert_same([support.bits(v) for v in others], [support.bits(v) for v in mine])


@pytest.mark.parametrize("multiplier", [-1.0, float("nan"), float("inf")])
def test_a_multiplier_out_of_range(multiplier: float) -> None:
    with pytest.raises(ValueError, match="`multiplier` must be a finite number >= 0"):
        fused_kopt.Adam().scale_learning_rate([torch.ones(1)], multiplier)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*MAKERS, "global_clipnorm"])
def test_a_cuda_graph(name: str) -> None:
    make = MAKERS.get(name, lambda: fused_kopt.Adam(0.1, global_clipnorm=1.0, executor="triton"))
    expected, actual = (Training(make(), "cuda") for _ in range(2))
    for training in (expected, actual):
        training.eager(0, 1, 2)
    actual.optimizer.prepare_replays(actual.pairs, steps=4)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual.optimizer.apply_gradients(actual.pairs)
    for step in range(3, 14):
        actual.set(step)
        graph.replay()
        actual.optimizer.replayed()
    expected.eager(*range(3, 14))
    support.assert_same(expected.state(), actual.state())
