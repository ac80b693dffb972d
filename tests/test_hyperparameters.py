"""The life of a hyperparameter: raw, live, written, replaced."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_config import HYPERS, SIGNATURES, every_class, make, step
from torch import Tensor

from fused_kopt import SGD, Adam, RMSprop, optimizers
from fused_kopt.optimizer import Optimizer
from fused_kopt.optimizers.schedules import ExponentialDecay, LearningRateSchedule

DECAYING = ExponentialDecay(0.5, 1, 0.5)


def test_a_negative_rate_is_applied_with_a_warning() -> None:
    variable = torch.ones(3)
    with pytest.warns(UserWarning, match=r"`learning_rate`=-0\.5 lies outside \[0\.0, inf\)"):
        optimizer = SGD(-0.5)
    optimizer.apply_gradients([(torch.ones(3), variable)])
    assert variable.tolist() == [1.5] * 3


@every_class
def test_numbers_are_raw_until_the_first_read_and_live_after(name: str) -> None:
    optimizer = make(name, 1)
    assert (optimizer.get_config()["learning_rate"], optimizer.weights) == (1, [])
    hypers = {key: getattr(optimizer, key) for key in ["learning_rate", "decay", *HYPERS[name]]}
    assert all(type(h) is Tensor and (h.dtype, h.dim(), h.device.type) == (torch.float32, 0, "cpu") for h in hypers.values())
    assert (optimizer.weights, optimizer.get_slot_names()) == ([], [])
    step(optimizer)
    assert all(getattr(optimizer, key) is h for key, h in hypers.items())
    assert not any(weight is h for weight in optimizer.weights for h in hypers.values())


@every_class
def test_writing_a_live_hyperparameter_keeps_its_tensor(name: str) -> None:
    optimizer = make(name)
    for key in ["learning_rate", *HYPERS[name]]:
        held = getattr(optimizer, key)
        for value in (0.25, np.float64(0.125), torch.tensor(0.5, dtype=torch.float64), 0):
            setattr(optimizer, key, value)
            assert (getattr(optimizer, key) is held, float(held)) == (True, float(value)), (key, value)
        held.fill_(0.0625)
        assert optimizer.get_config()[key] == 0.0625


def halve(optimizer: Any) -> None:
    optimizer.lr = optimizer.lr * 0.5


def test_a_rate_written_in_place_is_the_next_steps_rate() -> None:
    optimizer, variable = SGD(1.0), torch.zeros(2)
    seen = []
    writes = [lambda: None, lambda: optimizer.lr.mul_(0.5), lambda: halve(optimizer), lambda: setattr(optimizer, "lr", 3)]
    for write in writes:
        write()
        variable.zero_()
        optimizer.apply_gradients([(torch.ones(2), variable)])
        seen.append(float(variable[0]))
    assert seen == [-1.0, -0.5, -0.25, -3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_users_tensor_is_kept_by_identity(dtype: torch.dtype) -> None:
    rate = torch.tensor(0.5, dtype=dtype)
    optimizer = SGD(rate)
    assert step(optimizer).learning_rate is optimizer.lr is rate
    optimizer.learning_rate = 0.25
    assert (optimizer.learning_rate is rate, float(rate)) == (True, 0.25)
    assert copy.deepcopy(optimizer).learning_rate is not rate


def test_replaced_values_stay_what_they_are() -> None:
    optimizer = SGD(lambda: 0.5)
    assert (optimizer.learning_rate, step(optimizer).learning_rate) == (0.5, 0.5)
    optimizer.learning_rate = 0.25  # over a callable: a bare number, although the others are live
    assert type(optimizer.learning_rate) is float
    optimizer.lr = DECAYING
    assert optimizer.learning_rate is DECAYING
    variable = torch.zeros(1)
    assert optimizer.apply_gradients([(torch.ones(1), variable)]) == 2
    assert float(variable) == -0.25  # the schedule at iterations = 1
    optimizer.learning_rate = lambda: torch.tensor(2.0)
    assert optimizer.apply_gradients([(torch.ones(1), variable)]) == 3
    assert float(variable) == -2.25


COUNTED = [(n, h) for n in SIGNATURES for h in ["learning_rate", *HYPERS[n]] if h != "learning_rate_power"]  # which chooses the rule too


@pytest.mark.parametrize(("name", "hyper"), COUNTED)
def test_callables_are_called_once_per_device_and_dtype(name: str, hyper: str) -> None:
    calls = []
    optimizer = make(name)
    setattr(optimizer, hyper, lambda: calls.append(1) or 0.5)
    variables = [torch.ones(2), torch.ones(3, dtype=torch.float64), torch.ones(4), torch.ones(2, dtype=torch.float64)]
    assert not calls
    optimizer.apply_gradients([(torch.ones_like(v), v) for v in variables])
    assert len(calls) == 2
    assert (getattr(optimizer, hyper), optimizer.get_config()[hyper], len(calls)) == (0.5, 0.5, 4)


def test_lr_is_an_alias() -> None:
    optimizer = Adam(0.5)
    assert {"lr", "learning_rate"} <= set(dir(optimizer))
    assert optimizer.lr is optimizer.learning_rate
    optimizer.lr = 0.25
    assert (float(optimizer.learning_rate), optimizer.get_config()["learning_rate"]) == (0.25, 0.25)


def run(optimizer: Optimizer, change: Callable[[Any], object] = lambda optimizer: None, steps: int = 2) -> Tensor:
    """The variable after a step, `change`, and more steps."""
    variable = torch.linspace(-1, 1, 7)
    for i in range(steps + 1):
        optimizer.apply_gradients([(torch.linspace(2, -3, 7) + i, variable)])
        if i == 0:
            change(optimizer)
    return variable


def setting(key: str, value: Any) -> Callable[[Any], object]:
    return lambda optimizer: setattr(optimizer, key, value)


INERT = [
    *(pytest.param(n, {"decay": 0.5}, "decay", 4.0, id=f"{n}-decay") for n in SIGNATURES),
    pytest.param("SGD", {}, "momentum", 0.5, id="SGD-momentum"),
    pytest.param("SGD", {"momentum": np.float32(0)}, "momentum", 0.5, id="SGD-momentum-numpy"),
    pytest.param("RMSprop", {}, "momentum", 0.5, id="RMSprop-momentum"),
]
# plain attributes and hyperparameters whose new value counts from the next step on
EFFECTIVE = [
    ("SGD", {"momentum": 0.5}, "momentum", 0.0), ("SGD", {"momentum": 0.5}, "nesterov", True),
    ("RMSprop", {"momentum": 0.5}, "momentum", 0.0), ("RMSprop", {}, "epsilon", 0.5), ("RMSprop", {}, "rho", 0.5),
    ("Adam", {}, "beta_1", 0.5), ("Adam", {}, "epsilon", 0.5), ("Adadelta", {"learning_rate": 1.0}, "rho", 0.5),
    ("Adagrad", {}, "epsilon", 0.5), ("Adamax", {}, "beta_2", 0.5), ("Nadam", {}, "_initial_decay", 0.5), ("Lion", {}, "beta_2", 0.0),
    ("Ftrl", {}, "beta", 0.5), ("Ftrl", {}, "_l2_shrinkage_regularization_strength", 0.5), ("Ftrl", {}, "learning_rate_power", -0.25),
    *((n, {"decay": 0.5}, "_initial_decay", 4.0) for n in SIGNATURES),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "key", "value"), INERT)
def test_inert_after_construction(name: str, options: dict[str, Any], key: str, value: float) -> None:
    optimizer = make(name, **options)
    assert torch.equal(run(optimizer, setting(key, value)), run(make(name, **options)))
    assert float(getattr(optimizer, key)) == value
    assert "momentum" not in optimizer.get_slot_names()


@pytest.mark.parametrize(("name", "options", "key", "value"), EFFECTIVE)
def test_effective_from_the_next_step(name: str, options: dict[str, Any], key: str, value: float) -> None:
    changed, kept = run(make(name, **options), setting(key, value)), run(make(name, **options))
    assert not torch.equal(changed, kept)
    assert torch.equal(run(make(name, **options), setting(key, value), 0), run(make(name, **options), steps=0))


@pytest.mark.parametrize("momentum", [lambda: 0.0, torch.tensor(0.0), 0.5], ids=["callable", "tensor", "number"])
@pytest.mark.parametrize("cls", [SGD, RMSprop])
def test_momentum_path_is_fixed_at_construction(cls: type[Any], momentum: Any) -> None:
    optimizer = cls(momentum=momentum)
    run(optimizer, setting("momentum", 0.0))
    assert "momentum" in optimizer.get_slot_names()


def test_amsgrad_turned_on_later_appends_vhat() -> None:
    optimizer = Adam()
    first, second = torch.ones(2), torch.ones(3)
    optimizer.apply_gradients([(torch.ones(2), first), (torch.ones(3), second)])
    before = list(optimizer.weights)
    optimizer.amsgrad = True
    optimizer.apply_gradients([(torch.zeros(2), first), (torch.ones(3), second)])
    assert [id(w) for w in optimizer.weights[:5]] == [id(w) for w in before]
    assert [w is optimizer.get_slot(v, "vhat") for w, v in zip(optimizer.weights[5:], (first, second), strict=True)] == [True, True]
    assert torch.equal(optimizer.get_slot(first, "vhat"), optimizer.get_slot(first, "v"))


def test_unknown_attributes() -> None:
    optimizer: Any = optimizers.Adam()
    with pytest.raises(AttributeError, match="lerning_rate"):
        _ = optimizer.lerning_rate
    optimizer.lerning_rate = 0.5
    assert optimizer.lerning_rate == 0.5


class Warmup(LearningRateSchedule):
    def __call__(self, step: Any) -> Tensor:
        assert (type(step), step.dim()) == (Tensor, 0)
        return step.double() * 2

    def get_config(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decay_divides_what_a_schedule_returns(dtype: torch.dtype) -> None:
    optimizer, variable = SGD(Warmup(), decay=1.0), torch.zeros(1, dtype=dtype)
    for iterations in range(4):
        variable.zero_()
        optimizer.apply_gradients([(torch.ones(1, dtype=dtype), variable)])
        assert float(variable) == -float(torch.tensor(2 * iterations, dtype=dtype) / (1 + iterations))
