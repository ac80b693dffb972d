"""Constructors, hyperparameters and configurations: what OptimizerV2 promises before and between steps."""

import copy
import inspect
import itertools
import json
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from fused_kopt import contract, optimizers
from fused_kopt.optimizer import Optimizer
from fused_kopt.optimizers import schedules

# Arguments in positional order, which is API, with their defaults. Source: tf.keras 2.15 legacy signatures (and Keras's Lion).
SIGNATURES: dict[str, dict[str, Any]] = {
    "SGD": {"learning_rate": 0.01, "momentum": 0.0, "nesterov": False, "name": "SGD"},
    "RMSprop": {"learning_rate": 0.001, "rho": 0.9, "momentum": 0.0, "epsilon": 1e-7, "centered": False, "name": "RMSprop"},
    "Adam": {"learning_rate": 0.001, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-7, "amsgrad": False, "name": "Adam"},
    "Adadelta": {"learning_rate": 0.001, "rho": 0.95, "epsilon": 1e-7, "name": "Adadelta"},
    "Adagrad": {"learning_rate": 0.001, "initial_accumulator_value": 0.1, "epsilon": 1e-7, "name": "Adagrad"},
    "Adamax": {"learning_rate": 0.001, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-7, "name": "Adamax"},
    "Nadam": {"learning_rate": 0.001, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-7, "name": "Nadam"},
    "Ftrl": {
        "learning_rate": 0.001,
        "learning_rate_power": -0.5,
        "initial_accumulator_value": 0.1,
        "l1_regularization_strength": 0.0,
        "l2_regularization_strength": 0.0,
        "name": "Ftrl",
        "l2_shrinkage_regularization_strength": 0.0,
        "beta": 0.0,
    },
    "Lion": {"learning_rate": 0.0001, "beta_1": 0.9, "beta_2": 0.99, "name": "Lion"},
}
# get_config's keys after name, the clips, learning_rate and decay.
KEYS = {
    "SGD": ["momentum", "nesterov"],
    "RMSprop": ["rho", "momentum", "epsilon", "centered"],
    "Adam": ["beta_1", "beta_2", "epsilon", "amsgrad"],
    "Adadelta": ["rho", "epsilon"],
    "Adagrad": ["initial_accumulator_value", "epsilon"],
    "Adamax": ["beta_1", "beta_2", "epsilon"],
    "Nadam": ["beta_1", "beta_2", "epsilon"],
    "Ftrl": [
        "initial_accumulator_value",
        "learning_rate_power",
        "l1_regularization_strength",
        "l2_regularization_strength",
        "beta",
        "l2_shrinkage_regularization_strength",
    ],
    "Lion": ["beta_1", "beta_2"],
}
HYPERS = {
    "SGD": ["momentum"],
    "RMSprop": ["rho", "momentum"],
    "Adam": ["beta_1", "beta_2"],
    "Adadelta": ["rho"],
    "Adagrad": [],
    "Adamax": ["beta_1", "beta_2"],
    "Nadam": ["beta_1", "beta_2"],
    "Ftrl": ["learning_rate_power", "l1_regularization_strength", "l2_regularization_strength", "beta"],
    "Lion": ["beta_1", "beta_2"],
}
every_class = pytest.mark.parametrize("name", SIGNATURES)


def make(name: str, /, *arguments: Any, **options: Any) -> Optimizer:
    optimizer: Optimizer = getattr(optimizers, name)(*arguments, **options)
    return optimizer


def step(optimizer: Optimizer, size: int = 3) -> Optimizer:
    optimizer.apply_gradients([(torch.ones(size), torch.ones(size))])
    return optimizer


def expected_config(name: str, values: dict[str, Any], decay: float = 0.0, **clips: float) -> dict[str, Any]:
    return {"name": values["name"], **clips, "learning_rate": values["learning_rate"], "decay": decay} | {k: values[k] for k in KEYS[name]}


@every_class
def test_signature(name: str) -> None:
    parameters = inspect.signature(getattr(optimizers, name)).parameters.values()
    assert {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD} == SIGNATURES[name]
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == list(SIGNATURES[name])
    assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == (["schedule_decay"] if name == "Nadam" else [])


@every_class
def test_positional_arguments_reach_their_place(name: str) -> None:
    odd = itertools.count(1)
    values = {k: {bool: True, str: "other"}.get(type(d)) or next(odd) / 16 * (-1) ** ("power" in k) for k, d in SIGNATURES[name].items()}
    config = make(name, *values.values(), clipvalue=3.0, clipnorm=2.0).get_config()
    decay = 0.004 if name == "Nadam" else 0.0
    assert list(config.items()) == list(expected_config(name, values, decay, clipnorm=2.0, clipvalue=3.0).items())


@every_class
def test_default_config_keys_in_order(name: str) -> None:
    config = make(name).get_config()
    assert list(config.items()) == list(expected_config(name, SIGNATURES[name], 0.004 if name == "Nadam" else 0.0).items())


@pytest.mark.parametrize("built", ["read", "step"])
@every_class
def test_config_values_pass_through_float32_once_live(name: str, built: str) -> None:
    optimizer, raw = make(name, name="x", decay=0.1), make(name, name="x", decay=0.1).get_config()
    _ = step(optimizer) if built == "step" else optimizer.learning_rate
    live = optimizer.get_config()
    rounded = {key: float(np.float32(raw[key])) for key in ["learning_rate", *HYPERS[name]]}
    assert list(live.items()) == list({**raw, **rounded}.items())
    assert live["decay"] == (0.004 if name == "Nadam" else 0.1)
    assert all(type(value) in (float, bool, str) for value in live.values())


