"""Which elements a shard has, and whom its squares are added to: every rank of meshes that one process pretends to be part of.

Sums over real ranks are in distributed_checks.py.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from support import assert_same, bits
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from fused_kopt import collectives, torch_optim
from fused_kopt.borrowed import Borrowed, Borrower, Task
from fused_kopt.errors import PeerError
from fused_kopt.precision import Precision
from fused_kopt.torch_optim import shards

MESHES = ((1,), (2,), (3,), (8,), (2, 2), (2, 3), (4, 2), (1, 3))
BF16 = torch.bfloat16


@contextmanager
def rank_of(rank: int, ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def shares(shape: tuple[int, ...], sizes: tuple[int, ...], placements: list[Placement]) -> list[tuple[int, list[int]]]:
    """By rank where its shard begins, and which elements of the whole it has."""
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    found = []
    for rank in range(torch.Size(sizes).numel()):
        with rank_of(rank, torch.Size(sizes).numel()):
            part = distribute_tensor(whole, init_device_mesh("cpu", sizes), placements, src_data_rank=None)
            found.append((shards.start(part), shards.local([part])[0].flatten().tolist()))
    return found


@pytest.mark.parametrize("sizes", MESHES)
def test_rows_keep_their_places(sizes: tuple[int, ...]) -> None:
    """Even, uneven and empty shards of rows, beside replicas."""
    for rows, kinds in itertools.product((1, 2, 5, 8, 17), itertools.product((Shard(0), Replicate()), repeat=len(sizes))):
        for start, elements in shares((rows, 3), sizes, list(kinds)):
            assert elements == list(range(start, start + len(elements)))


def test_rows_that_tensor_parallelism_cut_first_keep_their_places() -> None:
    for start, elements in shares((8, 3), (2, 2), [_StridedShard(0, split_factor=2), Shard(0)]):
        assert elements == list(range(start, start + len(elements)))


@pytest.mark.parametrize("sizes", MESHES)
def test_no_two_shards_share_places(sizes: tuple[int, ...]) -> None:
    """Nor do shards of columns, though they are no range of the whole."""
    for shape, kinds in itertools.product(((5, 7), (3, 2, 4)), itertools.product((Shard(0), Shard(1)), repeat=len(sizes))):
        taken = [place for start, elements in shares(shape, sizes, list(kinds)) for place in range(start, start + len(elements))]
        assert sorted(taken) == list(range(torch.Size(shape).numel()))


class Scalars(NamedTuple):
    rate: float


def plain(p: Any, g: Any, slots: Any, s: Any) -> Any:
    return p - s.rate * g, slots


@pytest.mark.parametrize("executor", ["reference", "triton", "compiled"])
def test_executors_take_any_position(executor: Any) -> None:
    """Parts of a variable, wherever they are cut, get the bits that the whole gets."""
    policy = Precision(rounding="stochastic", seed=3)
    random = torch.Generator().manual_seed(1)
    start, gradient = (torch.randn(20_000, generator=random).to(BF16) for _ in range(2))
    results = []
    for cuts in ([], [21], [1, 64, 8191, 8193, 16_400]):
        ends = [0, *cuts, len(start)]
        parts = [start[a:b].clone() for a, b in itertools.pairwise(ends)]
        given = Borrowed(parts, [gradient[a:b].clone() for a, b in itertools.pairwise(ends)], [], positions=[128 + a for a in ends[:-1]])
        task = Task(plain, lambda dtype: [policy.extended(Scalars(1e-3), 0)], policy=policy)
        Borrower(executor).prepare(task, given)()
        results.append([bits(torch.cat(parts))])
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def some(random: torch.Generator, mesh: Any) -> list[Any]:
    """Parameters on a 2 x 2 mesh and its dimensions, or plain."""
    found: list[Any] = []
    for _ in range(6):
        shape = torch.randint(1, 4, (2,), generator=random).tolist()
        on = (mesh, mesh["a"], mesh["b"], None)[int(torch.randint(0, 4, (), generator=random))]
        value = torch.ones(shape)
        kinds = [(Shard(0), Shard(1), Replicate())[int(k)] for k in torch.randint(0, 3, (2,), generator=random)]
        found.append(value if on is None else distribute_tensor(value, on, kinds[: on.ndim], src_data_rank=None))
    return found


@pytest.mark.parametrize("each", [False, True])
def test_all_ranks_of_a_group_call_the_same_collectives(each: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the shapes, and whoever has a gradient on which rank."""
    for seed in range(20):
        calls: list[list[tuple[tuple[int, ...], int]]] = []
        for rank in range(4):
            with rank_of(rank, 4):
                mine: list[tuple[tuple[int, ...], int]] = []
                calls.append(mine)

                def record(flat: Tensor, group: Any, mine: Any = mine) -> Any:
                    mine.append((tuple(dist.get_process_group_ranks(group)), len(flat)))
                    return lambda: None

                monkeypatch.setattr(collectives, "reduce", record)
                mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
                params = [p.requires_grad_() for p in some(torch.Generator().manual_seed(seed), mesh)]
                for i, param in enumerate(params):
                    param.grad = torch.zeros_like(param) if i % 4 != rank else None
                clip: Any = {"clipnorm": 1.0} if each else {"global_clipnorm": 1.0}
                torch_optim.SGD(params, lr=0.1, executor="reference", **clip).step()
        for group in {group for mine in calls for group, _ in mine}:
            assert len({tuple(call for call in calls[rank] if call[0] == group) for rank in group}) == 1
            assert all(any(call[0] == group for call in calls[rank]) for rank in group)
        assert len({len(mine) for mine in calls}) == 1


