"""torch_optim's state: what it holds, resumption bit for bit, checkpoints of torch.optim, distributed checkpoints in one process."""

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from support import assert_same, bits
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    _init_optim_state,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch_classes import CASES, ONE_EACH, build, closure_of, give, mlp, parameters, snapshot, steps

from fused_kopt import torch_optim

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

each_case = pytest.mark.parametrize("case", CASES)
each_class = pytest.mark.parametrize("case", ONE_EACH.values(), ids=list(ONE_EACH))


def saved(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def by_pickle(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.slow(every=3)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@each_case
def test_what_a_state_holds(case: str, dtype: torch.dtype) -> None:
    """Tensors only: `step` and slots of the parameter's shape, in float32 for half precision; nothing before the first step."""
    params = parameters(dtype)
    optimizer = build(case, params)
    assert optimizer.state_dict()["state"] == {}
    steps(optimizer, params, range(2))
    for param in params:
        state = dict(optimizer.state[param])
        step = state.pop("step")
        assert (step.dtype, step.shape, step.device.type, float(step)) == (F32, (), "cpu", 2.0)
        assert state.pop("mu_product", torch.zeros((), dtype=F64)).dtype == F64
        for slot in state.values():
            assert slot.dtype == (F64 if dtype == F64 else F32)
            assert (slot.shape, slot.stride(), slot.requires_grad) == (param.shape, param.stride(), False)
    assert set(optimizer.state) == set(params)


@pytest.mark.slow(every=5)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("way", ["state_dict", "saved", "pickle", "deepcopy"])
@each_case
def test_resumption_is_bit_equal(case: str, way: str, dtype: torch.dtype) -> None:
    straight, params = parameters(dtype), parameters(dtype)
    reference, optimizer = build(case, straight, clipvalue=0.9), build(case, params, clipvalue=0.9)
    steps(reference, straight, range(6))
    steps(optimizer, params, range(3))
    if way in ("pickle", "deepcopy"):
        resumed = by_pickle(optimizer) if way == "pickle" else copy.deepcopy(optimizer)
        (group,) = resumed.param_groups
        new = group["params"]
    else:
        new = [torch.nn.Parameter(param.detach().clone()) for param in params]
        resumed = build(case, new, lr=77.0, clipvalue=0.9)
        resumed.load_state_dict(saved(optimizer.state_dict()) if way == "saved" else optimizer.state_dict())
    steps(optimizer, params, [10])  # shares nothing with the resumed one
    steps(resumed, new, range(3, 6))
    assert_same(snapshot(resumed, new), snapshot(reference, straight))
    assert resumed.clipvalue == 0.9


@each_class
def test_the_base_class_would_have_damaged_the_dtype(case: str) -> None:
    params = parameters(BF16)
    optimizer = build(case, params)
    steps(optimizer, params, [0])
    optimizer.load_state_dict(optimizer.state_dict())
    assert {t.dtype for p in params for t in optimizer.state[p].values()} <= {F32, F64}


def test_own_tensors_are_kept_and_foreign_ones_copied() -> None:
    params, others = parameters(), parameters()
    first, second = torch_optim.Adam(params), torch_optim.Adam(others)
    steps(first, params, [0])
    before = first.state[params[3]]["exp_avg"]
    first.load_state_dict(first.state_dict())
    assert first.state[params[3]]["exp_avg"] is before
    second.load_state_dict(first.state_dict())
    assert second.state[others[3]]["exp_avg"] is not before


def test_loaded_slots_lie_as_their_parameters() -> None:
    """Or every step would copy them."""
    params = parameters(shapes=((3, 4),))
    optimizer = torch_optim.SGD(params, momentum=0.9)
    steps(optimizer, params, [0])
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["momentum"] = state["state"][0]["momentum"].t().contiguous().t()
    optimizer.load_state_dict(state)
    assert optimizer.state[params[0]]["momentum"].stride() == (4, 1)


def test_states_that_third_parties_replace() -> None:
    """Lightning moves state tensors, offloading loops replace whole states: what lies in `state` counts."""
    params, others = parameters(), parameters()
    optimizer, reference = torch_optim.Nadam(params, executor="compiled"), torch_optim.Nadam(others, executor="reference")
    for step in range(6):
        steps(optimizer, params, [step])
        steps(reference, others, [step])
        for param in params:
            if step % 2:
                optimizer.state[param] = {name: tensor.clone() for name, tensor in optimizer.state[param].items()}
            else:
                optimizer.state[param].update({name: tensor.clone() for name, tensor in optimizer.state[param].items()})
    optimizer.state[params[3]]["step"].fill_(50)
    reference.state[others[3]]["step"].fill_(50)
    steps(optimizer, params, [9])
    steps(reference, others, [9])
    assert_same(snapshot(optimizer, params), snapshot(reference, others))
    assert float(optimizer.state[params[3]]["step"]) == 51


def test_hooks_of_state_dicts() -> None:
    params, order = parameters(), []
    optimizer = torch_optim.Adam(params)
    steps(optimizer, params, [0])
    optimizer.register_state_dict_pre_hook(lambda _: order.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, state: order.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {**state, "state": {}})
    optimizer.register_load_state_dict_post_hook(lambda o: order.append(f"loaded {len(o.state)}"))
    optimizer.load_state_dict(state_dict=optimizer.state_dict())
    assert order == ["before saving", "saved", "loaded 0"]
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


TORCH = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "RMSprop": {"lr": 0.01, "momentum": 0.9, "centered": True},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "Adadelta": {},
    "Adagrad": {"lr_decay": 0.1},
    "Adamax": {},
    "Nadam": {},
}


@pytest.mark.parametrize("name", TORCH)
def test_checkpoints_of_torch(name: str) -> None:
    """Loaded where the meaning is the same; SGD's and RMSprop's momentum gets the learning rate that Keras has in it."""
    params, others = parameters(F64, ((5,), (2, 3))), parameters(F64, ((5,), (2, 3)))
    theirs = getattr(torch.optim, "NAdam" if name == "Nadam" else name)(others, **TORCH[name])
    steps(theirs, others, range(3))
    for param, other in zip(params, others, strict=True):
        param.data = other.detach().clone()
    ours = getattr(torch_optim, name)(params)
    ours.load_state_dict(saved(theirs.state_dict()))
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
    sign = {"SGD": -1, "RMSprop": 1}.get(name, 0)
    for param, other in zip(params, others, strict=True):
        state = dict(theirs.state[other])
        if sign:
            assert torch.equal(ours.state[param]["momentum"], sign * ours.param_groups[0]["lr"] * state.pop("momentum_buffer"))
        for key, value in state.items():
            assert torch.equal(ours.state[param][key], value.to(ours.state[param][key].dtype)), key
    steps(ours, params, [7])
    steps(theirs, others, [7])
    # one more step is torch's but for epsilon's place and hyperparameters in float32: both small beside gradients of about 1
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6 if name != "RMSprop" else 1e-5)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adamax", "Nadam", "Adagrad", "Adadelta"])
def test_torch_loads_ours(name: str) -> None:
    params = parameters()
    ours = getattr(torch_optim, name)(params)
    steps(ours, params, range(3))
    theirs = getattr(torch.optim, "NAdam" if name == "Nadam" else name)(params)
    theirs.load_state_dict(saved(ours.state_dict()))
    steps(theirs, params, [3])
    assert float(theirs.state[params[0]]["step"]) == 4


