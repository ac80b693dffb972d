"""`Optimizer.flatten`: the same bits as borrowed variables, and what happens when the caller moves something."""

import copy
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import support
import test_aggregate
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import fused_kopt
from fused_kopt import StaleVariableError
from fused_kopt.flat import Flat
from fused_kopt.optimizer import Optimizer

EXECUTORS = ("reference", "compiled", "triton")


def model() -> nn.Sequential:
    """Odd sizes, a 0-d parameter, one in another memory format, and one that is tied."""
    torch.manual_seed(0)
    found = nn.Sequential(nn.Conv2d(3, 5, 3), nn.PReLU(), nn.Flatten(), nn.Linear(80, 7), nn.Linear(7, 7), nn.Linear(7, 7))
    found[0].to(memory_format=torch.channels_last)
    found[5].weight = found[4].weight
    found.scale = nn.Parameter(torch.tensor(1.5))
    return found


def loss(net: nn.Module, step: int) -> Tensor:
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step)).to(next(net.parameters()).dtype)
    return (net(x) * net.scale).square().mean()


def known(optimizer: Optimizer) -> bool:
    """Whether the optimizer steps this Flat without looking at its tensors."""
    return optimizer._repeats._flat is not None


def train(optimizer: Optimizer, net: nn.Module, given: Any, steps: Iterable[int] = range(6), zero: str = "flat") -> list[Any]:
    for step in steps:
        if isinstance(given, Flat) and zero == "flat":
            given.zero_grad()
        else:
            net.zero_grad(set_to_none=zero != "zeros")
        loss(net, step).backward()
        optimizer.apply_gradients(given if isinstance(given, Flat) else [(p.grad, p) for p in given])
    return support.state(optimizer, list(net.parameters()))


def borrowed(rule: str = "adam", executor: str = "reference", steps: Iterable[int] = range(6), **options: Any) -> list[Any]:
    net = model()
    return train(support.build(rule, executor, **options), net, list(net.parameters()), steps)


@pytest.mark.parametrize("zero", ["flat", "none", "zeros"])
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("options", [{}, {"clipvalue": 0.01}, {"clipnorm": 0.05}, {"global_clipnorm": 0.1}], ids=str)
def test_the_same_bits_as_borrowed(executor: str, options: dict[str, float], zero: str) -> None:
    net, optimizer = model(), support.build("adam", executor, **options)
    flat = optimizer.flatten(net.parameters())
    actual = train(optimizer, net, flat, zero=zero)
    assert known(optimizer) == (executor != "reference" and zero != "none")  # where they are None, autograd's own are borrowed
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    support.assert_same(borrowed(**options), actual)


@pytest.mark.parametrize("rule", support.RULES)
def test_every_rule_survives_what_lies_between_variables(rule: str) -> None:
    net, optimizer = model(), support.build(rule, "triton")
    actual = train(optimizer, net, optimizer.flatten(net.parameters()))
    support.assert_same(borrowed(rule, "triton"), actual)


def test_one_launch_over_one_segment() -> None:
    net, optimizer = model(), support.build("adam", "triton")
    flat = optimizer.flatten(net.parameters())
    train(optimizer, net, flat, range(1))
    with support.launches(1):
        train(optimizer, net, flat, range(1, 2))
    (update,) = optimizer._repeats._flat.together.updates  # type: ignore[union-attr]
    assert [s.numel for s in update.bucket.segments] == [flat.buffers[0].variables.numel()]


def test_dtypes_have_buffers_of_their_own() -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float64]
    results = []
    for flatten in (False, True):
        mine = [nn.Parameter(support.randn(n, seed=n, dtype=d)) for n, d in zip((5, 7, 3, 9), dtypes, strict=True)]
        optimizer = support.build("momentum", "compiled")
        given: Any = optimizer.flatten(mine) if flatten else None
        for step in range(4):
            for v in mine:
                v.grad = support.randn(v.numel(), seed=step, dtype=v.dtype) if given is None else v.grad.copy_(
                    support.randn(v.numel(), seed=step, dtype=v.dtype)
                ) if v.grad is not None else support.randn(v.numel(), seed=step, dtype=v.dtype)  # fmt: skip
            optimizer.apply_gradients(given or [(v.grad, v) for v in mine])
        results.append(support.state(optimizer, mine))
        assert not flatten or [(b.variables.dtype, len(b.members)) for b in given.buffers] == [(d, c) for d, c in zip(
            (torch.float32, torch.bfloat16, torch.float64), (2, 1, 1), strict=True)]  # fmt: skip
    support.assert_same(*results)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_variables_without_gradient_in_a_step(executor: str) -> None:
    """Absent is absent, not zero: momentum goes on only where there is a gradient."""
    results = []
    for flatten in (False, True):
        net, optimizer = model(), support.build("momentum", executor)
        mine = list(net.parameters())
        given: Any = optimizer.flatten(mine) if flatten else None
        for step in range(6):
            net.zero_grad()
            (loss(net, step) if step % 2 else net[0].weight.square().sum() * net.scale).backward()
            optimizer.apply_gradients(given or [(p.grad, p) for p in mine])
        results.append(support.state(optimizer, mine))
    support.assert_same(*results)


