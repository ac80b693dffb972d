"""Lion: the ninth optimizer, and what adding one takes."""

from typing import Any, NamedTuple

from typing_extensions import Unpack

from fused_kopt import op
from fused_kopt.execute import Rule
from fused_kopt.hyperparameters import Hyperparameter, Options, Step
from fused_kopt.optimizer import Optimizer
from fused_kopt.slots import Slot, SlotGroups


class Scalars(NamedTuple):
    learning_rate: float
    beta_1: float
    beta_2: float
    one_minus_beta_1: float
    one_minus_beta_2: float


def lion(p, g, slots, s):
    (m,) = slots
    direction = op.sign(m * s.beta_1 + g * s.one_minus_beta_1)
    return p - direction * s.learning_rate, (m * s.beta_2 + g * s.one_minus_beta_2,)


def derive(step: Step, rate: Any, beta_1: Any, beta_2: Any) -> Scalars:
    """A step's scalars. rate: its learning rate, in the step's dtype."""
    beta_1, beta_2 = step.number(beta_1), step.number(beta_2)
    return Scalars(rate, beta_1, beta_2, 1 - beta_1, 1 - beta_2)


class Lion(Optimizer):
    """Steps of one size in the sign of a momentum: `w -= lr * sign(beta_1 * m + (1 - beta_1) * g)`, old m.

    Then `m = beta_2 * m + (1 - beta_2) * g`. Slots: `m` (0).

    Args:
        learning_rate: number, 0-d tensor, callable or schedule. Default 0.0001.
        beta_1: weight of m in the step, in (0, 1] where it is a Python number; ValueError otherwise. Default 0.9.
        beta_2: decay of m. Default 0.99.
        name: default "Lion".
        **options: see fused_kopt.optimizer.Optimizer.

    Source: Chen et al., Symbolic discovery of optimization algorithms, 2023; Keras 2.15's Lion, on OptimizerV2's contract.
    """

    beta_1 = Hyperparameter()
    beta_2 = Hyperparameter(0.0, 1.0)

    def __init__(
        self, learning_rate: Any = 0.0001, beta_1: Any = 0.9, beta_2: Any = 0.99, name: str | None = "Lion", **options: Unpack[Options]
    ) -> None:
        if isinstance(beta_1, (int, float)) and not 0 < beta_1 <= 1:
            raise ValueError(f"`beta_1` must be in (0, 1]. Received: beta_1={beta_1}.")
        super().__init__(name, learning_rate, options)
        self.beta_1 = beta_1
        self.beta_2 = beta_2

    def slot_groups(self) -> SlotGroups:
        return ((Slot("m"),),)

    def rule(self) -> Rule:
        return lion

    def scalars(self, step: Step) -> Scalars:
        return derive(step, self._rate(step), self.beta_1, self.beta_2)

    def get_config(self) -> dict[str, Any]:
        return self._config(beta_1=self._value("beta_1"), beta_2=self._value("beta_2"))