def test_groups_after_loading() -> None:
    """Saved settings win, ours that torch lacks get their defaults, a name stays."""
    model = mlp()
    theirs = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.25)
    ours = torch_optim.Adam(model.named_parameters())
    ours.load_state_dict({"state": {}, "param_groups": [{"lr": 0.5, "params": [0, 1, 2, 3]}]})
    assert (ours.param_groups[0]["lr"], ours.param_groups[0]["eps"]) == (0.5, 1e-7)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    assert ours.decoupled(ours.param_groups[0])
    ours.add_param_group({"params": [("more", torch.nn.Parameter(torch.zeros(2)))]})
    assert "differentiable" not in ours.param_groups[1]


@pytest.mark.parametrize("flat", [False, True])
@each_class
def test_distributed_checkpoint(case: str, flat: bool) -> None:
    """In one process: the dummy step that makes states moves and counts nothing, and a resumed run has the same bits."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    straight, model, other = mlp(), mlp(), mlp(1)
    reference, optimizer, resumed = (build(case, m.parameters()) for m in (straight, model, other))
    for step in range(6):
        closure_of(straight, reference, step)()
        reference.step()
    for step in range(3):
        optimizer.step(closure_of(model, optimizer, step))
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, resumed, state, options=options)
    for step in range(3, 6):
        resumed.step(closure_of(other, resumed, step))
    assert_same(snapshot(resumed, list(other.parameters())), snapshot(reference, list(straight.parameters())))


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
@each_class
def test_the_dummy_step_of_distributed_checkpoints(case: str, lr: Any) -> None:
    params, others = parameters(), parameters()
    optimizer, reference = build(case, params, lr=lr), build(case, others, lr=lr)
    _init_optim_state(optimizer)
    assert_same([bits(p) for p in params], [bits(p) for p in others])
    assert all(float(optimizer.state[p]["step"]) == 0 for p in params)
    steps(optimizer, params, range(3))
    steps(reference, others, range(3))
    assert_same(snapshot(optimizer, params), snapshot(reference, others))


def test_a_warmup_from_zero_counts() -> None:
    params = parameters()
    optimizer = torch_optim.Adam(params, lr=0.0)
    steps(optimizer, params, [0])
    assert float(optimizer.state[params[0]]["step"]) == 1
    assert bool(optimizer.state[params[3]]["exp_avg"].any())


def test_values_of_groups_are_plain() -> None:
    """numpy's scalars would not load with weights_only."""
    optimizer = torch_optim.Adam(parameters(), lr=np.float64(0.5), betas=[np.float32(0.5), 0.75], weight_decay=1)
    group = saved(optimizer.state_dict())["param_groups"][0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["amsgrad"]) == (0.5, (0.5, 0.75), 1.0, False)
    assert {type(group[name]) for name in ("lr", "eps", "weight_decay")} == {float}


