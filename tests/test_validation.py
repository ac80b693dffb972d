"""What constructors and assignments refuse, and with which words."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_config import SIGNATURES, make, step

from fused_kopt import Adadelta, Adam, Ftrl, Nadam
from fused_kopt.optimizer import Optimizer
from fused_kopt.optimizers.schedules import ExponentialDecay

DECAYING = ExponentialDecay(0.5, 1, 0.5)
PAIRS: list[Callable[[Any], Any]] = [lambda pairs: pairs]
HEAVY = ("SGD", "RMSprop")
CLIPS = ("clipnorm", "clipvalue", "global_clipnorm")
UNKNOWN = (TypeError, r"Unexpected keyword argument passed to optimizer: typo\. Allowed kwargs are .*clipnorm.*decay.*lr")

# Checks of the base class, in Keras's order: the first offender in the order given decides.
EVERY_CLASS_REFUSES = [
    ({"typo": 1}, *UNKNOWN),
    ({"clipnorm": -1.0, "typo": 1}, ValueError, r"Expected clipnorm >= 0, received: -1\.0"),
    ({"typo": 1, "clipnorm": -1.0}, *UNKNOWN),
    *(({clip: -0.5}, ValueError, rf"Expected {clip} >= 0, received: -0\.5") for clip in CLIPS),
    *(({clip: "1"}, TypeError, "not supported between instances of 'str' and 'int'") for clip in CLIPS),
    ({"lr": -1.0}, ValueError, r"Expected lr >= 0, received: -1\.0"),
    ({"clipnorm": 1.0, "global_clipnorm": 0.0}, ValueError, "Cannot accept both `clipnorm` and `global_clipnorm`"),
    *(({clip: 0.0, "gradient_transformers": PAIRS}, ValueError, rf"`gradient_transformers` cannot.*{clip}") for clip in CLIPS),
    ({"executor": "cuda"}, ValueError, r"`executor` must be one of .*'triton'.*Received: executor='cuda'"),
    ({"verify_every": -1}, ValueError, r"`verify_every` must be an int >= 0 .*Received: verify_every=-1"),
    ({"learning_rate": "0.1"}, TypeError, r"`learning_rate` must be a number.*Received: learning_rate='0\.1'"),
    ({"learning_rate": None}, TypeError, "`learning_rate` must be a number.*None"),
    ({"learning_rate": 1j}, TypeError, "`learning_rate` must be a number.*1j"),
    ({"learning_rate": torch.ones(1)}, ValueError, r"`learning_rate` as a tensor must be 0-d and floating.*\(1,\)"),
    ({"learning_rate": torch.tensor(1)}, ValueError, "`learning_rate` as a tensor must be 0-d and floating.*int64"),
]
REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    *((n, options, error, text) for n in SIGNATURES for options, error, text in EVERY_CLASS_REFUSES),
    *((n, {"decay": -1e-9}, ValueError, "Expected decay >= 0, received: -1e-09") for n in SIGNATURES if n != "Nadam"),
    *((n, {"decay": None}, TypeError, "'<' not supported") for n in SIGNATURES if n != "Nadam"),
    *((n, {"momentum": m}, ValueError, r"`momentum` must be between \[0, 1\]") for n in HEAVY for m in (-0.1, 2, np.float64(1.5))),
    *((n, {"momentum": m}, TypeError, "`momentum` must be a number") for n in HEAVY for m in (None, "a")),
    *(("Adagrad", {"initial_accumulator_value": v}, ValueError, "positive or zero") for v in (-0.1, np.float32(-1))),
    ("Adagrad", {"initial_accumulator_value": -1, "typo": 1}, ValueError, "initial_accumulator_value=-1"),
    ("Adagrad", {"initial_accumulator_value": None}, TypeError, "not supported between"),
    ("Nadam", {"learning_rate": DECAYING}, ValueError, "Nadam does not support schedules.*ExponentialDecay"),
    ("Nadam", {"learning_rate": DECAYING, "typo": 1}, ValueError, "Nadam does not support schedules"),
    ("Ftrl", {"learning_rate_power": 0.5}, ValueError, r"`learning_rate_power` needs to be negative or zero\. .*power=0\.5"),
    ("Ftrl", {"learning_rate_power": np.float32(0.5)}, ValueError, "negative or zero"),
    ("Ftrl", {"l1_regularization_strength": -1, "typo": 1}, *UNKNOWN),
    *(
        ("Ftrl", {key: -1}, ValueError, f"`{key}` needs to be positive or zero. Received: {key}=-1")
        for key in SIGNATURES["Ftrl"]
        if key.startswith(("initial", "l1", "l2"))
    ),
    *(("Lion", {"beta_1": b}, ValueError, r"`beta_1` must be in \(0, 1\]\. Received: beta_1=") for b in (0.0, -0.5, 1.5, math.nan)),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:The `lr` argument is deprecated")
@pytest.mark.parametrize(("name", "options", "error", "text"), REFUSED)
def test_constructor_refuses(name: str, options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        make(name, **options)
    assert caught.type is error


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((n, {"clipnorm": 0.0, "clipvalue": 0}) for n in SIGNATURES),
        ("Nadam", {"decay": -1.0}),  # discarded before it is looked at
        ("SGD", {"momentum": np.float32(1.5)}),  # no Python float: Keras lets it pass
        ("Ftrl", {"beta": -1.0}),
        ("Adam", {"beta_1": -1e-300, "epsilon": -1.0, "clipnorm": None, "gradient_transformers": PAIRS}),
    ],
)
@pytest.mark.filterwarnings("ignore:`beta_1`=-1e-300")
def test_constructor_accepts(name: str, options: dict[str, Any]) -> None:
    config = make(name, **options).get_config()
    assert all(config[key] == value for key, value in options.items() if key in config and key != "decay")


WRONG = [
    ("0.5", TypeError),
    (None, TypeError),
    ([0.5], TypeError),
    (torch.ones(2), ValueError),
    (torch.ones((), device="meta"), ValueError),
]
HELD = [(Adam(), "beta_1"), (Adadelta(), "rho"), (Ftrl(), "beta"), (Nadam(), "lr")]


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize(("value", "error"), WRONG, ids=repr)
@pytest.mark.parametrize(("optimizer", "key"), HELD)
def test_assignment_refuses(optimizer: Optimizer, key: str, value: Any, error: type[Exception], live: bool) -> None:
    optimizer = step(copy.deepcopy(optimizer)) if live else copy.deepcopy(optimizer)
    before = optimizer.get_config()
    with pytest.raises(error, match="must be"):
        setattr(optimizer, key, value)
    assert optimizer.get_config() == before