def test_gradients_of_others_in_between() -> None:
    """The launches are shared: after other gradients have gone through them, the Flat's are looked up again."""
    results = []
    for flatten in (False, True):
        net, optimizer = model(), support.build("adam", "compiled")
        given: Any = optimizer.flatten(net.parameters()) if flatten else list(net.parameters())
        train(optimizer, net, given, range(3))
        optimizer.apply_gradients([(torch.ones_like(p), p) for p in net.parameters()])
        results.append(train(optimizer, net, given, range(3, 6)))
    support.assert_same(*results)


def test_late_variables_move_the_slots() -> None:
    net, optimizer = model(), support.build("adam", "compiled")
    flat = optimizer.flatten(net.parameters())
    train(optimizer, net, flat, range(3))
    optimizer.apply_gradients([(torch.ones(3), torch.ones(3))])
    actual = train(optimizer, net, flat, range(3, 6))
    other, second = model(), support.build("adam", "compiled")
    train(second, other, list(other.parameters()), range(3))
    second.apply_gradients([(torch.ones(3), torch.ones(3))])
    support.assert_same(train(second, other, list(other.parameters()), range(3, 6)), actual)


# What a caller may do to a module.


def moved(net: nn.Module) -> None:
    for p in net.parameters():
        p.data = p.data.clone()


MOVES = {
    "data": moved,
    "memory format": lambda net: net[0].to(memory_format=torch.contiguous_format),
    "vector": lambda net: nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(net[3].parameters()), net[3].parameters()),
    "load_state_dict": lambda net: net.load_state_dict(copy.deepcopy(net.state_dict())),
    "reset": lambda net: nn.init.constant_(net[3].weight, 0.25),
    "frozen": lambda net: net[3].weight.requires_grad_(False),
    "own gradient": lambda net: setattr(net[3].weight, "grad", torch.ones(7, 80)),
}


LEAVES = ("data", "memory format", "vector")


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", MOVES)
def test_a_moved_variable_trains_on(name: str, executor: str, caplog: pytest.LogCaptureFixture) -> None:
    results = []
    for flatten in (False, True):
        net, optimizer = model(), support.build("adam", executor)
        given: Any = optimizer.flatten(net.parameters()) if flatten else list(net.parameters())
        train(optimizer, net, given, range(3))
        caplog.clear()
        MOVES[name](net)  # type: ignore[operator]
        with caplog.at_level(logging.WARNING):
            results.append(
                train(optimizer, net, given, range(3, 6), zero="flat" if name in ("data", "memory format", "vector") else "none")
            )
    support.assert_same(results[0], results[1], name)
    told = sum("has left its flat buffer" in record.message for record in caplog.records)
    assert told == (name in LEAVES)


kept: list[Any] = []


def doubled(net: nn.Module) -> None:
    kept.append(net[3].weight.grad)  # the old one lives on
    net[3].weight.grad = net[3].weight.grad * 2


BETWEEN = {
    "gradient replaced": doubled,
    "gradient dropped": lambda net: setattr(net[3].weight, "grad", None),
    "gradient in place": lambda net: nn.utils.clip_grad_norm_(net.parameters(), 0.1),
    "variable replaced": moved,
    "variable in place": lambda net: nn.init.constant_(net[3].weight, 0.25),
    "slots replaced": lambda net: None,
}


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", BETWEEN)
def test_what_changes_between_backward_and_step_counts(name: str, executor: str) -> None:
    results = []
    for flatten in (False, True):
        net, optimizer = model(), support.build("adam", executor)
        given: Any = optimizer.flatten(net.parameters()) if flatten else list(net.parameters())
        train(optimizer, net, given, range(3))
        for step in range(3, 6):
            given.zero_grad() if flatten else net.zero_grad()
            loss(net, step).backward()
            BETWEEN[name](net)  # type: ignore[operator]
            if name == "slots replaced":
                optimizer.set_weights([w * 0 + 1 for w in optimizer.get_weights()])
            optimizer.apply_gradients(given if flatten else [(p.grad, p) for p in given])
        results.append(support.state(optimizer, list(net.parameters())))
    support.assert_same(results[0], results[1], name)


@pytest.mark.parametrize("change", [lambda net: net.double(), lambda net: net.half()])
def test_another_dtype_is_refused_as_ever(change: Any) -> None:
    net, optimizer = model(), support.build("sgd", "compiled")
    flat = optimizer.flatten(net.parameters())
    train(optimizer, net, flat, range(2))
    change(net)
    with pytest.raises((StaleVariableError, RuntimeError)):
        train(optimizer, net, flat, range(1), zero="none")


