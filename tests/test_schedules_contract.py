"""The schedules' signatures, configs, errors and invariants."""

import copy
import inspect
import json
import pickle
import sys
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_kopt.optimizers import schedules
from fused_kopt.optimizers.schedules import (
    CosineDecay,
    CosineDecayRestarts,
    ExponentialDecay,
    InverseTimeDecay,
    LearningRateSchedule,
    PiecewiseConstantDecay,
    PolynomialDecay,
)

SIGNATURES = {
    "ExponentialDecay": "initial_learning_rate, decay_steps, decay_rate, staircase=False, name=None",
    "InverseTimeDecay": "initial_learning_rate, decay_steps, decay_rate, staircase=False, name=None",
    "PolynomialDecay": "initial_learning_rate, decay_steps, end_learning_rate=0.0001, power=1.0, cycle=False, name=None",
    "CosineDecay": "initial_learning_rate, decay_steps, alpha=0.0, name=None, warmup_target=None, warmup_steps=0",
    "CosineDecayRestarts": "initial_learning_rate, first_decay_steps, t_mul=2.0, m_mul=1.0, alpha=0.0, name=None",
    "PiecewiseConstantDecay": "boundaries, values, name=None",
}
ARGUMENTS = {name: (0.1, 10, 0.5)[: signature.count(",") + 1] for name, signature in SIGNATURES.items()}
ARGUMENTS["PiecewiseConstantDecay"] = ([3, 7], [0.1, 0.01, 0.001])


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_and_config_follow_keras(name):
    parameters = inspect.signature(getattr(schedules, name)).parameters.values()
    assert ", ".join(str(parameter.replace(annotation=parameter.empty)) for parameter in parameters) == SIGNATURES[name]
    schedule = getattr(schedules, name)(*ARGUMENTS[name])
    assert list(schedule.get_config()) == [parameter.name for parameter in parameters]
    assert type(schedule).from_config(schedule.get_config()).get_config() == schedule.get_config()


@pytest.mark.parametrize("form", ["ours", "keras", "short", "registered"])
@pytest.mark.parametrize("name", SIGNATURES)
def test_serialized_forms(name, form):
    schedule = getattr(schedules, name)(*ARGUMENTS[name], name="it")
    data = schedules.serialize(schedule)
    assert list(data) == ["module", "class_name", "config", "registered_name"]
    assert (data["module"], data["class_name"], data["registered_name"]) == ("fused_kopt.optimizers.schedules", name, None)
    changes = {"ours": data, "keras": {**data, "module": "keras.optimizers.schedules"}, "registered": {**data, "registered_name": name}}
    data = json.loads(json.dumps(changes.get(form, {"class_name": name, "config": data["config"]})))
    before = copy.deepcopy(data)
    again = schedules.deserialize(data)
    assert data == before
    assert type(again) is type(schedule)
    assert again.get_config() == schedule.get_config()


@pytest.mark.parametrize(
    "schedule",
    [
        CosineDecay(np.float64(0.1), np.int64(10), alpha=torch.tensor(0.1), warmup_target=np.float32(0.3), warmup_steps=torch.tensor(4)),
        ExponentialDecay(torch.tensor(0.1, dtype=torch.float64), 10, np.float32(0.96)),
        PiecewiseConstantDecay(np.array([5, 9]), np.array([0.1, 0.2, 0.3])),
        PiecewiseConstantDecay((5, 9), torch.tensor([0.1, 0.2, 0.3])),
    ],
)
def test_json_keeps_every_bit(schedule):
    again = schedules.deserialize(json.loads(json.dumps(schedules.serialize(schedule))))
    for step in range(15):
        assert again(step).dtype == schedule(step).dtype
        assert again(step) == schedule(step)


def test_reads_the_array_forms_of_keras():
    boundaries = {"class_name": "__numpy__", "config": {"value": [1, 2], "dtype": "int64"}}
    values = [{"class_name": "__tensor__", "config": {"value": 0.1, "dtype": "float64"}}, 0.2, 0.3]
    config = {"boundaries": boundaries, "values": values}
    assert schedules.deserialize({"class_name": "PiecewiseConstantDecay", "config": config})(1).dtype == torch.float64


@dataclass(eq=False)
class Warmup(LearningRateSchedule):
    after: LearningRateSchedule
    steps: int = 4

    def __call__(self, step):
        return self.after(step) * min(1.0, step / self.steps)


class Bare(LearningRateSchedule):
    pass


def test_user_classes_nest_and_are_found_by_name(monkeypatch):
    schedule = Warmup(Warmup(CosineDecay(0.1, 10)), 2)
    data = json.loads(json.dumps(schedules.serialize(schedule)))
    assert schedules.deserialize(data, {"Warmup": Warmup})(3) == schedule(3)
    monkeypatch.setitem(schedules._REGISTRY, "Warmup", Warmup)
    assert schedules.deserialize(data)(3) == schedule(3)


def test_data_never_imports_a_module():
    data = {**schedules.serialize(CosineDecay(0.1, 10)), "module": "antigravity"}
    assert isinstance(schedules.deserialize(data), CosineDecay)
    assert "antigravity" not in sys.modules


def nested(depth):
    config = {"class_name": "CosineDecay", "config": {"initial_learning_rate": 0.1, "decay_steps": 3}}
    for _ in range(depth):
        config = {"class_name": "Warmup", "config": {"after": config}}
    return config


def assigned():
    schedule = CosineDecay(0.1, 10)
    schedule.initial_learning_rate = 1
    return schedule(3)


