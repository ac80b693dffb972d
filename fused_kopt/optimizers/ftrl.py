"""Ftrl."""

from typing import Any, NamedTuple

from typing_extensions import Unpack

from fused_kopt import op
from fused_kopt.execute import Rule
from fused_kopt.hyperparameters import Hyperparameter, Options, Step, check_not_negative
from fused_kopt.optimizer import Optimizer
from fused_kopt.slots import Slot, SlotGroups


class Scalars(NamedTuple):
    learning_rate: float
    power: float
    l1: float
    two_l2: float
    two_l2_shrinkage: float


# n is the accumulator, z the linear slot, root = n ** power; pull = (root' - root) / lr * w is what the linear slot loses.


def _half(p, g, slots, s):
    """Power -0.5, a square root: the new n, its root, and the pull."""
    n = slots[0] + g * g
    root = op.sqrt(n)
    return n, root, op.div(root - op.sqrt(slots[0]), s.learning_rate) * p


def _general(p, g, slots, s):
    """Any other power."""
    n = slots[0] + g * g
    root = op.pow(n, s.power)
    return n, root, op.div(root - op.pow(slots[0], s.power), s.learning_rate) * p


def _rebuild(z, n, root, s):
    """The variable from the new z."""
    moved = op.div(op.sign(z) * s.l1 - z, op.div(root, s.learning_rate) + s.two_l2)
    return op.where(op.abs(z) > s.l1, moved, 0.0), (n, z)


def ftrl(p, g, slots, s):
    n, root, pull = _half(p, g, slots, s)
    return _rebuild(slots[1] + (g - pull), n, root, s)


def ftrl_shrunk(p, g, slots, s):
    n, root, pull = _half(p, g, slots, s)
    return _rebuild(slots[1] + (g + p * s.two_l2_shrinkage - pull), n, root, s)


def ftrl_power(p, g, slots, s):
    n, root, pull = _general(p, g, slots, s)
    return _rebuild(slots[1] + (g - pull), n, root, s)


def ftrl_power_shrunk(p, g, slots, s):
    n, root, pull = _general(p, g, slots, s)
    return _rebuild(slots[1] + (g + p * s.two_l2_shrinkage - pull), n, root, s)


# TensorFlow's sparse operation on vectors adds the gradient to z first.


def vector(p, g, slots, s):
    n, root, pull = _half(p, g, slots, s)
    return _rebuild(slots[1] + g - pull, n, root, s)


def vector_shrunk(p, g, slots, s):
    n, root, pull = _half(p, g, slots, s)
    return _rebuild(slots[1] + (g + p * s.two_l2_shrinkage) - pull, n, root, s)


def vector_power(p, g, slots, s):
    n, root, pull = _general(p, g, slots, s)
    return _rebuild(slots[1] + g - pull, n, root, s)


def vector_power_shrunk(p, g, slots, s):
    n, root, pull = _general(p, g, slots, s)
    return _rebuild(slots[1] + (g + p * s.two_l2_shrinkage) - pull, n, root, s)


class Strengths(NamedTuple):
    """Of regularization; numbers or 0-d tensors."""

    l1: Any
    l2: Any
    l2_shrinkage: Any
    beta: Any


def derive(step: Step, rate: Any, power: Any, strengths: Strengths) -> Scalars:
    """A step's scalars. rate: its learning rate, in the step's dtype."""
    l2 = step.number(strengths.l2) + step.number(strengths.beta) / (2 * rate)
    return Scalars(rate, -step.number(power), step.number(strengths.l1), 2 * l2, 2 * step.number(strengths.l2_shrinkage))


