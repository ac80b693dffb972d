"""What a provider is, and ours."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch.nn import Parameter

from fused_kopt import SGD, Adadelta, Adagrad, Adam, Adamax, Ftrl, Lion, Nadam, RMSprop
from fused_kopt.execute import Executor
from fused_kopt.optimizer import Optimizer
from perf.cases import RATE, Case, Runner, Tensors

INTERPRETED_ELEMENTS = 100_000  # the interpreter takes a second for so many
INTERPRETED_TENSORS = 100
REFERENCE_TENSORS = 2_000  # 0.2 ms each

OURS: dict[str, Callable[[Executor, float | None], Optimizer]] = {
    "sgd": lambda executor, clip: SGD(RATE, executor=executor, global_clipnorm=clip),
    "momentum": lambda executor, clip: SGD(RATE, momentum=0.9, executor=executor, global_clipnorm=clip),
    "rmsprop": lambda executor, clip: RMSprop(RATE, executor=executor, global_clipnorm=clip),
    "adam": lambda executor, clip: Adam(RATE, executor=executor, global_clipnorm=clip),
    "adadelta": lambda executor, clip: Adadelta(RATE, executor=executor, global_clipnorm=clip),
    "adagrad": lambda executor, clip: Adagrad(RATE, executor=executor, global_clipnorm=clip),
    "adamax": lambda executor, clip: Adamax(RATE, executor=executor, global_clipnorm=clip),
    "nadam": lambda executor, clip: Nadam(RATE, executor=executor, global_clipnorm=clip),
    "ftrl": lambda executor, clip: Ftrl(RATE, executor=executor, global_clipnorm=clip),
    "lion": lambda executor, clip: Lion(RATE, executor=executor, global_clipnorm=clip),
}


class Cost(NamedTuple):
    """Roughly what Adam costs on two CPU cores. Only sampling and skipping rely on it."""

    ns_per_element: float
    us_per_tensor: float
    temporary_bytes: float = 0.0
    """Per element, on any device."""

    def seconds(self, elements: int, tensors: int) -> float:
        """Of one step."""
        return elements * self.ns_per_element * 1e-9 + tensors * self.us_per_tensor * 1e-6


class Provider(ABC):
    """A library and one of its ways to execute a step."""

    name: ClassVar[str]
    averages: ClassVar[bool] = False
    """Whether it can keep a moving average of the variables."""
    cost: Cost

    def __init__(self, executor: str, cost: Cost) -> None:
        self.executor = executor
        self.cost = cost

    @property
    def key(self) -> str:
        """How the command line calls it."""
        return f"{self.name}-{self.executor}"

    @property
    def ours(self) -> bool:
        """Whether a failure is this project's own."""
        return self.name.startswith("fused_kopt")

    def why_not(self, case: Case) -> str | None:
        """Why the case cannot or should not run here, or None."""
        if case.averaged and not self.averages:
            return "it keeps no average of the variables"
        return self.unsuitable(case)

    @abstractmethod
    def unsuitable(self, case: Case) -> str | None:
        """`why_not`, for what is special about the provider."""

    @abstractmethod
    def slot_bytes(self, case: Case) -> float:
        """Bytes of one element of one slot."""

    @abstractmethod
    def make(self, case: Case, tensors: Tensors) -> Runner:
        """An optimizer on the tensors, as the library's users write it."""


class Borrowed(Provider):
    """fused_kopt, with variables and gradients where they are."""

    name = "fused_kopt"
    executor: Executor

    def unsuitable(self, case: Case) -> str | None:
        small = len(case.shapes) <= INTERPRETED_TENSORS and case.elements <= INTERPRETED_ELEMENTS
        if self.executor == "triton" and case.device.type == "cpu" and not small:
            return f"the interpreter takes seconds beyond {INTERPRETED_ELEMENTS:,} elements or {INTERPRETED_TENSORS} tensors"
        if self.executor == "reference" and len(case.shapes) > REFERENCE_TENSORS:
            return f"the reference takes seconds beyond {REFERENCE_TENSORS:,} tensors"
        return unavailable(self.executor, case.optimizer, case.dtype, case.device)

    def slot_bytes(self, case: Case) -> float:
        return max(4, case.dtype.itemsize)

    def make(self, case: Case, tensors: Tensors) -> Runner:
        optimizer, variables = OURS[case.optimizer](self.executor, case.clip), tensors.variables
        return tensors.runner(lambda: optimizer.apply_gradients(zip((v.grad for v in variables), variables, strict=True)))


class Flat(Borrowed):
    """fused_kopt, with variables and gradients moved into flat buffers: its own copies, so that the peers keep theirs."""

    name = "fused_kopt-flat"

    def unsuitable(self, case: Case) -> str | None:
        if not hasattr(Optimizer, "flatten"):
            return "Optimizer.flatten does not exist in this version"
        if case.variant == "fresh":
            return "gradients live in the flat buffer and do not change address"
        return super().unsuitable(case)

    def make(self, case: Case, tensors: Tensors) -> Runner:
        optimizer: Any = OURS[case.optimizer](self.executor, case.clip)
        variables = [Parameter(v.detach().clone()) for v in tensors.variables]
        flat = optimizer.flatten(variables)
        for variable, given in zip(variables, tensors.variables, strict=True):
            assert variable.grad is not None
            assert given.grad is not None
            variable.grad.copy_(given.grad)
        return Runner(lambda: optimizer.apply_gradients(flat), variables, lambda: None)


@functools.cache
def unavailable(executor: Executor, optimizer: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why our executor is not available on a device, or None: tried on one element. Other failures are the run's to report."""
    variable = torch.ones(1, dtype=dtype, device=device)
    try:
        OURS[optimizer](executor, None).apply_gradients([(torch.ones_like(variable), variable)])
    except RuntimeError as error:
        return str(error) if "is not available" in str(error) else None
    return None
