"""RMSprop, plain or centered, with or without momentum."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from typing_extensions import Unpack

from fused_kopt import op
from fused_kopt.contract import without_iterations
from fused_kopt.execute import Rule
from fused_kopt.hyperparameters import Hyperparameter, Options, Step, check_fraction, fuzz
from fused_kopt.optimizer import Optimizer
from fused_kopt.slots import Slot, SlotGroups
from fused_kopt.updates import SparseRows


class Scalars(NamedTuple):
    learning_rate: float
    rho: float
    one_minus_rho: float
    momentum: float
    epsilon: float
    one: float


# Keras has two code paths: without momentum epsilon stands outside the root, with momentum inside.


def rmsprop(p, g, slots, s):
    (rms,) = slots
    rms = rms * s.rho + g * g * s.one_minus_rho
    return p - op.div(g * s.learning_rate, op.sqrt(rms) + s.epsilon), (rms,)


def centered(p, g, slots, s):
    rms, mean = slots
    rms = rms * s.rho + g * g * s.one_minus_rho
    mean = mean * s.rho + g * s.one_minus_rho
    return p - op.div(g * s.learning_rate, op.sqrt(rms - mean * mean) + s.epsilon), (rms, mean)


def with_momentum(p, g, slots, s):
    rms, velocity = slots
    rms = rms + (g * g - rms) * s.one_minus_rho
    velocity = velocity * s.momentum + op.div(g * s.learning_rate, op.sqrt(rms + s.epsilon))
    return p - velocity, (rms, velocity)


def centered_with_momentum(p, g, slots, s):
    rms, velocity, mean = slots
    rms = rms + (g * g - rms) * s.one_minus_rho
    mean = mean + (g - mean) * s.one_minus_rho
    velocity = velocity * s.momentum + op.div(g * s.learning_rate, op.sqrt(rms - mean * mean + s.epsilon))
    return p - velocity, (rms, velocity, mean)


# Keras's sparse operation with momentum has yet another order: one over the root first.


def sparse_with_momentum(p, g, slots, s):
    rms, velocity = slots
    rms = rms * s.rho + g * g * s.one_minus_rho
    velocity = velocity * s.momentum + op.div(s.one, op.sqrt(rms + s.epsilon)) * s.learning_rate * g
    return p - velocity, (rms, velocity)


def sparse_centered_with_momentum(p, g, slots, s):
    rms, velocity, mean = slots
    rms = rms * s.rho + g * g * s.one_minus_rho
    mean = mean * s.rho + g * s.one_minus_rho
    velocity = velocity * s.momentum + op.div(s.one, op.sqrt(rms + s.epsilon - mean * mean)) * s.learning_rate * g
    return p - velocity, (rms, velocity, mean)


def derive(step: Step, rate: Any, rho: Any, momentum: Any, epsilon: float) -> Scalars:
    """A step's scalars. rate: its learning rate, in the step's dtype."""
    rho = step.number(rho)
    return Scalars(rate, rho, 1 - rho, step.number(momentum), step.exact(epsilon), step.exact(1.0))


class RMSprop(Optimizer):
    """Divides the gradient by a running root mean square: `rms = rho * rms + (1 - rho) * g^2`.

    Without momentum `w -= lr * g / (sqrt(rms) + epsilon)`; with it `v = momentum * v + lr * g / sqrt(rms + epsilon);
    w -= v`. `centered` subtracts the square of the running mean from `rms`; without momentum that difference can round
    below zero and give NaN, as in Keras. Slots: `rms` (0), `momentum` (0, if used), `mg` (0, if centered).

    Args:
        learning_rate: number, 0-d tensor, callable or schedule. Default 0.001.
        rho: decay of the averages. Default 0.9.
        momentum: in [0, 1] where it is a Python number; ValueError otherwise. Default 0.
        epsilon: default 1e-7, which 0 and None mean as well.
        centered: default False.
        name: default "RMSprop".
        **options: see fused_kopt.optimizer.Optimizer.

    Source: Keras OptimizerV2; Hinton, Neural Networks for Machine Learning, lecture 6e, 2012.
    """

    rho = Hyperparameter(0.0, 1.0)
    momentum = Hyperparameter()

    def __init__(
        self,
        learning_rate: Any = 0.001,
        rho: Any = 0.9,
        momentum: Any = 0.0,
        epsilon: float | None = 1e-7,
        centered: bool = False,
        name: str | None = "RMSprop",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(name, learning_rate, options)
        check_fraction("momentum", momentum)
        self._has_momentum = bool(callable(momentum) or isinstance(momentum, Tensor) or momentum > 0)
        self.rho = rho
        self.momentum = momentum
        self.epsilon = fuzz(epsilon)
        self.centered = centered

    @property
    def sparse_rows(self) -> SparseRows:  # type: ignore[override]
        """Keras decays the state of all rows without momentum, and of the touched rows with it."""
        return "touched" if self._has_momentum else "state"

    def slot_groups(self) -> SlotGroups:
        names = ["rms", *["momentum"] * self._has_momentum, *["mg"] * self.centered]
        return tuple((Slot(name, positive=name == "rms"),) for name in names)

    def rule(self) -> Rule:
        if self._has_momentum:
            return centered_with_momentum if self.centered else with_momentum
        return centered if self.centered else rmsprop

    def sparse_rule(self, rank: int) -> Rule:
        if not self._has_momentum:
            return self.rule()
        return sparse_centered_with_momentum if self.centered else sparse_with_momentum

    def scalars(self, step: Step) -> Scalars:
        return derive(step, self._rate(step), self.rho, self.momentum, self.epsilon)

    def _compatible(self, weights: Sequence[Any]) -> Sequence[Any]:
        return without_iterations(weights, len(self.weights))

    def get_config(self) -> dict[str, Any]:
        return self._config(rho=self._value("rho"), momentum=self._value("momentum"), epsilon=self.epsilon, centered=self.centered)