@pytest.mark.parametrize(
    ("action", "error", "text"),
    [
        (lambda: LearningRateSchedule()(1), NotImplementedError, "LearningRateSchedule must define `__call__"),
        (lambda: Bare().get_config(), NotImplementedError, "Bare must define `get_config"),
        (lambda: schedules._Decay(0.1)(1), NotImplementedError, "^$"),
        (lambda: CosineDecay(1, 10), TypeError, r"`initial_learning_rate` must be a float \(1.0, not 1\).* initial_learning_rate=1"),
        (assigned, TypeError, "`initial_learning_rate` must be a float"),
        (lambda: CosineDecay(0.1, "10")(1), TypeError, "`decay_steps` must be .* Received: decay_steps='10'"),
        (lambda: CosineDecay(0.1, 10)(True), TypeError, "`step` must be .* Received: step=True"),
        (lambda: CosineDecay(0.1, 10)(2**64), TypeError, "64-bit integer.*step=18446744073709551616"),
        (lambda: CosineDecay(0.1, 10)(torch.zeros(1)), TypeError, "0-d tensor.*step=tensor"),
        (lambda: CosineDecay(0.1, 10)(torch.tensor(1j)), TypeError, "0-d tensor.*step=tensor"),
        (lambda: PiecewiseConstantDecay([1, 2], [0.1]), ValueError, "one more than `boundaries`. Received: 1 for 2"),
        (lambda: PiecewiseConstantDecay([20, 10], [1.0, 2.0, 3.0])(15), ValueError, r"must increase.*\[20, 10\], where step 15 is in 2"),
        (lambda: PiecewiseConstantDecay([1], [1.0, "a"])(2), TypeError, "`values` must be"),
        (lambda: schedules.serialize("CosineDecay"), TypeError, "must be a LearningRateSchedule. Received: 'CosineDecay'"),
        (lambda: schedules.serialize(type("CosineDecay", (CosineDecay,), {})(0.1, 10)), ValueError, "Rename your class"),
        (lambda: schedules.deserialize("CosineDecay"), ValueError, "must describe .* Received: 'CosineDecay'"),
        (lambda: schedules.deserialize({}), ValueError, "`class_name`"),
        (lambda: schedules.deserialize({"class_name": "CosineDecay"}), ValueError, "a dict `config`"),
        (lambda: schedules.deserialize({"class_name": "system", "config": {}}), ValueError, "'system'. Known: .*'CosineDecay'.*custom"),
        (lambda: schedules.deserialize({"class_name": [], "config": {}}), ValueError, "Unknown schedule"),
        (lambda: schedules.deserialize({"class_name": "A", "config": {}, "registered_name": "p>A"}, {"A": Bare}), ValueError, "'p>A'"),
        (lambda: schedules.deserialize({"class_name": "CosineDecay", "config": {"x": 1}}), TypeError, "unexpected keyword argument 'x'"),
        (lambda: schedules.deserialize({"class_name": "__tensor__", "config": {"dtype": "O"}}), ValueError, "'__tensor__'. Known"),
        (lambda: schedules.deserialize({"class_name": "__tensor__", "config": {"dtype": "int32"}}), ValueError, "must describe"),
        (lambda: schedules.deserialize(nested(20), {"Warmup": Warmup}), ValueError, "more than 8"),
    ],
)
def test_errors(action, error, text):
    with pytest.raises(error, match=text):
        action()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda schedule: pickle.loads(pickle.dumps(schedule))])
@pytest.mark.parametrize("name", SIGNATURES)
def test_copies_are_equal_and_calls_leave_no_trace(name, duplicate):
    schedule = getattr(schedules, name)(*ARGUMENTS[name])
    other, before = duplicate(schedule), copy.deepcopy(schedule.get_config())
    assert [other(step) for step in (9, 0, 9)] == [schedule(step) for step in (9, 0, 9)]
    assert other.get_config() == schedule.get_config() == before


def test_config_is_a_copy():
    boundaries = [3]
    schedule = PiecewiseConstantDecay(boundaries, [1.0, 2.0])
    boundaries.append(4)
    schedule.get_config()["values"].clear()
    assert schedule(3) == 1.0


RATES, FRACTIONS = st.floats(2**-20, 8, width=32), st.floats(0, 1, width=32)


@settings(deadline=None)
@given(RATES, RATES, FRACTIONS, FRACTIONS, st.integers(1, 10**6), st.integers(0, 10**7), st.booleans())
def test_values_stay_between_their_ends(rate, end, alpha, decay, length, step, flag):
    cases = [
        (ExponentialDecay(rate, length, decay, flag), 0, rate),
        (InverseTimeDecay(rate, length, decay, flag), 0, rate),
        (PolynomialDecay(rate, length, end, 1 + alpha, flag), min(rate, end), max(rate, end)),
        (CosineDecay(rate, length, alpha), alpha * rate, rate),
        (CosineDecay(rate, length, alpha, None, end, length // 2), min(alpha * end, rate), max(rate, end)),
        (CosineDecayRestarts(rate, length, 1 + 2 * decay, 1 - alpha / 2, alpha), alpha * rate, rate),
    ]
    for schedule, low, high in cases:
        slack = 4 * np.spacing(np.float32(high))  # four roundings
        assert low - slack <= schedule(step).item() <= high + slack, schedule


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**60), max_size=6), st.integers(0, 2**60))
def test_piecewise_is_a_left_bisection(boundaries, step):
    boundaries.sort()
    values = [float(i) for i in range(len(boundaries) + 1)]
    for now in {step, *boundaries}:
        assert PiecewiseConstantDecay(boundaries, values)(now) == bisect_left(boundaries, now)
