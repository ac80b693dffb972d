"""What users write: torch's words or Keras's, numbers of any kind, options; checked, and turned into plain groups."""

import math
from collections.abc import Mapping
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor

from fused_kopt import precision, tensors
from fused_kopt.clipping import Clips
from fused_kopt.execute import EXECUTORS, Executor
from fused_kopt.hyperparameters import NUMBER
from fused_kopt.precision import Precision


class Default(float):
    """A number that stands in a signature: told apart from the same number given by the caller."""


class Options(TypedDict, total=False):
    """The keyword arguments that every optimizer accepts besides its own."""

    learning_rate: float | Tensor
    beta_1: float
    beta_2: float
    epsilon: float | None
    decay: float
    schedule_decay: float
    clipvalue: float | None
    clipnorm: float | None
    global_clipnorm: float | None
    executor: Executor
    precision: str | Precision | Mapping[str, Any]
    amp: Literal["fused"] | None
    stats_every: int
    foreach: bool | None
    fused: bool | None
    maximize: bool
    capturable: bool
    differentiable: bool


class WithRho(Options, total=False):
    """The same, and Keras's word for `alpha`."""

    rho: float


# Keras's words for keys of parameter groups.
SPELLINGS = {"learning_rate": "lr", "epsilon": "eps", "rho": "alpha", "decay": "lr_decay", "schedule_decay": "momentum_decay"}
BETAS = ("beta_1", "beta_2")
OWN = {"clipvalue": None, "clipnorm": None, "global_clipnorm": None, "executor": "auto", "amp": None, "stats_every": 0}
# What is refused unless it is as here, and what to do instead.
REFUSED: dict[str, tuple[Any, str]] = {
    "maximize": (False, "Minimize the negative loss."),
    "dampening": (0, "Keras's momentum has none."),
    "differentiable": (False, "No gradient flows through a fused step."),
    "capturable": (False, "A CUDA graph can capture a step of fused_kopt.Adam and the others, see its prepare_replays()."),
}
_POSITIVE, _FRACTION, _BELOW_ONE = (0.0, math.inf, "[]"), (0.0, 1.0, "[]"), (0.0, 1.0, "[)")
RANGES = {
    "lr": _POSITIVE,
    "eps": _POSITIVE,
    "weight_decay": _POSITIVE,
    "momentum": _FRACTION,
    "alpha": _BELOW_ONE,
    "rho": _BELOW_ONE,
    "lr_decay": _POSITIVE,
    "momentum_decay": _POSITIVE,
    "initial_accumulator_value": _POSITIVE,
    "learning_rate_power": (-math.inf, 0.0, "[]"),
    "l1_regularization_strength": _POSITIVE,
    "l2_regularization_strength": _POSITIVE,
    "l2_shrinkage_regularization_strength": _POSITIVE,
    "beta": _POSITIVE,
    "beta_1": _BELOW_ONE,
    "beta_2": _BELOW_ONE,
}


