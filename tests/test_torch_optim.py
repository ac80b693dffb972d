"""torch_optim steps: the bits of fused_kopt.optimizers, groups, one launch, gradients of every layout, schedules, closures, threads."""

import os
import threading
from typing import Any

import numpy as np
import pytest
import torch
from support import assert_same, bits, launches, randn
from torch_classes import CASES, CLASSES, ONE_EACH, build, closure_of, give, keras, mlp, parameters, snapshot, steps

from fused_kopt import torch_optim

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

each_case = pytest.mark.parametrize("case", CASES)
each_class = pytest.mark.parametrize("case", ONE_EACH.values(), ids=list(ONE_EACH))


@pytest.mark.slow(every=5)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("executor", ["reference", "compiled"])
@each_case
def test_fifty_steps_have_the_bits_of_the_keras_class(case: str, executor: Any, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    variables = [param.detach().clone() for param in params]
    ours, theirs = build(case, params, executor=executor), keras(case, executor=executor)
    for step in range(50):
        give(params, step)
        ours.step()
        theirs.apply_gradients([(p.grad, v) for p, v in zip(params, variables, strict=True)])
    assert_same([bits(p) for p in params], [bits(v) for v in variables])
    assert all(float(ours.state[p]["step"]) == 50 for p in params)


@each_case
def test_triton_agrees(case: str) -> None:
    params, others = parameters(shapes=((33,), (3, 4))), parameters(shapes=((33,), (3, 4)))
    first, second = build(case, params, executor="triton"), build(case, others, executor="reference")
    steps(first, params, range(4))
    steps(second, others, range(4))
    assert_same(snapshot(first, params), snapshot(second, others))


def test_every_class_has_a_case() -> None:
    assert {case.cls for case in CASES.values()} == set(CLASSES)


@each_class
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_groups_are_one_launch_with_their_own_settings(case: str, weight_decay: float) -> None:
    """Two groups, one without decay: the bits of two optimizers."""
    params, others = parameters(), parameters()
    groups = [{"params": params[:2], "lr": 0.3, "weight_decay": 0.0}, {"params": params[2:], "weight_decay": weight_decay}]
    together = build(case, groups, executor="compiled")
    apart = [
        build(case, others[:2], lr=0.3, weight_decay=0.0, executor="reference"),
        build(case, others[2:], weight_decay=weight_decay, executor="reference"),
    ]
    steps(together, params, [0])  # builds kernels, which are launched once for their known-answer test
    for step in range(1, 5):
        give(params, step)
        with launches(1):
            together.step()
    for step in range(5):
        give(others, step)
        for optimizer in apart:
            optimizer.step()
    assert_same(snapshot(together, params), [*map(bits, others), *_states(apart, others)])


def _states(optimizers: list[Any], params: Any) -> list[Any]:
    owners = {p: optimizer.state[p] for optimizer in optimizers for p in params if p in optimizer.state}
    return [bits(owners[p][name]) for p in params for name in sorted(owners[p])]


def test_groups_with_different_rules() -> None:
    params, others = parameters(shapes=((3,), (4,))), parameters(shapes=((3,), (4,)))
    mixed = torch_optim.SGD([{"params": params[:1], "momentum": 0.9}, {"params": params[1:]}])
    alone = torch_optim.SGD(others[:1], momentum=0.9), torch_optim.SGD(others[1:])
    for step in range(3):
        give(params, step)
        give(others, step)
        for optimizer in (mixed, *alone):
            optimizer.step()
    assert_same([bits(p) for p in params], [bits(p) for p in others])
    assert "momentum" in mixed.state[params[0]]
    assert "momentum" not in mixed.state[params[1]]
    assert "rules or precision policies that differ between groups, launches for each: 2" in mixed.describe().notes


@pytest.mark.parametrize("decoupled", [True, False])
def test_weight_decay_by_hand(decoupled: bool) -> None:
    """AdamW shrinks the parameter, Adam adds to the gradient."""
    (param,) = parameters(shapes=((5,),))
    start, cls = param.detach().clone(), torch_optim.AdamW if decoupled else torch_optim.Adam
    steps(cls([param], lr=0.1, weight_decay=0.25), [param], [0])
    gradient = param.grad if decoupled else param.grad + start * 0.25
    (other,) = parameters(shapes=((5,),))
    other.data = start * np.float32(1 - 0.1 * 0.25).item() if decoupled else start.clone()
    other.grad = gradient
    torch_optim.Adam([other], lr=0.1).step()
    assert torch.equal(param, other)


@pytest.mark.parametrize(
    ("name", "keywords"),
    [("SGD", {"momentum": 0.9}), ("AdamW", {"eps": 0.0}), ("Adagrad", {"eps": 0.0, "initial_accumulator_value": 0.0}), ("Lion", {})],
)
def test_close_to_torch(name: str, keywords: dict[str, Any]) -> None:
    """With epsilon 0 and a constant rate the formulas are the same; rounding differs, a few ulp of 1 in 20 steps."""
    params, others = parameters(F64, shapes=((40,),)), parameters(F64, shapes=((40,),))
    if name == "Lion":  # which torch lacks
        ours, m = torch_optim.Lion(params, lr=0.5, weight_decay=0.25), torch.zeros(40, dtype=F64)
        steps(ours, params, range(3))
        b1, b2 = (torch.tensor(b, dtype=F32).double() for b in (0.9, 0.99))
        for step in range(3):
            g = randn(40, seed=1000 * step, dtype=F64)
            others[0].data = others[0] * (1 - 0.5 * 0.25) - 0.5 * torch.sign(b1 * m + (1 - b1) * g)
            m = b2 * m + (1 - b2) * g
    else:
        keywords = {**keywords, "lr": 0.125, "weight_decay": 0.5}
        steps(getattr(torch_optim, name)(params, **keywords), params, range(20))
        steps(getattr(torch.optim, name)(others, **keywords), others, range(20))
    # hyperparameters pass through float32 here: 0.999 is 1e-8 off, and so are its powers
    torch.testing.assert_close(params[0], others[0], rtol=1e-6, atol=1e-6)


@each_class
def test_parameters_without_gradient_rest(case: str) -> None:
    """None gradients, frozen later, back again: neither parameter, state nor counter moves, and the others go on."""
    params, others = parameters(), parameters()
    ours = build(case, params, executor="compiled")
    alone = [build(case, [other], executor="reference") for other in others]
    for step in range(9):
        give(params, step)
        give(others, step)
        for i in range(len(params)):
            if (step + i) % 3 == 0:
                params[i].grad = None
            else:
                alone[i].step()
        ours.step()
    assert_same(snapshot(ours, params), [*map(bits, others), *_states(alone, others)])


def test_nothing_to_do() -> None:
    params = parameters()
    optimizer = torch_optim.Adam(params)
    assert optimizer.step() is None
    assert not optimizer.state
    torch_optim.Adam([{"params": []}, {"params": params}]).step()


def turned(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.transpose(0, 2).contiguous().transpose(0, 2)


def expanded(gradient: torch.Tensor) -> torch.Tensor:
    return gradient[:1, :1, :1].expand(gradient.shape)


@pytest.mark.slow(every=3)
@pytest.mark.parametrize("layout", [turned, expanded, lambda g: torch.stack([g, g], -1)[..., 0]], ids=["transposed", "expanded", "gaps"])
@each_class
def test_gradients_of_other_layouts(case: str, layout: Any) -> None:
    params, others = parameters(shapes=((4, 3, 5), (7,))), parameters(shapes=((4, 3, 5), (7,)))
    ours, theirs = build(case, params, executor="compiled"), build(case, others, executor="reference")
    for step in range(3):
        give(params, step)
        give(others, step)
        params[0].grad = layout(params[0].grad)
        others[0].grad = params[0].grad.contiguous()
        ours.step()
        theirs.step()
    assert_same(snapshot(ours, params), snapshot(theirs, others))


@each_class
def test_channels_last_is_kept(case: str) -> None:
    model, other = (torch.nn.Conv2d(3, 4, 2) for _ in range(2))
    other.load_state_dict(model.state_dict())
    model.to(memory_format=torch.channels_last)
    optimizer, theirs = build(case, model.parameters()), build(case, other.parameters())
    for step in range(3):
        for one, owner in ((model, optimizer), (other, theirs)):
            owner.zero_grad()
            one(randn(2, 3, 5, 5, seed=step)).square().sum().backward()
        for mine, reference in zip(model.parameters(), other.parameters(), strict=True):
            mine.grad.copy_(reference.grad)  # convolutions of two layouts round differently
        optimizer.step()
        theirs.step()
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    slots = [s for s in optimizer.state[model.weight].values() if s.dim()]
    assert all(slot.is_contiguous(memory_format=torch.channels_last) for slot in slots)
    assert torch.equal(model.weight, other.weight)


@each_class
def test_gradients_stay_as_they_are_and_may_keep_their_memory(case: str) -> None:
    params = parameters()
    optimizer = build(case, params, clipvalue=0.01)
    give(params, 0)
    before = [bits(p.grad) for p in params]
    optimizer.step()
    assert_same([bits(p.grad) for p in params], before)
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in params)
    optimizer.step()


@pytest.mark.slow(every=3)
@pytest.mark.parametrize("clip", ["clipvalue", "clipnorm", "global_clipnorm"])
@each_class
def test_clips_are_those_of_the_keras_class(case: str, clip: str) -> None:
    params = parameters()
    variables = [param.detach().clone() for param in params]
    ours, theirs = build(case, params, **{clip: 0.5}), keras(case, **{clip: 0.5})
    for step in range(4):
        give(params, step)
        ours.step()
        theirs.apply_gradients([(p.grad, v) for p, v in zip(params, variables, strict=True)])
    assert_same([bits(p) for p in params], [bits(v) for v in variables])


@each_class
def test_moved_and_replaced_parameters_train_on(case: str) -> None:
    """What silently stops optimizers that re-point parameters: `.data =`, `.to()`, load_state_dict, another optimizer."""
    model, other = mlp(), mlp()
    ours, theirs = build(case, model.parameters(), executor="compiled"), build(case, other.parameters(), executor="reference")
    for step in range(4):
        closure_of(model, ours, step)()
        closure_of(other, theirs, step)()
        model[0].weight.data = model[0].weight.detach().clone()
        model.load_state_dict(model.state_dict())
        ours.step()
        theirs.step()
    assert_same(snapshot(ours, list(model.parameters())), snapshot(theirs, list(other.parameters())))


@each_class
def test_closures(case: str) -> None:
    """Called once, with gradients on, before gradients are collected; its loss is returned."""
    model, other = mlp(), mlp()
    ours, theirs = build(case, model.parameters()), build(case, other.parameters())
    for step in range(3):
        with torch.no_grad():
            loss = ours.step(closure_of(model, ours, step))
        expected = closure_of(other, theirs, step)()
        theirs.step(closure=None)
        assert loss == expected
    assert_same(snapshot(ours, list(model.parameters())), snapshot(theirs, list(other.parameters())))


def test_inference_mode() -> None:
    params = parameters()
    optimizer = torch_optim.Adam(params)
    give(params, 0)
    with torch.inference_mode():
        optimizer.step()
    steps(optimizer, params, [1, 2])
    assert not any(tensor.is_inference() for p in params for tensor in optimizer.state[p].values())


def test_the_next_backward_of_a_stale_graph_raises() -> None:
    (param,) = parameters(shapes=((3,),))
    loss = (param * param).sum()
    param.grad = torch.ones(3)
    torch_optim.SGD([param]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_threads_queue() -> None:
    params = parameters(shapes=((100,),))
    optimizer = torch_optim.Adam(params, executor="compiled")
    give(params, 0)
    threads = [threading.Thread(target=lambda: [optimizer.step() for _ in range(100)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert float(optimizer.state[params[0]]["step"]) == 400


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_steps_on() -> None:
    params = parameters(shapes=((100,),))
    optimizer = torch_optim.Adam(params, executor="compiled")
    steps(optimizer, params, [0, 1])
    child = os.fork()
    if not child:
        optimizer.step()
        os._exit(0 if float(optimizer.state[params[0]]["step"]) == 3 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert float(optimizer.state[params[0]]["step"]) == 2


def test_two_parameters_that_share_memory_are_refused() -> None:
    base = torch.zeros(4)
    params = [torch.nn.Parameter(base[:3]), torch.nn.Parameter(base[1:])]
    optimizer = torch_optim.SGD(params)
    give(params, 0)
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step()
    assert not base.any()
    assert not optimizer.state


def test_what_the_first_steps_cost_later_ones_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """New gradient addresses, new learning rates and changing subsets take no long way after the first time."""
    from fused_kopt.borrowed import Borrower

    params = parameters()
    optimizer, calls = torch_optim.Adam(params, executor="compiled"), []
    anew = Borrower._anew
    monkeypatch.setattr(Borrower, "_anew", lambda *a: (calls.append(1), anew(*a))[1])
    for step in range(8):
        give(params, step)
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        if step % 2:
            params[3].grad = None
        optimizer.step()
    assert len(calls) == 2


def test_describe() -> None:
    model = mlp()
    optimizer = torch_optim.Adam(model.named_parameters(), clipnorm=1.0)
    found = optimizer.describe()
    assert "Adam: " in str(found)
    assert found.bytes_at_rest == 8 * sum(p.numel() for p in model.parameters())
    assert found.buckets[0].slots == ("exp_avg", "exp_avg_sq")
    assert not optimizer.state
    for param in model.parameters():
        param.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to describe"):
        optimizer.describe()
