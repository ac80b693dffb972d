"""Every optimizer in every variant, and the kernels that they run."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from fused_kopt import SGD, Adadelta, Adagrad, Adam, Adamax, Ftrl, Lion, Nadam, RMSprop, slots
from fused_kopt.execute import Rule
from fused_kopt.hyperparameters import Step
from fused_kopt.optimizer import Optimizer

# Every rule, and the clipping before it. The first word is what `--optimizer` selects.
VARIANTS: dict[str, Callable[[], Optimizer]] = {
    "sgd": lambda: SGD(0.1),
    "sgd momentum": lambda: SGD(0.1, momentum=0.9),
    "sgd nesterov": lambda: SGD(0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda: RMSprop(0.01),
    "rmsprop momentum": lambda: RMSprop(0.01, momentum=0.9),
    "rmsprop centered": lambda: RMSprop(0.01, centered=True),
    "rmsprop centered momentum": lambda: RMSprop(0.01, momentum=0.9, centered=True),
    "adam": lambda: Adam(0.01),
    "adam amsgrad": lambda: Adam(0.01, amsgrad=True),
    "adam clipvalue decay": lambda: Adam(0.01, clipvalue=0.5, decay=0.1),
    "adadelta": lambda: Adadelta(1.0),
    "adagrad": lambda: Adagrad(0.1),
    "adamax": lambda: Adamax(0.01),
    "nadam": lambda: Nadam(0.01),
    "ftrl": lambda: Ftrl(0.1, l1_regularization_strength=0.01, l2_regularization_strength=0.1, beta=0.1),
    "ftrl shrinkage": lambda: Ftrl(0.1, l2_shrinkage_regularization_strength=0.1),
    "ftrl power": lambda: Ftrl(0.1, learning_rate_power=-0.3),
    "ftrl power shrinkage": lambda: Ftrl(0.1, learning_rate_power=-0.3, l2_shrinkage_regularization_strength=0.1),
    "lion": lambda: Lion(0.01),
}
OPTIMIZERS = tuple(dict.fromkeys(name.split()[0] for name in VARIANTS))
ELEMENTS = 1 << 26  # of a variable, where a command measures or computes times: far beyond any cache
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}


class Kernel(NamedTuple):
    """One rule, and an optimizer that runs it."""

    name: str
    rule: Rule
    optimizer: Optimizer

    @property
    def slots(self) -> int:
        """How many slots the rule reads and writes."""
        return len(slots.flatten(self.optimizer.slot_groups()))

    @property
    def scalars(self) -> type:
        """The NamedTuple of the step's scalars."""
        return type(self.optimizer.scalars(Step(0, torch.float32)))

    def bytes_per_element(self, variable: torch.dtype, gradient: torch.dtype) -> int:
        """What a step must move: the variable and each slot once in and once out, the gradient once in."""
        slot = 8 if variable == torch.float64 else 4
        return 2 * variable.itemsize + gradient.itemsize + 2 * slot * self.slots


def selected(optimizer: str | None) -> list[str]:
    """The variants of one optimizer, or of all."""
    return [name for name in VARIANTS if optimizer in (None, name.split()[0])]


def kernels(optimizer: str | None) -> list[Kernel]:
    """The distinct rules of one optimizer, or of all: for dense gradients, and for sparse ones where Keras rounds otherwise."""
    found: dict[str, Kernel] = {}
    for made in (VARIANTS[name]() for name in selected(optimizer)):
        for rule in (made.rule(), made.sparse_rule(1), made.sparse_rule(2)):
            found.setdefault(rule.__name__, Kernel(rule.__name__, rule, made))
    return list(found.values())
