"""Steps under pytest-benchmark: `pytest perf --benchmark-only`. The same providers and workloads as `python -m perf`."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from perf import plan
from perf.cases import OPTIMIZERS, Case, Tensors
from perf.workloads import WORKLOADS

# torch's compiler touches deprecated parts of itself
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
CPU = torch.device("cpu")
LARGE = ("fused_kopt-compiled", "fused_kopt-flat-compiled", "torch-fused")
SMALL = ("fused_kopt-compiled", "fused_kopt-flat-compiled", "fused_kopt-reference", "torch-fused", "torch-foreach")
HOST = (*SMALL, "fused_kopt-triton")


def run(benchmark: BenchmarkFixture, key: str, optimizer: str, workload: str) -> None:
    """Benchmark one provider on one workload, after warm-up."""
    case = Case(optimizer, workload, "all", WORKLOADS[workload].shapes, torch.float32, "plain", CPU)
    (provider,) = plan.select([key])
    reason = provider.why_not(case)
    if reason:
        pytest.skip(reason)
    runner = provider.make(case, Tensors(case))
    benchmark.group = f"{optimizer} {workload}"
    benchmark.extra_info["bytes"] = case.bytes(provider.slot_bytes(case))
    before = runner.variables[0].detach().clone()
    benchmark.pedantic(runner.step, rounds=15, warmup_rounds=3)
    assert not torch.equal(before, runner.variables[0])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("key", LARGE)
def test_25m_elements(benchmark: BenchmarkFixture, key: str, optimizer: str) -> None:
    run(benchmark, key, optimizer, "1x25M")


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("key", SMALL)
def test_5000_small_tensors(benchmark: BenchmarkFixture, key: str, optimizer: str) -> None:
    run(benchmark, key, optimizer, "5000x64")


@pytest.mark.parametrize("workload", ["1x64", "100x64", "1000x64"])
@pytest.mark.parametrize("key", HOST)
def test_host_time(benchmark: BenchmarkFixture, key: str, workload: str) -> None:
    run(benchmark, key, "adam", workload)