class Ftrl(Optimizer):
    """Follow the regularized leader: the variable is rebuilt in every step from the linear slot.

    `n' = n + g^2; z += g + 2 * l2_shrinkage * w - (n'^-power - n^-power) / lr * w; w = (l1 * sign(z) - z) / (n'^-power /
    lr + 2 * l2 + beta / lr)` where `|z| > l1`, else 0. The first step multiplies the initial variable by `1 - sqrt(n / n')`,
    and a zero gradient is not a no-op. `lr=` is ignored, as in Keras. Slots, interleaved per variable in `weights`:
    `accumulator` (n, initial_accumulator_value), `linear` (z, 0).

    Args:
        learning_rate: number, 0-d tensor, callable or schedule. Default 0.001.
        learning_rate_power: not positive; -0.5 takes the exact square root, other powers may differ by 2 ulp. Default -0.5.
        initial_accumulator_value: not negative. Default 0.1.
        l1_regularization_strength, l2_regularization_strength: not negative. Defaults 0.
        name: default "Ftrl".
        l2_shrinkage_regularization_strength: not negative; adds to the gradient in z, not in n. Default 0.
        beta: adds beta / (2 * lr) to l2. Default 0.
        **options: see fused_kopt.optimizer.Optimizer.

    Raises ValueError for values out of range. Source: Keras OptimizerV2; McMahan et al., Ad click prediction, 2013.
    """

    learning_rate_power = Hyperparameter()
    l1_regularization_strength = Hyperparameter()
    l2_regularization_strength = Hyperparameter()
    beta = Hyperparameter()

    def __init__(
        self,
        learning_rate: Any = 0.001,
        learning_rate_power: Any = -0.5,
        initial_accumulator_value: float = 0.1,
        l1_regularization_strength: Any = 0.0,
        l2_regularization_strength: Any = 0.0,
        name: str | None = "Ftrl",
        l2_shrinkage_regularization_strength: float = 0.0,
        beta: Any = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(name, learning_rate, options)
        self.learning_rate = learning_rate
        check_not_negative(
            initial_accumulator_value=initial_accumulator_value,
            l1_regularization_strength=l1_regularization_strength,
            l2_regularization_strength=l2_regularization_strength,
            l2_shrinkage_regularization_strength=l2_shrinkage_regularization_strength,
        )
        if not callable(learning_rate_power) and learning_rate_power > 0:
            raise ValueError(f"`learning_rate_power` needs to be negative or zero. Received: learning_rate_power={learning_rate_power}.")
        self.learning_rate_power = learning_rate_power
        self._initial_accumulator_value = initial_accumulator_value
        self.l1_regularization_strength = l1_regularization_strength
        self.l2_regularization_strength = l2_regularization_strength
        self._l2_shrinkage_regularization_strength = l2_shrinkage_regularization_strength
        self.beta = beta

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Square roots are exact; other powers may differ by 2 ulp between executors."""
        return float(self.learning_rate_power) == -0.5

    def slot_groups(self) -> SlotGroups:
        return ((Slot("accumulator", self._initial_accumulator_value, positive=True), Slot("linear")),)

    def _choose(self, half: Rule, half_shrunk: Rule, power: Rule, power_shrunk: Rule) -> Rule:
        shrunk = self._l2_shrinkage_regularization_strength > 0
        if self.exact:
            return half_shrunk if shrunk else half
        return power_shrunk if shrunk else power

    def rule(self) -> Rule:
        return self._choose(ftrl, ftrl_shrunk, ftrl_power, ftrl_power_shrunk)

    def sparse_rule(self, rank: int) -> Rule:
        return self._choose(vector, vector_shrunk, vector_power, vector_power_shrunk) if rank == 1 else self.rule()

    def scalars(self, step: Step) -> Scalars:
        l1, l2 = self.l1_regularization_strength, self.l2_regularization_strength
        strengths = Strengths(l1, l2, self._l2_shrinkage_regularization_strength, self.beta)
        return derive(step, self._rate(step), self.learning_rate_power, strengths)

    def get_config(self) -> dict[str, Any]:
        return self._config(
            initial_accumulator_value=self._initial_accumulator_value,
            learning_rate_power=self._value("learning_rate_power"),
            l1_regularization_strength=self._value("l1_regularization_strength"),
            l2_regularization_strength=self._value("l2_regularization_strength"),
            beta=self._value("beta"),
            l2_shrinkage_regularization_strength=self._l2_shrinkage_regularization_strength,
        )
