"""Sharded optimizers against one that keeps everything and gets the summed gradients: equal bits."""

import copy
import logging
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import ranks
import support
import torch
import torch.distributed as dist
from support import randn
from torch import Tensor

import fused_kopt
from fused_kopt import checkpoint, layout, slots
from fused_kopt.distributed import full_slot, partition, reduce_in_backward, shard
from fused_kopt.mixed_precision import LossScaleOptimizer

# Shares of 64 elements that cut variables, hold several, and are empty.
SHAPES = [(3, 5), (), (7,), (0,), (40, 20), (129,), (1,)]
STEPS = 5
CASES: list[tuple[str, str, dict[str, Any]]] = [
    *((rule, "float32", {}) for rule in support.RULES),
    ("adam", "float32", {"clipnorm": 0.3}),
    ("adam", "float32", {"global_clipnorm": 0.3}),
    ("adam", "float32", {"clipvalue": 0.1}),
    ("adam", "bf16_split", {"ema_momentum": 0.75}),
    *(("adam", name, {}) for name in ("bf16_master", "bf16_split", "bf16_kahan", "bf16_stochastic", "bf16_8bit")),
    ("rmsprop", "bf16_8bit", {"global_clipnorm": 0.3}),
    ("sgd", "bf16_stochastic", {}),
]


def exact(shape: Sequence[int], seed: int, dtype: torch.dtype) -> Tensor:
    """Sums of up to 8 of these are exact in every dtype, in any order."""
    return torch.randint(-8, 8, tuple(shape), generator=torch.Generator().manual_seed(seed)).to(dtype) / 8


def variables(dtype: torch.dtype) -> list[Tensor]:
    return [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(SHAPES)]


def gradients(rank: int, step: int, dtype: torch.dtype) -> list[Tensor | None]:
    found: list[Tensor | None] = [exact(shape, 1000 * rank + 100 * step + i, dtype) for i, shape in enumerate(SHAPES)]
    if step == 0:
        found[4] = None  # the largest gets its slots, and its elements their numbers, later
    if step == 1:
        found[2] = None
    if step == 2 and rank == 1:
        found[6] = None
    return found


Given = Callable[[int, torch.dtype], list[Tensor | None]]


def summed(world: int) -> Given:
    def given(step: int, dtype: torch.dtype) -> list[Tensor | None]:
        columns = zip(*(gradients(rank, step, dtype) for rank in range(world)), strict=True)
        there = [[g for g in column if g is not None] for column in columns]
        sums = [torch.stack(column).sum(0) if column else None for column in there]
        return [layout.clone(sums[0], (1, 3)), *sums[1:]]  # laid out otherwise than its variable

    return given


def train(
    case: tuple[str, str, dict[str, Any]], given: Given, executor: str = "compiled", part: int = 0, aggregated: bool = True
) -> list[Any]:
    """The bits of variables and slots, and the stats, after STEPS; sharded in parts of so many bytes, 0 for not sharded."""
    rule, precision, options = case
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    optimizer = support.build(rule, executor, precision=precision, stats_every=1, **options)
    mine = variables(dtype)
    if part:
        shard(optimizer, part_bytes=part)
    optimizer.scale_learning_rate([mine[4]], 0.5)
    for step in range(STEPS):
        optimizer.apply_gradients(list(zip(given(step, dtype), mine, strict=True)), experimental_aggregate_gradients=aggregated)
    names = [slot.name for slot in slots.flatten(optimizer._all_slots())]
    found = [full_slot(optimizer, v, name) if part else optimizer.get_slot(v, name) for v in mine for name in names]
    stats = optimizer.last_stats()
    assert stats is not None
    if options.get("ema_momentum"):
        optimizer.finalize_variable_values(mine)
    return [*map(support.bits, [*mine, *(slot.float() for slot in found)]), stats]


def worker(rank: int) -> list[Any]:
    logging.disable(logging.WARNING)
    mine, every = (lambda step, dtype: gradients(rank, step, dtype)), summed(dist.get_world_size())
    found = [train(case, mine, part=1 << 28) for case in CASES]
    found += [train(case, mine, "reference", part=64) for case in CASES]
    found += [train(case, mine) for case in CASES]  # not sharded: summed by AllReduce
    return [*found, *(train(case, every, part=300, aggregated=False) for case in CASES)]


