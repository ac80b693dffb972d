"""Adamax."""

from typing import Any, NamedTuple

from typing_extensions import Unpack

from fused_kopt import op
from fused_kopt.execute import Rule
from fused_kopt.hyperparameters import Hyperparameter, Options, Step, fuzz
from fused_kopt.optimizer import Optimizer
from fused_kopt.slots import Slot, SlotGroups


class Scalars(NamedTuple):
    alpha: float
    beta_1: float
    beta_2: float
    one_minus_beta_1: float
    epsilon: float


def adamax(p, g, slots, s):
    m, v = slots
    m = m + (g - m) * s.one_minus_beta_1
    v = op.maximum(v * s.beta_2, op.abs(g))
    return p - op.div(m, v + s.epsilon) * s.alpha, (m, v)


def sparse_adamax(p, g, slots, s):
    m, v = slots
    m = m * s.beta_1 + g * s.one_minus_beta_1
    v = op.maximum(v * s.beta_2, op.abs(g))
    return p - op.div(m, v + s.epsilon) * s.alpha, (m, v)


def derive(step: Step, rate: Any, beta_1: Any, beta_2: Any, epsilon: float) -> Scalars:
    """A step's scalars. rate: its learning rate, in the step's dtype."""
    beta_1, beta_2 = step.number(beta_1), step.number(beta_2)
    return Scalars(rate / (1 - step.power(beta_1, step.t)), beta_1, beta_2, 1 - beta_1, step.exact(epsilon))


class Adamax(Optimizer):
    """Adam with the infinity norm: `w -= lr / (1 - beta_1^t) * m / (v + epsilon)`.

    `m += (1 - beta_1) * (g - m)`, `v = max(beta_2 * v, |g|)`. Slots: `m` (0), `v` (0).

    Args:
        learning_rate: number, 0-d tensor, callable or schedule. Default 0.001.
        beta_1, beta_2: decay of the mean and of the norm, in [0, 1). Defaults 0.9, 0.999.
        epsilon: default 1e-7, which 0 and None mean as well.
        name: default "Adamax".
        **options: see fused_kopt.optimizer.Optimizer.

    Source: Keras OptimizerV2; Kingma and Ba, Adam, section 7, 2014.
    """

    beta_1 = Hyperparameter(0.0, 1.0)
    beta_2 = Hyperparameter(0.0, 1.0)

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: float | None = 1e-7,
        name: str | None = "Adamax",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(name, learning_rate, options)
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = fuzz(epsilon)

    def slot_groups(self) -> SlotGroups:
        return ((Slot("m"),), (Slot("v", positive=True),))

    def rule(self) -> Rule:
        return adamax

    def sparse_rule(self, rank: int) -> Rule:
        return sparse_adamax

    def scalars(self, step: Step) -> Scalars:
        return derive(step, self._rate(step), self.beta_1, self.beta_2, self.epsilon)

    def get_config(self) -> dict[str, Any]:
        return self._config(beta_1=self._value("beta_1"), beta_2=self._value("beta_2"), epsilon=self.epsilon)
