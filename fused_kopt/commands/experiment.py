"""What `fused-kopt precision` measures: one task trained under a precision policy, beside the same training in float64."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_kopt import execute, precision
from fused_kopt.commands.tasks import Task
from fused_kopt.memory import MemoryEstimate, estimate_memory
from fused_kopt.optimizer import Optimizer
from fused_kopt.optimizers import SGD, Adadelta, Adagrad, Adam, Adamax, Ftrl, Lion, Nadam, RMSprop
from fused_kopt.precision import Precision

LAST_RATE = 0.01
"""The learning rate at the end, of that at the beginning: steps become small, and rounding shows."""
POINTS = 40
"""How often weights are compared with the oracle's."""
CONTROL = "bf16_plain"
"""Neither master nor stochastic rounding, and slots of bfloat16 too: what must lag behind, or the task shows nothing."""
POLICIES: Mapping[str, Precision] = {**precision.NAMED, CONTROL: Precision(slots="bfloat16")}
ORACLE = "float64"

# First learning rates, by trial: float32 learns both tasks.
OPTIMIZERS: dict[str, tuple[Any, float, dict[str, float]]] = {
    "sgd": (SGD, 0.1, {"momentum": 0.9}),
    "rmsprop": (RMSprop, 3e-3, {}),
    "adam": (Adam, 3e-3, {}),
    "adadelta": (Adadelta, 5.0, {}),
    "adagrad": (Adagrad, 0.1, {}),
    "adamax": (Adamax, 0.01, {}),
    "nadam": (Nadam, 3e-3, {}),
    "ftrl": (Ftrl, 0.07, {"initial_accumulator_value": 0.0}),
    "lion": (Lion, 1e-3, {}),
}


class Point(NamedTuple):
    """Weights beside the oracle's after a step, in units of how far these are from where both began."""

    step: int
    error: float
    """Root mean square of the difference."""
    bias: float
    """The mean signed difference along the oracle's way: -0.1 lags 10% behind."""


@dataclass(frozen=True)
class Run:
    """A policy trained from one seed."""

    policy: str
    seed: int
    losses: list[float]
    """Of each step's batch, before the step."""
    points: list[Point]
    loss: float
    """Of the samples held out, in nats, after the last step."""
    accuracy: float
    """The fraction of these that are predicted correctly."""
    memory: MemoryEstimate
    allocated: int
    """Bytes that variables, gradients and the optimizer's weights were found to take."""


@dataclass
class Training:
    """A network in training: weights as a policy stores them, computed in float32 (float64 for the oracle).

    Each batch's loss and gradients are computed from the variables, widened; gradients of bfloat16 variables are rounded to it.
    """

    task: Task
    optimizer: Optimizer
    model: nn.Module
    variables: dict[str, Tensor]
    decay: float
    """What the learning rate is multiplied by after every step."""
    losses: list[float] = field(default_factory=list)
    gradients: Sequence[Tensor] = ()

    @property
    def widened(self) -> dict[str, Tensor]:
        """What the network computes with."""
        return {name: v.float() if v.dtype == torch.bfloat16 else v for name, v in self.variables.items()}

    def step(self, batch: Tensor) -> None:
        """One step."""
        loss = self.task.loss(self.model, self.widened, batch)
        self.gradients = torch.autograd.grad(loss, list(self.variables.values()))
        self.optimizer.apply_gradients(zip(self.gradients, self.variables.values(), strict=True))
        self.optimizer.learning_rate = float(self.optimizer.learning_rate) * self.decay
        self.losses.append(float(loss.detach()))

    def weights(self) -> Tensor:
        """All that the variables stand for, float64 [elements]."""
        return torch.cat([self.optimizer.get_master(v).detach().double().flatten() for v in self.variables.values()])

    def evaluate(self) -> tuple[float, float]:
        """The loss and the accuracy on what is held out."""
        return self.task.evaluate(self.model, {name: v.detach() for name, v in self.widened.items()})

    def allocated(self) -> int:
        """Bytes of variables, gradients and slots as they lie in memory; padding aside."""
        weights = [weight for weight in self.optimizer.weights if weight.dim()]
        return sum(t.nbytes for t in (*self.variables.values(), *self.gradients, *weights))


def begin(task: Task, optimizer: str, policy: str, seed: int, steps: int) -> Training:
    """A training before its first step. All policies begin from the same numbers: the seed's, rounded to bfloat16."""
    dtype = {ORACLE: torch.float64, "float32": torch.float32}.get(policy, torch.bfloat16)
    model, initial = task.initial(seed)
    variables = {name: value.bfloat16().to(dtype).requires_grad_() for name, value in initial.items()}
    cls, rate, options = OPTIMIZERS[optimizer]
    made = cls(rate, precision=precision.DEFAULT if policy == ORACLE else POLICIES[policy], **options)
    if execute.why_not_compiled(torch.device("cpu")) is None:
        made.executor = "compiled"  # `auto` would take the reference for so few elements: the same bits, several times slower
    made.build(variables.values())
    # Ftrl's rate scales the whole variable, not only its steps
    return Training(task, made, model, variables, 1.0 if optimizer == "ftrl" else LAST_RATE ** (1 / steps))


def compare(weights: Tensor, oracle: Tensor, first: Tensor, step: int) -> Point:
    """A Point from weights, float64 [elements] all."""
    way, difference = oracle - first, weights - oracle
    length = way.square().sum()
    return Point(step, float((difference.square().sum() / length).sqrt()), float((difference * way).sum() / length))


@dataclass
class Experiment:
    """A task, an optimizer and a number of steps; `run` trains every policy and the oracle from one seed."""

    task: Task
    optimizer: str
    steps: int

    def run(self, policies: Sequence[str], seed: int, advance: Callable[[str], object] = lambda _: None) -> list[Run]:
        """The oracle's Run, then each policy's. advance: called after every step with the policy's name."""
        every = max(1, self.steps // POINTS)
        kept: dict[int, Tensor] = {}
        found = []
        for policy in (ORACLE, *policies):
            training = begin(self.task, self.optimizer, policy, seed, self.steps)
            kept.setdefault(0, training.weights())
            points = []
            for step, batch in enumerate(self.task.batches(self.steps, seed), 1):
                training.step(batch)
                if step % every == 0 or step == self.steps:
                    weights = training.weights()
                    points.append(compare(weights, kept.setdefault(step, weights), kept[0], step))
                advance(policy)
            memory = estimate_memory(training.variables.values(), training.optimizer)
            found.append(Run(policy, seed, training.losses, points, *training.evaluate(), memory, training.allocated()))
        return found


def per_element(memory: MemoryEstimate) -> tuple[float, float]:
    """Bytes of an element at rest, gradient included, and moved per step: of a large variable, for which padding does not count."""
    (bucket,) = memory.buckets
    planes, own = sum(plane.per_element for plane in bucket.planes), bucket.dtype.itemsize
    return 2 * own + planes, 3 * own + 2 * planes