@pytest.mark.parametrize(
    "world", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_F12_equal_bits(tmp_path: Path, world: int) -> None:
    logging.disable(logging.WARNING)
    whole = [train(case, summed(world)) for case in CASES]
    logging.disable(logging.NOTSET)
    for result in ranks.run(worker, world, tmp_path):
        for number, (*bits, stats) in enumerate(result):
            *expected, wanted = whole[number % len(CASES)]
            support.assert_same(bits, expected, CASES[number % len(CASES)])
            # float64 sums in another order
            assert stats == pytest.approx(wanted, rel=1e-12), CASES[number % len(CASES)]


def scaled(rank: int) -> list[Any]:
    """A float16 model under a loss scale, with an overflow on one rank only, which every rank must leave out."""
    optimizer = LossScaleOptimizer(fused_kopt.Adam(0.1, clipnorm=1.0), initial_scale=8.0, dynamic_growth_steps=2)
    if rank >= 0:
        shard(optimizer)
    mine = [randn(200, seed=1, dtype=torch.float16), randn(30, seed=2, dtype=torch.float16)]
    for step in range(6):
        parts = [[exact((n,), 10 * r + step, torch.float16) for n in (200, 30)] for r in range(2)]
        if step == 3:
            parts[1][0][7] = torch.inf
        given = parts[rank] if rank >= 0 else [a + b for a, b in zip(*parts, strict=True)]
        optimizer.apply_scaled_gradients(list(zip(given, mine, strict=True)))
    return [*map(support.bits, mine), float(optimizer.loss_scale), int(optimizer.inner_optimizer._recorder.skipped)]


def test_F7_an_overflow_anywhere_is_left_out_everywhere(tmp_path: Path) -> None:
    *expected, scale, skipped = scaled(-1)
    assert skipped == 1
    for *bits, found, left in ranks.run(scaled, 2, tmp_path):
        support.assert_same(bits, expected)
        assert (found, left) == (scale, skipped)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.Tanh(), torch.nn.Linear(40, 40), torch.nn.Tanh(), torch.nn.Linear(40, 2))


def batch(rank: int, step: int, part: int) -> Tensor:
    return randn(4, 6, seed=100 * rank + 10 * step + part)


def in_backward(rank: int) -> list[Any]:
    """ZeRO-2 with two micro-batches and a layer that rests in one step; beside it ZeRO-1 on the same gradients."""
    logging.disable(logging.WARNING)
    found = []
    for hooked in (True, False):
        net, optimizer = network(), shard(support.build("adam", "compiled", global_clipnorm=0.5), part_bytes=2000)
        mine = list(net.parameters())
        hooks = reduce_in_backward(optimizer, mine) if hooked else None
        alive = 0
        for step in range(4):
            layers = list(net) if step != 2 or rank == 0 else list(net)[:2] + list(net)[4:]
            for part in range(2):
                x = batch(rank, step, part)
                for layer in layers:
                    x = layer(x)
                if hooks is not None and part == 0:
                    with hooks.paused():
                        x.square().mean().backward()
                else:
                    x.square().mean().backward()
            alive = max(alive, sum(v.grad is not None for v in mine))
            optimizer.apply_gradients([(v.grad, v) for v in mine])
            net.zero_grad()
        assert (alive == 0) == hooked or rank  # on rank 1 the resting layer's first half stays until the step
        found.append(list(map(support.bits, mine)))
        if hooks is not None:
            net(batch(0, 0, 0)).sum().backward()
            with pytest.raises(RuntimeError, match="one backward pass per step"):
                net(batch(0, 0, 0)).sum().backward()
    return found


def test_gradients_summed_in_backward(tmp_path: Path) -> None:
    (hooked, plain), *others = ranks.run(in_backward, 2, tmp_path)
    support.assert_same(hooked, plain)
    for other in others:
        support.assert_same(other[0], hooked)


def collectives_of_a_step(rank: int) -> tuple[list[str], list[int]]:
    """What a step sends, with parts of one variable each: and the order, gathers beside updates."""
    from fused_kopt import collectives
    from fused_kopt.kernels import cpp_launch

    log: list[str] = []
    for name in ("reduce", "reduce_scatter", "gather"):
        original = getattr(collectives, name)
        setattr(collectives, name, lambda *a, name=name, original=original: (log.append(f"{name} {len(a[0])}"), original(*a))[1])
    bound = cpp_launch.bind
    cpp_launch.bind = lambda *a: (lambda launch: lambda *b: (log.append("launch"), launch(*b))[1])(bound(*a))
    optimizer, mine = shard(support.build("adam", "compiled", global_clipnorm=1.0), part_bytes=1), [randn(256, seed=i) for i in range(3)]
    for step in range(3):
        if step == 2:
            log.clear()
        optimizer.apply_gradients([(randn(256, seed=rank), v) for v in mine])
    return log, [t.numel() for t in optimizer.weights]


def sums_of_ones_own(rank: int) -> list[float]:
    """What a caller's own aggregator returns is not summed again. Rank 1 has no elements, and counts steps all the same."""
    variable = torch.zeros(3)
    optimizer = shard(fused_kopt.SGD(1.0, gradient_aggregator=lambda pairs: [(torch.full_like(g, 5.0), v) for g, v in pairs]))
    for _ in range(2):
        optimizer.apply_gradients([(torch.full((3,), float(rank)), variable)])
    return [*variable.tolist(), int(optimizer.iterations)]


def test_an_aggregator_of_ones_own(tmp_path: Path) -> None:
    assert ranks.run(sums_of_ones_own, 2, tmp_path) == [[-10.0] * 3 + [2]] * 2


