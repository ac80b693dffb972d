"""Keras's own optimizers beside ours: the same gradients to both."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import torch
from torch import Tensor

import fused_kopt.keras

NAMES = ("SGD", "RMSprop", "Adam", "AdamW", "Adadelta", "Adagrad", "Adamax", "Nadam", "Ftrl", "Lion")
# A class and its own options.
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in NAMES} | {
    "momentum": ("SGD", {"momentum": 0.9}),
    "nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "rmsprop momentum": ("RMSprop", {"momentum": 0.5}),
    "centered": ("RMSprop", {"centered": True}),
    "centered momentum": ("RMSprop", {"centered": True, "momentum": 0.5}),
    "amsgrad": ("Adam", {"amsgrad": True}),
    "amsgrad decayed": ("AdamW", {"amsgrad": True, "weight_decay": 0.1}),
    "ftrl l1 l2": ("Ftrl", {"l1_regularization_strength": 0.01, "l2_regularization_strength": 0.1, "beta": 0.1}),
    "ftrl shrunk": ("Ftrl", {"l2_shrinkage_regularization_strength": 0.1, "initial_accumulator_value": 1.0}),
    "ftrl power": ("Ftrl", {"learning_rate_power": -0.7}),
}
# What every class takes.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "clipnorm": {"clipnorm": 0.5},
    "global_clipnorm": {"global_clipnorm": 1.0},
    "clipvalue": {"clipvalue": 0.1},
    "ema": {"use_ema": True, "ema_momentum": 0.9},
    "ema overwrites": {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 7},
    "accumulation": {"gradient_accumulation_steps": 3},
    "loss scale": {"loss_scale_factor": 8.0},
    "all": {
        "weight_decay": 0.1,
        "global_clipnorm": 1.0,
        "use_ema": True,
        "ema_overwrite_frequency": 4,
        "gradient_accumulation_steps": 3,
        "loss_scale_factor": 8.0,
    },
}
SHAPES: Sequence[tuple[int, ...]] = ((), (0,), (1,), (7,), (3, 5, 2), (33,))
RATE, STEPS = 0.01, 60


def ours(case: str, **options: Any) -> Any:
    name, own = CLASSES[case]
    return getattr(fused_kopt.keras, name)(**{"learning_rate": RATE, **own, **options})


def theirs(case: str, **options: Any) -> Any:
    name, own = CLASSES[case]
    return getattr(keras.optimizers, name)(**{"learning_rate": RATE, **own, **options})


def variables(shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: str = "float32") -> list[Any]:
    generator = np.random.default_rng(1)
    return [keras.Variable(generator.normal(size=shape), dtype=dtype, name=f"v{i}") for i, shape in enumerate(shapes)]


def gradients(step: int, shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: str = "float32") -> list[Tensor]:
    """Six decades: that is where epsilon's place shows."""
    generator = np.random.default_rng(step)
    arrays = [generator.normal(size=shape) * 10.0 ** generator.uniform(-5, 1, size=shape) for shape in shapes]
    return [torch.from_numpy(np.asarray(array)).to(getattr(torch, dtype)) for array in arrays]


def train(optimizer: Any, steps: int = STEPS, dtype: str = "float32", shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[np.ndarray]:
    """The variables after so many steps."""
    trained = variables(shapes, dtype)
    for step in range(steps):
        optimizer.apply(gradients(step, shapes, dtype), trained)
    return values(trained)


def values(variables_: Sequence[Any]) -> list[np.ndarray]:
    return [variable.value.detach().double().numpy() for variable in variables_]


def distance(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> float:
    """The largest difference between two lists of arrays; inf where one is NaN."""
    gaps = [np.abs(a - b) for a, b in zip(first, second, strict=True)]
    return max((float(np.nan_to_num(gap, nan=np.inf).max()) for gap in gaps if gap.size), default=0.0)
