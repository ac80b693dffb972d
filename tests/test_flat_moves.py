"""Flat, continued: gradients of other kinds, Flats beside one another, and what lives on after something has moved."""

from collections.abc import Callable
from typing import Any

import pytest
import support
import torch
from test_flat import borrowed, known, loss, model, train
from torch import Tensor, nn

import fused_kopt

EXECUTORS = ("reference", "compiled", "triton")
every_executor = pytest.mark.parametrize("executor", EXECUTORS)


@every_executor
def test_sparse_gradients_stay_sparse(executor: str) -> None:
    """Momentum moves touched rows only; in the first step and after dense ones."""
    results = []
    for flatten in (False, True):
        table = nn.Embedding(6, 3, sparse=True, _weight=support.randn(6, 3))
        optimizer = support.build("momentum", executor)
        flat = optimizer.flatten(table.parameters()) if flatten else None
        for step in range(6):
            table.weight.grad = None
            rows = torch.tensor([step % 6, 2, step % 6])
            (table(rows) if step % 3 else table.weight).square().sum().backward()
            optimizer.apply_gradients(flat or [(table.weight.grad, table.weight)])
        results.append(support.state(optimizer, [table.weight]))
    support.assert_same(*results)


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_gradients_with_a_graph_keep_it() -> None:
    net, optimizer = model(), support.build("adam", "compiled")
    flat = optimizer.flatten(net.parameters())
    net.zero_grad()
    loss(net, 1).backward(create_graph=True)
    assert all(v.grad is not None and v.grad.requires_grad for v in flat.variables)
    optimizer.apply_gradients(flat)
    net.zero_grad()  # or gradients and variables would keep one another alive


def kept(net: nn.Module, alive: list[Any]) -> None:
    alive.append([p.data for p in net.parameters()])
    for p in net.parameters():
        p.data = p.data.clone()


def halved(net: nn.Module, alive: list[Any]) -> None:
    alive.append([p.grad for p in net.parameters()])
    for p in net.parameters():
        p.grad = p.grad * 0.5 if p.grad is not None else None


def moved_results(executor: str, before: Callable[..., Any], between: Callable[..., Any], **options: Any) -> list[list[Any]]:
    """Bits of borrowed and flat variables; something happens before every backward pass, and between it and the step."""
    results = []
    for flatten in (False, True):
        net, optimizer, alive = model(), support.build("adam", executor, **options), []  # type: ignore[var-annotated]
        given: Any = optimizer.flatten(net.parameters()) if flatten else list(net.parameters())
        train(optimizer, net, given, range(3))
        for step in range(3, 6):
            net.zero_grad()
            before(net, alive)
            loss(net, step).backward()
            between(net, alive)
            optimizer.apply_gradients(given if flatten else [(p.grad, p) for p in given])
        results.append(support.state(optimizer, list(net.parameters())))
    return results


def nothing(net: nn.Module, alive: list[Any]) -> None:
    pass


@every_executor
@pytest.mark.parametrize("options", [{}, {"clipnorm": 0.05}], ids=str)
def test_variables_moved_before_backward_whose_old_memory_lives_on(options: dict[str, Any], executor: str) -> None:
    support.assert_same(*moved_results(executor, kept, nothing, **options))


@every_executor
@pytest.mark.parametrize("between", [kept, halved])
def test_what_moved_after_backward_while_the_old_lives_on(between: Callable[..., Any], executor: str) -> None:
    support.assert_same(*moved_results(executor, nothing, between))


@every_executor
def test_two_flats_take_turns(executor: str) -> None:
    results = []
    for flatten in (False, True):
        nets, optimizer = (model(), model()), support.build("adam", executor)
        given: list[Any] = [optimizer.flatten(net.parameters()) if flatten else list(net.parameters()) for net in nets]
        for step in range(8):
            train(optimizer, nets[step % 3 % 2], given[step % 3 % 2], [step])
        results.append(support.state(optimizer, [p for net in nets for p in net.parameters()]))
    support.assert_same(*results)


@every_executor
def test_a_flat_in_another_order_than_the_slots(executor: str) -> None:
    """Slots of one size lie where their variables were first seen, which is not where the Flat puts these."""
    results = []
    for flatten in (False, True):
        mine = [nn.Parameter(support.randn(5, seed=i)) for i in range(3)]
        optimizer = support.build("adam", executor)
        optimizer.build(mine)
        order = [mine[0], mine[2], mine[1]]
        flat = optimizer.flatten(order) if flatten else None
        for step in range(4):
            sum((i + 1 + step) * v.square().sum() for i, v in enumerate(mine)).backward()  # type: ignore[union-attr]
            optimizer.apply_gradients(flat or [(v.grad, v) for v in order])
            for v in mine:
                v.grad = None
        results.append(support.state(optimizer, mine))
    support.assert_same(*results)


def test_a_view_of_a_whole_memory_is_refused() -> None:
    base = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"part of a larger memory.*a view"):
        fused_kopt.SGD().flatten([base.view(8)])


def test_a_transposed_variable_keeps_its_layout_and_values() -> None:
    before = support.randn(3, 5)
    variable: Tensor = nn.Parameter(before.t().contiguous().t())
    flat = fused_kopt.SGD().flatten([variable])
    assert variable.stride() == (1, 3)
    assert torch.equal(variable, before)
    flat.restore()
    assert variable.stride() == (1, 3)
    assert torch.equal(variable, before)


def test_restore_leaves_alone_what_has_moved() -> None:
    net, optimizer = model(), support.build("adam", "compiled")
    flat = optimizer.flatten(net.parameters())
    train(optimizer, net, flat, range(2))
    net[3].weight.data = net[3].weight.data.clone()
    address = net[3].weight.data_ptr()
    flat.restore()
    assert net[3].weight.data_ptr() == address


def test_zero_grad_brings_gradients_back() -> None:
    net, optimizer = model(), support.build("adam", "compiled")
    flat = optimizer.flatten(net.parameters())
    net.zero_grad(set_to_none=True)
    flat.zero_grad()
    assert all(v.grad is not None and not v.grad.any() for v in flat.variables)
    support.assert_same(borrowed(), train(optimizer, net, flat))
    assert known(optimizer)


@every_executor
def test_gradients_of_others_between_steps_with_factors_of_their_own(executor: str) -> None:
    """Such a step goes segment by segment, through launches that other gradients use as well."""
    results = []
    for flatten in (False, True):
        net, optimizer = model(), support.build("adam", executor, clipnorm=0.05)
        given: Any = optimizer.flatten(net.parameters()) if flatten else list(net.parameters())
        train(optimizer, net, given, range(3))
        optimizer.apply_gradients([(torch.ones_like(p), p) for p in net.parameters()])
        results.append(train(optimizer, net, given, range(3, 6)))
    support.assert_same(*results)


def test_gather_takes_what_was_put_beside_the_buffer() -> None:
    net = model()
    flat = fused_kopt.SGD().flatten(net.parameters())
    loss(net, 0).backward()
    first, second, *others = flat.variables
    before = [v.grad.clone() for v in others if v.grad is not None]
    first.grad, second.grad = torch.full_like(first, 3.0), None
    flat.gather()
    assert torch.equal(flat.gradients[0], torch.full_like(first, 3.0))
    assert not flat.gradients[1].any()
    assert all(map(torch.equal, before, flat.gradients[2:]))
    assert flat.whole()
