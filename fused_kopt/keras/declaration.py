"""What an optimizer declares: everything else about its step is shared."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from fused_kopt.execute import Rule


class Step(NamedTuple):
    """What an optimizer's scalars are derived from, in float64."""

    rate: float
    """The learning rate of this step."""
    t: int
    """Counts updates from 1; accumulating calls are none."""
    read: Callable[[Any], float]
    """The value of a 0-d Keras variable."""


def _nothing(optimizer: Any, step: Step) -> Sequence[tuple[Any, float]]:
    return ()


class Declaration(NamedTuple):
    """A stock Keras class, and its step as a rule: functions of an instance, evaluated in every step."""

    stock: type
    slots: Callable[[Any], tuple[str, ...]]
    """In the rule's order: the attributes that hold a slot variable for each trainable variable."""
    rule: Callable[[Any], Rule]
    scalars: Callable[[Any, Step], Any]
    """A NamedTuple of the rule's scalars, in float64; they are rounded to the compute dtype once."""
    exact: Callable[[Any], bool] = lambda optimizer: True
    """Whether executors owe each other equal bits."""
    carried: Callable[[Any, Step], Sequence[tuple[Any, float]]] = _nothing
    """0-d variables that a step moves on, with their new values."""


def divide(x: float, y: float) -> float:
    """x / y as IEEE has it: inf or NaN where Python raises."""
    with np.errstate(all="ignore"):
        return float(np.float64(x) / np.float64(y))


def bias_correction(beta: float, t: int) -> float:
    """1 - beta^t."""
    return 1.0 - float(beta) ** t


def root(x: float) -> float:
    """The square root; NaN below zero."""
    return math.sqrt(x) if x >= 0 else math.nan


def constant(*rows: Any) -> Callable[[torch.dtype], Sequence[Any]]:
    """Scalars rounded once to a compute dtype."""

    def rounded(dtype: torch.dtype) -> Sequence[Any]:
        with np.errstate(over="ignore"):
            table = np.array(rows, dtype=np.float64 if dtype == torch.float64 else np.float32)
        return [row._make(numbers) for row, numbers in zip(rows, table.tolist(), strict=True)]

    return rounded