def test_what_is_sharded_over_what() -> None:
    """Replicas, plain tensors and dimensions of one rank are added to nobody's."""
    with rank_of(3, 6):
        mesh = init_device_mesh("cpu", (2, 3, 1))
        kinds = [[Replicate()] * 3, [Shard(0), Replicate(), Shard(1)], [Replicate(), Shard(1), Shard(0)], [Shard(0)] * 3]
        params = [torch.ones(7), *(distribute_tensor(torch.ones(6, 4), mesh, k, src_data_rank=None) for k in kinds)]
        found = shards.Shards(params)
        ranks = [[sorted(dist.get_process_group_ranks(group)) for group in kind] for kind in found.kinds]
        assert ranks == [[], [[0, 3]], [[3, 4, 5]], [[0, 3], [3, 4, 5]]]
        assert found.which.tolist() == [0, 0, 1, 2, 3]


def test_a_rank_that_is_gone_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    with rank_of(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        params = [distribute_tensor(torch.ones(3), mesh, [Shard(0)], src_data_rank=None).requires_grad_() for _ in range(2)]
        groups = [{"params": params[:1]}, {"params": params[1:], "momentum": 0.9}]  # two rules: two launches
        optimizer = torch_optim.SGD(groups, lr=0.1, clipnorm=1.0)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()

        def everything() -> list[Any]:
            return [bits(t) for p in params for t in shards.local([p.detach(), *optimizer.state[p].values()])]

        before = everything()
        monkeypatch.setattr(dist, "all_reduce", broken)
        with pytest.raises(PeerError, match=r"all-reduce among 2 ranks \(this is rank 0\) failed: Connection closed"):
            optimizer.step()
        assert_same(everything(), before)


def test_norms_that_a_rank_cannot_know() -> None:
    with rank_of(3, 4):
        part = DTensor.from_local(torch.ones(3), init_device_mesh("cpu", (4,)), [Partial()], run_check=False)
        with pytest.raises(ValueError, match=r"a parameter \(3,\) is placed as \(Partial\(sum\),\).*Use Shard or Replicate"):
            shards.check_norms([part])
        elsewhere = dist.DeviceMesh("cpu", [0, 1])
        param = DTensor.from_local(torch.ones(0), elsewhere, [Shard(0)], run_check=False, shape=torch.Size((4,)), stride=(1,))
        with pytest.raises(ValueError, match=r"a parameter \(4,\) lies on other ranks only"):
            shards.check_norms([param])
        assert shards.Shards([param]).groups == []


@pytest.mark.parametrize(
    ("shape", "kinds", "whole"),
    [
        ((4, 32), [Shard(0), Shard(0)], False),
        ((4, 64), [Shard(0), Shard(0)], True),
        ((8, 32), [Shard(0), Shard(0)], True),
        ((6, 128), [Shard(0), Shard(0)], False),
        ((6, 64), [Replicate(), Shard(0)], True),
        ((64, 64), [Replicate(), Shard(1)], False),
        ((64, 64), [_StridedShard(0, split_factor=2), Shard(0)], False),
        ((5, 7), [Replicate(), Replicate()], True),
    ],
)
def test_groups_of_elements_that_no_boundary_cuts(shape: tuple[int, ...], kinds: list[Placement], whole: bool) -> None:
    with rank_of(1, 4):
        mesh = init_device_mesh("cpu", (2, 2))
        assert shards.divides(distribute_tensor(torch.ones(shape), mesh, kinds, src_data_rank=None), 64) == whole
        assert not shards.divides(distribute_tensor(torch.ones(64, 64).T, mesh, [Shard(0)] * 2, src_data_rank=None), 64)
