"""Every update rule of the package, found by constructing every optimizer in every variant."""

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from fused_kopt import optimizers
from fused_kopt.hyperparameters import Step
from fused_kopt.optimizer import Optimizer

# What decides which rule and which slots an optimizer has; every combination is built.
CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "SGD": {"momentum": (0.0, 0.9), "nesterov": (False, True)},
    "RMSprop": {"momentum": (0.0, 0.9), "centered": (False, True)},
    "Adam": {"amsgrad": (False, True)},
    "Ftrl": {"learning_rate_power": (-0.5, -0.7), "l2_shrinkage_regularization_strength": (0.0, 0.1)},
}


class Rule(NamedTuple):
    """A rule with its scalars' class and its number of slots, and an optimizer that runs it."""

    name: str
    function: Callable[..., Any]
    scalars: type
    slots: int
    optimizer: Optimizer


def variants() -> Iterator[Optimizer]:
    for name in sorted(optimizers.__all__):
        cls = getattr(optimizers, name)
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer:
            choices = CHOICES.get(name, {})
            for values in itertools.product(*choices.values()):
                yield cls(**dict(zip(choices, values, strict=True)))


def find() -> dict[str, Rule]:
    found: dict[str, Rule] = {}
    for optimizer in variants():
        count = sum(len(group) for group in optimizer.slot_groups())
        scalars = type(optimizer.scalars(Step(0, torch.float32)))
        for function in (optimizer.rule(), optimizer.sparse_rule(1), optimizer.sparse_rule(2)):
            found.setdefault(function.__name__, Rule(function.__name__, function, scalars, count, optimizer))
    return found


def written() -> set[str]:
    """The names of all public functions in the optimizers' modules that have a rule's signature."""
    modules = {inspect.getmodule(type(optimizer)) for optimizer in variants()}
    members = [member for module in modules for member in vars(module).values() if inspect.isfunction(member)]
    members = [member for member in members if not member.__name__.startswith("_")]  # what rules share
    return {f.__name__ for f in members if list(inspect.signature(f).parameters) == ["p", "g", "slots", "s"]}


RULES = find()