def test_what_a_step_sends(tmp_path: Path) -> None:
    for log, sizes in ranks.run(collectives_of_a_step, 2, tmp_path):
        assert log == [
            *["gather 8", "reduce_scatter 128", "reduce_scatter 128", "reduce_scatter 128", "reduce 1"],
            *["launch", "gather 256", "launch", "gather 256", "launch", "gather 256"],
        ]
        assert sizes == [1] + [128] * 6  # half of every slot


def test_one_process_alone() -> None:
    """Without a process group, a sharded optimizer is an ordinary one."""
    logging.disable(logging.WARNING)
    for case in CASES:
        *bits, stats = train(case, summed(2), part=64)
        *expected, wanted = train(case, summed(2))
        support.assert_same(bits, expected)
        assert stats == pytest.approx(wanted, rel=1e-12)
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("ranks_", range(1, 9))
def test_F10_shares_are_equal_and_cut_no_group(ranks_: int) -> None:
    for sizes in (*([n] for n in range(1, 18)), [64], [65, 0, 3], [1000, 7, 129, 64]):
        mine = [torch.arange(float(n)) for n in sizes]
        before = [v.clone() for v in mine]
        part = partition.Part(mine, ranks_)
        assert all(map(torch.equal, mine, before))
        assert len(part.flat) == ranks_ * part.share
        assert part.share * ranks_ - part.segments[-1].end < 64 * ranks_
        covered = [share for rank in range(ranks_) for share in part.of(rank)]
        for member, size in enumerate(sizes):
            ranges = sorted((start, end) for m, start, end in covered if m == member)
            assert [n for start, end in ranges for n in range(start, end)] == list(range(size))
            assert all(start % 64 == 0 for start, _ in ranges)


def test_a_variable_that_was_moved_brings_its_value() -> None:
    optimizer, mine = shard(fused_kopt.SGD(0.5)), [torch.ones(3), torch.ones(2)]
    optimizer.apply_gradients([(torch.ones_like(v), v) for v in mine])
    mine[0].data = torch.full((3,), 8.0)
    optimizer.apply_gradients([(torch.ones_like(v), v) for v in mine])
    assert mine[0].tolist() == [7.5] * 3
    assert mine[1].tolist() == [0.0] * 2
    assert mine[0].untyped_storage().data_ptr() == mine[1].untyped_storage().data_ptr()
    mine[0].data = torch.ones(4)
    with pytest.raises((ValueError, fused_kopt.StaleVariableError)):
        optimizer.apply_gradients([(torch.ones_like(v), v) for v in mine])


def test_autograd_knows_that_variables_changed() -> None:
    variable = torch.ones(3, requires_grad=True)
    optimizer = shard(fused_kopt.SGD(0.5))
    optimizer.build([variable])
    loss = (variable * variable).sum()
    optimizer.apply_gradients([(torch.ones(3), variable)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_wrong_calls(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Received: int"):
        shard(3)
    with pytest.raises(ValueError, match="part_bytes=0"):
        shard(fused_kopt.Adam(), part_bytes=0)
    with pytest.raises(ValueError, match="gradient_transformers"):
        shard(fused_kopt.Adam(gradient_transformers=[list]))
    used, variable = fused_kopt.Adam(), torch.ones(3)
    used.apply_gradients([(torch.ones(3), variable)])
    for optimizer in (used, shard(fused_kopt.Adam())):
        with pytest.raises(ValueError, match="has state, or is sharded"):
            shard(optimizer)
    with pytest.raises(TypeError, match="has no shards"):
        full_slot(used, variable, "m")
    optimizer = shard(fused_kopt.Adam())
    with pytest.raises(ValueError, match="given twice"):
        optimizer.apply_gradients([(torch.ones(3), variable)] * 2)
    sparse = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (3,), check_invariants=True)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.apply_gradients([(sparse, variable)])
    whole = torch.ones(6)
    with pytest.raises(ValueError, match="part of a larger memory"):
        optimizer.apply_gradients([(torch.ones(3), whole[:3])])
    with fused_kopt.Adam().flatten([variable]) as flat, pytest.raises(ValueError, match=r"restore\(\) on the Flat"):
        optimizer.apply_gradients(flat)
    with pytest.raises(KeyError, match="No slot 'm'"):
        full_slot(optimizer, variable, "m")
    optimizer.apply_gradients([(torch.ones(3), variable)])
    with pytest.raises(KeyError, match="No slot 'q'"):
        full_slot(optimizer, variable, "q")
    with pytest.raises(ValueError, match="has slots already"):
        optimizer.set_precision([variable], fused_kopt.Precision(slots="block8"))
    with pytest.raises(ValueError, match=r"is sharded.*distributed\.save"):
        checkpoint.save(tmp_path / "x.safetensors", optimizer, {"w": variable})
    for copy_of in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="sharded or offloaded"):
            copy_of(optimizer)
