"""Adam and its AMSGrad variant."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from typing_extensions import Unpack

from fused_kopt import op
from fused_kopt.execute import Rule
from fused_kopt.hyperparameters import Hyperparameter, Options, Step, fuzz
from fused_kopt.optimizer import Optimizer
from fused_kopt.slots import Slot, SlotGroups


class Scalars(NamedTuple):
    alpha: float
    sparse_alpha: float
    beta_1: float
    beta_2: float
    one_minus_beta_1: float
    one_minus_beta_2: float
    epsilon: float


def adam(p, g, slots, s):
    m, v = slots
    m = m + (g - m) * s.one_minus_beta_1
    v = v + (g * g - v) * s.one_minus_beta_2
    return p - op.div(m * s.alpha, op.sqrt(v) + s.epsilon), (m, v)


def amsgrad(p, g, slots, s):
    m, v, vhat = slots
    m = m + (g - m) * s.one_minus_beta_1
    v = v + (g * g - v) * s.one_minus_beta_2
    vhat = op.maximum(vhat, v)
    return p - op.div(m * s.alpha, op.sqrt(vhat) + s.epsilon), (m, v, vhat)


# Keras's sparse path rounds in another order: decay first, then the new term, and alpha's quotient before its product.


def sparse_adam(p, g, slots, s):
    m, v = slots
    m = m * s.beta_1 + g * s.one_minus_beta_1
    v = v * s.beta_2 + g * g * s.one_minus_beta_2
    return p - op.div(m * s.sparse_alpha, op.sqrt(v) + s.epsilon), (m, v)


def sparse_amsgrad(p, g, slots, s):
    m, v, vhat = slots
    m = m * s.beta_1 + g * s.one_minus_beta_1
    v = v * s.beta_2 + g * g * s.one_minus_beta_2
    vhat = op.maximum(vhat, v)
    return p - op.div(m * s.sparse_alpha, op.sqrt(vhat) + s.epsilon), (m, v, vhat)


def derive(step: Step, rate: Any, beta_1: Any, beta_2: Any, epsilon: float) -> Scalars:
    """A step's scalars. rate: its learning rate, in the step's dtype."""
    beta_1, beta_2 = step.number(beta_1), step.number(beta_2)
    root, correction = step.sqrt(1 - step.power(beta_2, step.t)), 1 - step.power(beta_1, step.t)
    return Scalars(rate * root / correction, rate * (root / correction), beta_1, beta_2, 1 - beta_1, 1 - beta_2, step.exact(epsilon))


class Adam(Optimizer):
    """Running mean and uncentered variance of the gradient: `w -= alpha * m / (sqrt(v) + epsilon)`.

    `m += (1 - beta_1) * (g - m)`, `v += (1 - beta_2) * (g^2 - v)`, `alpha = lr * sqrt(1 - beta_2^t) / (1 - beta_1^t)`.
    With `amsgrad` the root is of `vhat`, the largest v so far. Epsilon is added to the uncorrected root ("epsilon hat").
    A sparse gradient moves every row, as a dense one with zeros would. Slots: `m` (0), `v` (0), `vhat` (0, if amsgrad).

    Args:
        learning_rate: number, 0-d tensor, callable or schedule. Default 0.001.
        beta_1, beta_2: decay of the averages, in [0, 1). Defaults 0.9, 0.999.
        epsilon: default 1e-7, which 0 and None mean as well.
        amsgrad: default False.
        name: default "Adam".
        **options: see fused_kopt.optimizer.Optimizer.

    Source: Keras OptimizerV2; Kingma and Ba, Adam: a method for stochastic optimization, 2014; Reddi et al., On the
    convergence of Adam and beyond, 2018.
    """

    sparse_rows = "all"
    beta_1 = Hyperparameter(0.0, 1.0)
    beta_2 = Hyperparameter(0.0, 1.0)

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: float | None = 1e-7,
        amsgrad: bool = False,
        name: str | None = "Adam",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(name, learning_rate, options)
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = fuzz(epsilon)
        self.amsgrad = amsgrad

    def slot_groups(self) -> SlotGroups:
        groups = ((Slot("m"),), (Slot("v", positive=True),), (Slot("vhat", positive=True),))
        return groups if self.amsgrad else groups[:2]

    def rule(self) -> Rule:
        return amsgrad if self.amsgrad else adam

    def sparse_rule(self, rank: int) -> Rule:
        return sparse_amsgrad if self.amsgrad else sparse_adam

    def scalars(self, step: Step) -> Scalars:
        return derive(step, self._rate(step), self.beta_1, self.beta_2, self.epsilon)

    def _compatible(self, weights: Sequence[Any]) -> Sequence[Any]:
        # V1 lists hold vhats even without amsgrad; a list of one on an unbuilt optimizer is none of those
        count = (len(self.weights) - 1) // 2
        return weights[: len(self.weights)] if self.weights and len(weights) == 3 * count + 1 else weights

    def get_config(self) -> dict[str, Any]:
        return self._config(beta_1=self._value("beta_1"), beta_2=self._value("beta_2"), epsilon=self.epsilon, amsgrad=self.amsgrad)