def split(cls: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keras's words for group keys, and our own options, among a constructor's keywords. Raises TypeError or ValueError."""
    unknown = sorted(set(options) - set(WithRho.__annotations__))
    if unknown:
        allowed = ", ".join(Options.__annotations__)
        raise TypeError(f"{cls} got an unexpected keyword argument {unknown[0]!r}. Allowed besides its own: {allowed}.")
    refuse(cls, options)
    own = {name: options.get(name, value) for name, value in OWN.items()}
    check_clips(Clips(1.0, own["clipvalue"], own["clipnorm"], own["global_clipnorm"]))
    if own["executor"] not in EXECUTORS:
        raise ValueError(f"`executor` must be one of {EXECUTORS}. Received: executor={own['executor']!r}.")
    if own["amp"] not in (None, "fused"):
        raise ValueError(f"`amp` must be None or 'fused'. Received: amp={own['amp']!r}.")
    return {name: value for name, value in options.items() if name in SPELLINGS or name in BETAS}, own


def check_clips(clips: Clips) -> None:
    """Raises TypeError or ValueError for limits that are no numbers >= 0, and for two limits on norms."""
    for name, value in clips._asdict().items():
        if value is not None and not isinstance(value, NUMBER):
            raise TypeError(f"`{name}` must be a number >= 0 or None. Received: {name}={value!r}.")
        if value is not None and not value >= 0:
            raise ValueError(f"`{name}` must be a number >= 0 or None. Received: {name}={value!r}.")
    if clips.clipnorm is not None and clips.global_clipnorm is not None:
        given = f"clipnorm={clips.clipnorm}, global_clipnorm={clips.global_clipnorm}"
        raise ValueError(f"`clipnorm` and `global_clipnorm` exclude each other, as in Keras. Received: {given}. Pass one of them.")


def refuse(cls: str, values: Mapping[str, Any]) -> None:
    """Raises ValueError for settings of torch.optim that no step here has."""
    for name, (idle, instead) in REFUSED.items():
        if values.get(name, idle) != idle:
            raise ValueError(f"{cls} does not support {name}={values[name]!r}. {instead}")


def respelled(cls: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Given values under the keys of parameter groups, as plain numbers. known: the class's keys, with values for what is not given.

    Raises TypeError for a value given in both spellings, or in one that the class lacks; ValueError out of range.
    """
    found = {name: value for name, value in given.items() if name in known or not (name in SPELLINGS or name in BETAS)}
    for keras, key in SPELLINGS.items():
        if keras in given and keras not in known:
            _refuse_twice(cls, keras, key, known, found.get(key))
            found[key] = given[keras]
    if any(keras in given for keras in BETAS):
        own = _pair(found["betas"]) if "betas" in found else (None, None)
        betas = list(_pair(found.get("betas", known.get("betas", (0.0, 0.0)))))
        for position, keras in enumerate(BETAS):
            if keras in given:
                _refuse_twice(cls, keras, "betas", known, own[position])
                betas[position] = given[keras]
        found["betas"] = tuple(betas)
    if found.get("eps", 0.0) is None:
        found["eps"] = 1e-7  # what None means to Keras
    found = {name: plain(name, value) if name in known else value for name, value in found.items()}
    _check_ranges(found)
    return found


def _refuse_twice(cls: str, keras: str, key: str, known: Mapping[str, Any], other: Any) -> None:
    if key not in known:
        raise TypeError(f"{cls} has no `{keras}`. It has {', '.join(known)}.")
    if other is not None and not isinstance(other, Default):
        raise TypeError(f"{cls}: `{keras}` and `{key}` are the same value, in Keras's words and in torch's. Pass one of them.")


def _pair(betas: Any) -> tuple[Any, Any]:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"`betas` must be two numbers. Received: betas={betas!r}.")
    return betas[0], betas[1]


def plain(name: str, value: Any) -> Any:
    """A value as checkpoints keep it: numpy's and Keras's scalars as Python's; 0-d tensors stay, schedulers write into them."""
    if name == "betas":
        return tuple(plain(one, beta) for one, beta in zip(BETAS, _pair(value), strict=True))
    if name == "precision":
        return precision.serialize(precision.get(value))
    if name not in RANGES:  # a switch
        return bool(value)
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.dtype.is_floating_point:
            raise ValueError(f"`{name}` as a tensor must be 0-d and floating. Received: {tensors.describe(value)}.")
        return value
    if not isinstance(value, NUMBER) and not (isinstance(value, np.ndarray) and value.ndim == 0):
        raise TypeError(f"`{name}` must be a number or a 0-d tensor. Received: {name}={value!r}.")
    return float(value)


def _check_ranges(values: Mapping[str, Any]) -> None:
    flat = {**values, **dict(zip(BETAS, values.get("betas", ()), strict=False))}
    for name, (low, high, ends) in RANGES.items():
        value = flat.get(name)
        if isinstance(value, float) and not (low <= value < high or (ends == "[]" and value == high != math.inf)):
            raise ValueError(f"`{name}` must be in {ends[0]}{low}, {high}{')' if high == math.inf else ends[1]}. Received: {name}={value}.")


def check_parameters(given: Any, index: int) -> Any:
    """A group's parameters, in a list. Raises ValueError for one given twice, TypeError for one that no step can update."""
    if isinstance(given, (Tensor, set)):  # torch takes one tensor, and refuses a set
        return given
    given = list(given)
    seen: dict[int, str] = {}
    for position, item in enumerate(given):
        label, param = item if isinstance(item, tuple) and len(item) == 2 else (position, item)
        what = f"parameter {label!r} of group {index}"
        if id(param) in seen:
            raise ValueError(f"{what} is {seen[id(param)]} once more: it would be updated twice. Give every parameter once.")
        seen[id(param)] = what
        if isinstance(param, Tensor) and param.requires_grad and param.dtype not in tensors.FLOATING:
            allowed = "float16, bfloat16, float32 or float64"
            raise TypeError(f"{what} must be floating point ({allowed}), got {param.dtype}. Leave it out of the list.")
    return given


def name(group: Mapping[str, Any], index: int, position: int) -> str:
    """How messages call a parameter of the group `index`: by its name, if it was given with one, and its shape."""
    param = group["params"][position]
    label = repr(group["param_names"][position]) if "param_names" in group else f"{position} of group {index}"
    return f"parameter {label} {tuple(param.shape) if isinstance(param, torch.Tensor) else type(param).__name__}"
