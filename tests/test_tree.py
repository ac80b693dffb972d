"""TreeSum: the same bits on any number of ranks."""

import logging
from pathlib import Path
from typing import Any

import pytest
import ranks
import support
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import randn
from torch import Tensor

from fused_kopt.distributed import TreeSum, shard, tree

SHAPES = [(3, 5), (), (7,), (0,), (40, 20)]
PARTS = (1, 2, 3, 5, 7, 8, 12)
STEPS = 3


def gradients(part: int, step: int) -> list[Tensor | None]:
    found: list[Tensor | None] = [randn(*shape, seed=1000 * part + 100 * step + i) for i, shape in enumerate(SHAPES)]
    if part % 3 == 1:
        found[4] = None
    if step == 1:
        found[2] = None  # in no micro-batch
    return found


def train(parts: int, sharded: bool = False, dtype: torch.dtype = torch.float32) -> list[Any]:
    optimizer = support.build("adam", "compiled")
    if sharded:
        shard(optimizer)
    variables = [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(SHAPES)]
    sums = TreeSum(variables, parts)
    for step in range(STEPS):
        for part in sums.mine:
            sums.add([None if g is None else g.to(dtype) for g in gradients(part, step)])
        optimizer.apply_gradients(sums.sum(), experimental_aggregate_gradients=False)
    return list(map(support.bits, variables))


def worker(rank: int) -> list[list[Any]]:
    logging.disable(logging.WARNING)
    return [train(parts) for parts in PARTS] + [train(7, sharded=True), train(7, dtype=torch.bfloat16)]


@pytest.mark.parametrize("world", [2, 3, *(pytest.param(world, marks=pytest.mark.slow) for world in (4, 8, 13))])
def test_F11_the_number_of_ranks_is_not_in_the_bits(tmp_path: Path, world: int) -> None:
    logging.disable(logging.WARNING)
    alone = worker(0)
    logging.disable(logging.NOTSET)
    for result in ranks.run(worker, world, tmp_path):
        for one, other in zip(result, alone, strict=True):
            support.assert_same(one, other)


def test_the_tree_is_what_it_says() -> None:
    """((0 + 1) + (2 + 3)) + 4, which no running sum gives: each pair would be lost in the first number."""
    variable = torch.zeros(1)
    sums = TreeSum([variable], 5)
    for value in (2.0**24, 1.0, 1.0, 1.0, 1.0):
        sums.add([torch.tensor([value])])
    ((total, _),) = sums.sum()
    assert total is not None
    assert total.item() == 2.0**24 + 4.0  # 2^24 + 3, rounded to even
    running = torch.tensor(2.0**24)
    for _ in range(4):
        running += 1.0
    assert running.item() == 2.0**24


@settings(deadline=None)
@given(parts=st.integers(1, 300), ranks_=st.integers(1, 40))
def test_ranks_divide_the_leaves_and_meet_at_one_root(parts: int, ranks_: int) -> None:
    every = [tree.mine(parts, rank, ranks_) for rank in range(ranks_)]
    assert [leaf for mine in every for leaf in mine] == list(range(parts))
    assert max(map(len, every)) - min(map(len, every)) <= 1
    nodes: list[tree.Node] = []
    for mine in every:
        own = tree.merged([(0, leaf) for leaf in mine], parts)
        assert len(own) <= 2 * max(len(mine), 1).bit_length()
        nodes = tree.merged([*nodes, *own], parts)
    assert nodes == [(tree.depth(parts), 0)]


def test_wrong_calls() -> None:
    variable = torch.zeros(3)
    with pytest.raises(ValueError, match="parts=0"):
        TreeSum([variable], 0)
    sums = TreeSum([variable], 2)
    with pytest.raises(ValueError, match="Received: 2"):
        sums.add([None, None])
    with pytest.raises(ValueError, match=r"gradient shape \(2,\)"):
        sums.add([torch.ones(2)])
    with pytest.raises(ValueError, match="2 of this rank's 2 micro-batches were not added"):
        sums.sum()
    sums.add([torch.ones(3)])
    variable.requires_grad_()
    variable.sum().backward()
    sums.add()
    assert variable.grad is None
    with pytest.raises(ValueError, match="has 2 of 2"):
        sums.add([None])
    ((total, same),) = sums.sum()
    assert total is not None
    assert total.tolist() == [2.0] * 3
    assert same is variable
