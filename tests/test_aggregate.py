"""Gradients summed over torch.distributed's ranks: gloo processes against one process that sums by hand."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fused_kopt
from fused_kopt.aggregate import AllReduce

SHAPES = [(3, 5), (), (7,), (0,), (4, 2)]
DTYPES = [torch.float32, torch.float32, torch.float64, torch.float32, torch.bfloat16]
RANKS = 2
STEPS = 4


def variables() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator).to(d) for s, d in zip(SHAPES, DTYPES, strict=True)]


def gradients(rank: int, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + step)
    found = [torch.randn(s, generator=generator).to(d) for s, d in zip(SHAPES, DTYPES, strict=True)]
    found[0] = found[0].t().contiguous().t()  # laid out otherwise than its variable
    return found


def train(per_step: Callable[[int], list[torch.Tensor]], executor: Any = "reference", aggregated: bool = True) -> list[torch.Tensor]:
    optimizer, mine = fused_kopt.Adam(0.1, executor=executor), variables()
    for step in range(STEPS):
        optimizer.apply_gradients(zip(per_step(step), mine, strict=True), experimental_aggregate_gradients=aggregated)
    return mine


def join(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=RANKS)
    dist.barrier()  # a rank that is done at once would close the connection on one that still connects


def worker_sum(rank: int, folder: str) -> None:
    join(rank, folder)
    given = gradients(rank, 0)
    before = [g.clone() for g in given]
    trained = {
        "summed": train(lambda step: gradients(rank, step)),
        "triton": train(lambda step: gradients(rank, step), executor="triton"),
        "alone": train(lambda step: gradients(rank, step), aggregated=False),
        "collectives": count_collectives(given),
        "kept": all(torch.equal(a, b) for a, b in zip(given, before, strict=True)),
    }
    torch.save(trained, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def count_collectives(given: list[torch.Tensor]) -> int:
    calls = []
    original = dist.all_reduce
    dist.all_reduce = lambda tensor, *rest, **named: (calls.append(tensor.dim()), original(tensor, *rest, **named))[1]
    try:
        AllReduce()(list(zip(given, variables(), strict=True)))
    finally:
        dist.all_reduce = original
    assert calls
    assert set(calls) == {1}
    return len(calls)


def worker_refuse(rank: int, folder: str) -> None:
    join(rank, folder)
    optimizer, variable = fused_kopt.SGD(), torch.ones(3, 2)
    sparse = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1, 2), (3, 2), check_invariants=True)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.apply_gradients([(sparse, variable)])
    assert torch.equal(variable, torch.ones(3, 2))
    assert not optimizer.weights
    optimizer.apply_gradients([(sparse, variable)], experimental_aggregate_gradients=False)
    assert not torch.equal(variable, torch.ones(3, 2))
    dist.destroy_process_group()


def test_F16_ranks_sum_and_stay_identical(tmp_path: Path) -> None:
    mp.spawn(worker_sum, args=(str(tmp_path),), nprocs=RANKS)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    by_hand = train(lambda step: [a + b for a, b in zip(gradients(0, step), gradients(1, step), strict=True)])
    alone = [train(lambda step, rank=rank: gradients(rank, step)) for rank in range(RANKS)]
    for rank, result in enumerate(results):
        for name, expected in (("summed", by_hand), ("triton", by_hand), ("alone", alone[rank])):
            assert all(torch.equal(a, b) for a, b in zip(result[name], expected, strict=True)), name
        assert result["collectives"] == len(set(DTYPES))  # one per bucket
        assert result["kept"], "the caller's gradients were written"
    assert not torch.equal(by_hand[0], alone[0][0])


def test_refuses_what_it_cannot_sum(tmp_path: Path) -> None:
    mp.spawn(worker_refuse, args=(str(tmp_path),), nprocs=RANKS)


def test_without_a_group_the_very_same_gradients() -> None:
    pairs = [(torch.ones(2), torch.ones(2))]
    assert AllReduce()(pairs)[0][0] is pairs[0][0]


@pytest.mark.parametrize(("rank", "config", "text"), [(-1, "cpu:gloo,cuda:nccl", "not a member"), (0, "cuda:nccl", "no backend for cpu")])
def test_contexts_that_cannot_aggregate(monkeypatch: pytest.MonkeyPatch, rank: int, config: str, text: str) -> None:
    stubs: dict[str, Any] = {
        "is_initialized": lambda: True,
        "get_world_size": lambda _: 2,
        "get_rank": lambda _: rank,
        "get_backend_config": lambda _: config,
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(dist, name, stub)
    optimizer, variable = fused_kopt.Adam(), torch.ones(2)
    with pytest.raises(RuntimeError, match=text):
        optimizer.apply_gradients([(torch.ones(2), variable)])
    assert torch.equal(variable, torch.ones(2))
    assert not optimizer.weights