def test_a_schedule_of_numpy_can_be_saved() -> None:
    optimizer = torch_optim.Adam(parameters())
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: np.cos(epoch + 1.0))
    assert type(saved(optimizer.state_dict())["param_groups"][0]["lr"]) is float


def test_replaced_states_and_gradients_are_freed() -> None:
    params = parameters(shapes=((9,), (20_000,)))
    optimizer = torch_optim.Adam(params, executor="compiled")
    steps(optimizer, params, range(3))
    slots = [weakref.ref(optimizer.state[p]["exp_avg"]) for p in params]
    gradients = [weakref.ref(p.grad) for p in params]
    for param in params:
        optimizer.state[param] = {name: tensor.clone() for name, tensor in optimizer.state[param].items()}
    optimizer.zero_grad()
    gc.collect()
    assert [ref() for ref in (*slots, *gradients)] == [None] * 4


def test_a_file_of_one_parameter_is_small() -> None:
    """Slots are tensors of their own, no views of a common buffer; counters are, with 4 bytes per parameter."""
    params = parameters(shapes=((10,), (100_000,)))
    optimizer = torch_optim.Adam(params)
    steps(optimizer, params, [0])
    file = io.BytesIO()
    torch.save(optimizer.state[params[0]], file)
    assert len(file.getvalue()) < 5000


def test_deepcopies_are_separate() -> None:
    model = mlp()
    optimizer = torch_optim.Adam(model.parameters())
    optimizer.step(closure_of(model, optimizer, 0))
    twin, other = copy.deepcopy((model, optimizer))
    assert next(iter(other.state)) is next(twin.parameters())
    give(list(twin.parameters()), 1)
    other.step()
    assert float(optimizer.state[model[0].weight]["step"]) == 1