@pytest.mark.parametrize("live", [False, True])
@every_class
def test_config_survives_json_and_makes_an_equal_optimizer(name: str, live: bool) -> None:
    optimizer, fresh = (make(name, np.float32(0.25), global_clipnorm=np.float32(2.0), decay=np.float64(0.5)) for _ in range(2))
    config = (step(optimizer) if live else optimizer).get_config()
    again = type(optimizer).from_config(json.loads(json.dumps(config)))
    assert (again.get_config(), config["global_clipnorm"]) == (config, 2.0)
    first, second = torch.ones(5), torch.ones(5)
    for o, v in ((fresh, first), (again, second)):
        for i in range(3):
            o.apply_gradients([(torch.arange(5.0) - i, v)])
    assert torch.equal(first, second)


SCHEDULES = [
    schedules.ExponentialDecay(0.5, 3, 0.5, staircase=True),
    schedules.PiecewiseConstantDecay([2, 4], [0.5, 0.25, 0.125], name="p"),
    schedules.CosineDecay(0.5, 10, warmup_target=0.75, warmup_steps=2),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", [n for n in SIGNATURES if n != "Nadam"])  # Adagrad: Keras keeps the dict and fails in the first step
def test_schedules_survive_the_config(name: str, schedule: schedules.LearningRateSchedule) -> None:
    optimizer = make(name, schedule)
    config = json.loads(json.dumps(optimizer.get_config()))
    again = type(optimizer).from_config(config)
    assert again.get_config() == optimizer.get_config() == {**config, "learning_rate": schedules.serialize(schedule)}
    assert type(again.learning_rate) is type(schedule)
    assert step(again).get_config()["learning_rate"] == config["learning_rate"]


def test_nadam_keeps_its_schedule_decay() -> None:
    config = optimizers.Nadam(schedule_decay=0.25).get_config()
    assert config["decay"] == 0.25
    again = optimizers.Nadam.from_config(config)  # Keras's drops it: it passes `decay`, which its constructor discards
    assert (again.get_config(), float(again.decay)) == (config, 0.25)
    assert optimizers.Nadam(decay=0.5).get_config()["decay"] == 0.004
    with pytest.raises(ValueError, match=r"Expected decay >= 0, received: -1\.0"):
        optimizers.Nadam(schedule_decay=-1.0)


@every_class
def test_from_config_leaves_its_argument_alone(name: str) -> None:
    config = make(name).get_config()
    config["lr"] = config.pop("learning_rate")
    if name != "Nadam":
        config["lr"] = schedules.serialize(SCHEDULES[0])
    before = copy.deepcopy(config)
    assert "lr" not in type(make(name)).from_config(config).get_config()
    assert config == before
    with pytest.raises(TypeError, match="Unexpected keyword argument passed to optimizer: extra"):
        type(make(name)).from_config({**config, "extra": 1})


def test_config_flattens_callables_and_tensors_and_leaves_functions_out() -> None:
    options: dict[str, Any] = {"gradient_aggregator": lambda pairs: pairs, "gradient_transformers": [lambda pairs: pairs]}
    optimizer = optimizers.Adam(lambda: 0.25, torch.tensor(0.5, dtype=torch.float64), lambda: torch.tensor(0.75), **options)
    config = optimizer.get_config()
    assert (config["learning_rate"], config["beta_1"], config["beta_2"]) == (0.25, 0.5, 0.75)
    assert list(config) == ["name", "learning_rate", "decay", *KEYS["Adam"]]
    assert optimizers.Adam(executor="reference", verify_every=3).get_config() == optimizers.Adam().get_config()


@pytest.mark.parametrize("given", [None, ""])
@every_class
def test_automatic_names(name: str, given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "_counts", {})
    snake = "rm_sprop" if name == "RMSprop" else name.lower()
    assert [make(name, name=given).get_config()["name"] for _ in range(3)] == [snake, f"{snake}_1", f"{snake}_2"]
    assert [make(name, name="twice").get_config()["name"] for _ in range(2)] == ["twice", "twice"]
    assert (hasattr(make(name), "name"), make(name)._name) == (False, name)


@pytest.mark.parametrize("zero", [None, 0, 0.0])
@pytest.mark.parametrize("name", [n for n in SIGNATURES if "epsilon" in SIGNATURES[n]])
def test_epsilon_zero_means_the_default(name: str, zero: float | None) -> None:
    assert make(name, epsilon=zero).get_config()["epsilon"] == 1e-7
    assert make(name, epsilon=-0.5).get_config()["epsilon"] == -0.5


@every_class
def test_lr_wins_over_learning_rate_except_in_ftrl(name: str) -> None:
    with pytest.warns(UserWarning, match="`lr` argument is deprecated"):
        optimizer = make(name, learning_rate=0.5, lr=0.25)
    assert optimizer.get_config()["learning_rate"] == (0.5 if name == "Ftrl" else 0.25)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(name, learning_rate=0.5, lr=0.25)
    assert [w.filename for w in caught] == [make.__code__.co_filename]  # it points at the caller, not into the package
