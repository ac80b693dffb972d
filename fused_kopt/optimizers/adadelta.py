"""Adadelta."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from typing_extensions import Unpack

from fused_kopt import op
from fused_kopt.contract import without_iterations
from fused_kopt.execute import Rule
from fused_kopt.hyperparameters import Hyperparameter, Options, Step, fuzz
from fused_kopt.optimizer import Optimizer
from fused_kopt.slots import Slot, SlotGroups


class Scalars(NamedTuple):
    learning_rate: float
    rho: float
    one_minus_rho: float
    epsilon: float
    one: float


def adadelta(p, g, slots, s):
    gradients, updates = slots
    gradients = gradients * s.rho + g * g * s.one_minus_rho
    # one over the root first: Keras multiplies by it
    update = op.sqrt(updates + s.epsilon) * op.div(s.one, op.sqrt(gradients + s.epsilon)) * g
    updates = updates * s.rho + update * update * s.one_minus_rho
    return p - update * s.learning_rate, (gradients, updates)


def derive(step: Step, rate: Any, rho: Any, epsilon: float) -> Scalars:
    """A step's scalars. rate: its learning rate, in the step's dtype."""
    rho = step.number(rho)
    return Scalars(rate, rho, 1 - rho, step.exact(epsilon), step.exact(1.0))


class Adadelta(Optimizer):
    """Steps in the variable's own units: `u = sqrt(d + epsilon) / sqrt(a + epsilon) * g; w -= lr * u`.

    `a = rho * a + (1 - rho) * g^2` before, `d = rho * d + (1 - rho) * u^2` after; d does not contain lr. Slots:
    `accum_grad` (a, 0), `accum_var` (d, 0).

    Args:
        learning_rate: number, 0-d tensor, callable or schedule. Default 0.001 (the paper's method has 1.0).
        rho: decay of the averages. Default 0.95.
        epsilon: default 1e-7, which 0 and None mean as well.
        name: default "Adadelta".
        **options: see fused_kopt.optimizer.Optimizer.

    Source: Keras OptimizerV2; Zeiler, ADADELTA: an adaptive learning rate method, 2012.
    """

    rho = Hyperparameter(0.0, 1.0)

    def __init__(
        self,
        learning_rate: Any = 0.001,
        rho: Any = 0.95,
        epsilon: float | None = 1e-7,
        name: str | None = "Adadelta",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(name, learning_rate, options)
        self.rho = rho
        self.epsilon = fuzz(epsilon)

    def slot_groups(self) -> SlotGroups:
        return ((Slot("accum_grad", positive=True),), (Slot("accum_var", positive=True),))

    def rule(self) -> Rule:
        return adadelta

    def scalars(self, step: Step) -> Scalars:
        return derive(step, self._rate(step), self.rho, self.epsilon)

    def _compatible(self, weights: Sequence[Any]) -> Sequence[Any]:
        return without_iterations(weights, len(self.weights))

    def get_config(self) -> dict[str, Any]:
        return self._config(rho=self._value("rho"), epsilon=self.epsilon)
