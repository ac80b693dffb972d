"""Adagrad."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from typing_extensions import Unpack

from fused_kopt import op
from fused_kopt.contract import without_iterations
from fused_kopt.execute import Rule
from fused_kopt.hyperparameters import Options, Step, check_not_negative, fuzz
from fused_kopt.optimizer import Optimizer
from fused_kopt.slots import Slot, SlotGroups


class Scalars(NamedTuple):
    learning_rate: float
    epsilon: float


def adagrad(p, g, slots, s):
    (accumulator,) = slots
    accumulator = accumulator + g * g
    return p - op.div(g * s.learning_rate, op.sqrt(accumulator) + s.epsilon), (accumulator,)


def derive(step: Step, rate: Any, epsilon: float) -> Scalars:
    """A step's scalars. rate: its learning rate, in the step's dtype."""
    return Scalars(rate, step.exact(epsilon))


class Adagrad(Optimizer):
    """Divides by the root of all squared gradients: `a += g^2; w -= lr * g / (sqrt(a) + epsilon)`.

    Slots: `accumulator` (a, initial_accumulator_value).

    Args:
        learning_rate: number, 0-d tensor, callable or schedule. Default 0.001.
        initial_accumulator_value: not negative; ValueError otherwise. Default 0.1.
        epsilon: default 1e-7, which 0 and None mean as well.
        name: default "Adagrad".
        **options: see fused_kopt.optimizer.Optimizer.

    Source: Keras OptimizerV2; Duchi et al., Adaptive subgradient methods for online learning, 2011.
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        initial_accumulator_value: float = 0.1,
        epsilon: float | None = 1e-7,
        name: str | None = "Adagrad",
        **options: Unpack[Options],
    ) -> None:
        check_not_negative(initial_accumulator_value=initial_accumulator_value)
        super().__init__(name, learning_rate, options)
        self._initial_accumulator_value = initial_accumulator_value
        self.epsilon = fuzz(epsilon)

    def slot_groups(self) -> SlotGroups:
        return ((Slot("accumulator", self._initial_accumulator_value, positive=True),),)

    def rule(self) -> Rule:
        return adagrad

    def scalars(self, step: Step) -> Scalars:
        return derive(step, self._rate(step), self.epsilon)

    def _compatible(self, weights: Sequence[Any]) -> Sequence[Any]:
        return without_iterations(weights, len(self.weights))

    def get_config(self) -> dict[str, Any]:
        return self._config(initial_accumulator_value=self._initial_accumulator_value, epsilon=self.epsilon)