def test_a_module_is_saved_copied_and_loaded(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    net, optimizer = model(), support.build("adam", "compiled")
    flat = optimizer.flatten(net.parameters())
    train(optimizer, net, flat, range(2))
    before = support.state(optimizer, list(net.parameters()))
    twin = copy.deepcopy(net)
    torch.save(net.state_dict(), tmp_path / "state.pt")
    untied = {name: t for name, t in net.state_dict().items() if name != "5.weight"}
    safetensors.save_file({name: t.contiguous() for name, t in untied.items()}, tmp_path / "state.safetensors")
    train(optimizer, net, flat, range(2, 4))
    loaded = [torch.load(tmp_path / "state.pt"), safetensors.load_file(tmp_path / "state.safetensors")]
    for found in (dict(twin.named_parameters()), *loaded):
        for name, p in net.named_parameters():
            assert found[name].shape == p.shape
            assert not torch.equal(found[name], p) or name == "1.weight"
    net.load_state_dict(loaded[0])
    support.assert_same(before[: len(flat.variables)], [support.bits(p) for p in net.parameters()])
    assert flat.whole()


def test_a_graph_from_before_the_step_is_refused() -> None:
    """Views of one buffer have version counters of their own, and every one is counted up."""
    net, optimizer = model(), support.build("adam", "compiled")
    flat = optimizer.flatten(net.parameters())
    train(optimizer, net, flat, range(3))
    late = loss(net, 9)
    train(optimizer, net, flat, range(3, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


def test_restore_gives_everything_memory_of_its_own() -> None:
    net, optimizer = model(), support.build("adam", "compiled")
    with optimizer.flatten(net.parameters()) as flat:
        train(optimizer, net, flat, range(3))
        buffer = flat.buffers[0].variables
        assert all(p.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr() for p in net.parameters())
    assert all(p.untyped_storage().nbytes() == p.numel() * 4 for p in net.parameters())
    assert all(p.grad.untyped_storage().nbytes() == p.numel() * 4 for p in net.parameters())
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    support.assert_same(borrowed(), train(optimizer, net, list(net.parameters()), range(3, 6)))
    flat.restore()  # a second time: nothing
    assert not flat.variables


def test_what_shares_memory_is_refused() -> None:
    optimizer, weight = fused_kopt.Adam(), nn.Parameter(torch.ones(4))
    base = torch.ones(8)
    tied, shared = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    tied.data = weight.data
    shared.share_memory_()
    for given, message in (
        ([weight, tied], "share memory"),
        ([weight, nn.Parameter(base[2:6])], r"variable 1 .*part of a larger memory"),
        ([shared], "shared memory"),
        ([weight * 2], "not a leaf"),
    ):
        address = weight.data_ptr()
        with pytest.raises(ValueError, match=message):
            optimizer.flatten(given)
        assert weight.data_ptr() == address
    optimizer.flatten([weight])
    with pytest.raises(ValueError, match=r"a Flat, .*Leave that first \(Flat.restore\(\)\)"):
        fused_kopt.SGD().flatten([weight])


def test_variables_that_are_no_parameters_take_gradients_by_hand() -> None:
    results = []
    for flatten in (False, True):
        mine, optimizer = [support.randn(n, seed=n) for n in (3, 17)], support.build("adam", "compiled")
        flat = optimizer.flatten(mine)
        for step in range(4):
            for gradient in flat.gradients:
                gradient.copy_(support.randn(gradient.numel(), seed=step))
            optimizer.apply_gradients(flat if flatten else list(flat))
        results.append(support.state(optimizer, mine))
    support.assert_same(*results)


def worker(rank: int, folder: str) -> None:
    test_aggregate.join(rank, folder)
    net, optimizer = model(), support.build("adam", "compiled")
    flat = optimizer.flatten(net.parameters())
    calls = []
    reduce = dist.all_reduce
    dist.all_reduce = lambda buffer, **how: (calls.append(buffer.numel()), reduce(buffer, **how))[1]  # type: ignore[assignment]
    for step in range(4):
        flat.zero_grad()
        loss(net, 10 * step + rank).backward()
        if step == 2 and rank == 1:  # this rank has no gradient for one variable
            net[3].weight.grad = None
        optimizer.apply_gradients(flat)
    torch.save((support.state(optimizer, list(net.parameters())), calls), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_one_collective_per_buffer(tmp_path: Path) -> None:
    mp.spawn(worker, (str(tmp_path),), nprocs=test_aggregate.RANKS)
    (first, calls), (second, same) = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    support.assert_same(first, second)
    net, optimizer = model(), support.build("adam", "compiled")
    for step in range(4):
        sums = [torch.zeros_like(p) for p in net.parameters()]
        for rank in range(2):
            net.zero_grad()
            loss(net, 10 * step + rank).backward()
            for (name, p), total in zip(net.named_parameters(), sums, strict=True):
                if not (step == 2 and rank == 1 and name == "3.weight"):
                    total += p.grad
        optimizer.apply_gradients(list(zip(sums, net.parameters(), strict=True)))
    support.assert_same(support.state(optimizer, list(net.parameters())), first)
    assert calls == same
    assert len(calls) == 4
