"""What a step under loss scaling asks of the host: nothing is read from a device, launches are few. No GPU needed."""

import functools
import math
from typing import Any

import pytest
import support
import test_host_path
import torch
from test_reliability_d2 import Driver
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_kopt
from fused_kopt.mixed_precision import LossScaleOptimizer

stub = test_host_path.stub

# What reads values to decide something, and so waits for a GPU.
READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "unique_dim")


class Reads(TorchDispatchMode):
    """Counts reads of tensors' values."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.overloadpacket.__name__ in READS
        return function(*args, **(kwargs or {}))


def reads_of_steps(optimizer: Any, count: int = 3) -> int:
    variables = [nn.Parameter(torch.ones(n)) for n in (16, 3000)]
    with Reads() as reads:
        for _ in range(count):
            loss = optimizer.get_scaled_loss(torch.stack([v.square().sum() for v in variables]).sum())
            gradients = torch.autograd.grad(loss, variables)
            optimizer.apply_scaled_gradients(zip(gradients, variables, strict=True))
            optimizer.apply_gradients(zip(optimizer.get_unscaled_gradients(gradients), variables, strict=True))
    return reads.count


@pytest.mark.parametrize(
    "options", [{}, {"global_clipnorm": 1.0}, {"clipnorm": 1.0, "clipvalue": 1.0}, {"stats_every": 1}], ids=lambda o: "-".join(o) or "plain"
)
def test_nothing_is_read(options: dict[str, Any], stub: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first step on. Controls: Nadam's momentum cache waits once a step, the reference executor once a launch."""
    monkeypatch.setattr("fused_kopt.verification.proven_norms", lambda dtypes, device, executor, requested: executor)
    assert reads_of_steps(LossScaleOptimizer(fused_kopt.Adam(executor="triton", **options))) == 0
    assert stub.grids
    if not options:
        assert reads_of_steps(LossScaleOptimizer(fused_kopt.Nadam(executor="triton"))) == 6
        assert reads_of_steps(LossScaleOptimizer(fused_kopt.Nadam(executor="triton"), dynamic=False, initial_scale=8)) == 0
        assert reads_of_steps(LossScaleOptimizer(fused_kopt.Adam(executor="reference"))) == 6


def test_three_launches(stub: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two for the sums of squares, with or without clipping by norm, and the update; the segment table is uploaded once."""
    monkeypatch.setattr("fused_kopt.verification.proven_norms", lambda dtypes, device, executor, requested: executor)
    variable = nn.Parameter(torch.ones(3000))
    for options in ({}, {"global_clipnorm": 1.0}):
        optimizer: Any = LossScaleOptimizer(fused_kopt.Adam(executor="triton", **options))
        for _ in range(3):
            with support.launches(3):
                optimizer.apply_scaled_gradients([(torch.ones(3000), variable)])


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for a CUDA graph: what is "captured" runs at once, and again at every replay."""

    class Graph:
        def __init__(self) -> None:
            self.step: Any = None

        def capture(self, step: Any) -> None:
            with pytest.MonkeyPatch.context() as patch:
                for module in ("engine", "replays"):
                    patch.setattr(f"fused_kopt.{module}.capturing", lambda: True)
                step()
            self.step = step

        def replay(self) -> None:
            self.capture(self.step)

    return Graph()


def test_replays_go_on_with_scale_and_skips(graph: Any) -> None:
    """The interpreter launches what a graph would replay: same variables, scale, iterations as without one."""
    results = []
    for captured in (True, False):
        optimizer: Any = LossScaleOptimizer(fused_kopt.Adam(executor="triton"), dynamic_growth_steps=2)
        gradient, variable = torch.ones(5), torch.ones(5)
        pairs = [(gradient, variable)]
        optimizer.apply_scaled_gradients(pairs)
        if captured:
            optimizer.prepare_replays(pairs, steps=8)
            gradient.fill_(2.0)
            graph.capture(functools.partial(optimizer.apply_scaled_gradients, pairs))
            optimizer.replayed()
        else:
            optimizer.apply_scaled_gradients([(gradient.fill_(2.0), variable)])
        for value in (3.0, math.nan, 4.0, 5.0, 6.0):
            gradient.fill_(value)
            if captured:
                graph.replay()
                optimizer.replayed()
            else:
                optimizer.apply_scaled_gradients(pairs)
        results.append([*support.state(optimizer, [variable]), float(optimizer.loss_scale), int(optimizer.dynamic_counter)])
    assert all((a == b).all() if hasattr(a, "all") else a == b for a, b in zip(*results, strict=True))
    assert results[0][-2:] == [2.0**16, 1]


def test_a_graph_cannot_tell_nadam() -> None:
    optimizer: Any = LossScaleOptimizer(fused_kopt.Nadam(executor="compiled"))
    pairs = [(torch.ones(3), torch.ones(3))]
    optimizer.apply_scaled_gradients(pairs)
    with pytest.raises(RuntimeError, match="A graph cannot tell Nadam"):
        optimizer.prepare_replays(pairs)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["adam", "nadam"])
def test_nothing_waits_on_a_gpu(rule: str) -> None:
    """torch's own debug mode: every call that waits for the device is an error. Control: Nadam."""
    optimizer: Any = LossScaleOptimizer(support.build(rule, "triton"))
    variable, gradient = torch.ones(3000, device="cuda"), torch.ones(3000, device="cuda")
    optimizer.apply_scaled_gradients([(gradient, variable)])
    torch.cuda.set_sync_debug_mode("error")
    try:
        if rule == "nadam":
            with pytest.raises(RuntimeError, match="synchroniz"):
                optimizer.apply_scaled_gradients([(gradient, variable)])
        else:
            for _ in range(3):
                loss = optimizer.get_scaled_loss(gradient.sum())
                optimizer.apply_scaled_gradients([(gradient * loss, variable)])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_gpu_skips_as_a_cpu() -> None:
    results = []
    for device, executor in (("cuda", "triton"), ("cpu", "reference")):
        optimizer: Any = LossScaleOptimizer(fused_kopt.Adam(executor=executor), dynamic_growth_steps=2)
        variable = torch.ones(3000, device=device)
        for value in (1.0, 2.0, math.inf, 3.0, 4.0):
            gradient = torch.full((3000,), value, device=device)
            gradient[7] = 1.0
            optimizer.apply_scaled_gradients([(gradient, variable)])
        assert optimizer.loss_scale.device.type == device
        results.append([*support.state(optimizer, [variable]), support.bits(optimizer.loss_scale), support.bits(optimizer.dynamic_counter)])
    support.assert_same(*results)
