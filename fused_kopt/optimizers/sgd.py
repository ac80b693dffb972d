"""SGD, with momentum and Nesterov's momentum."""

from typing import Any, NamedTuple

from torch import Tensor
from typing_extensions import Unpack

from fused_kopt.execute import Rule
from fused_kopt.hyperparameters import Hyperparameter, Options, Step, check_fraction
from fused_kopt.optimizer import Optimizer
from fused_kopt.slots import Slot, SlotGroups
from fused_kopt.updates import SparseRows


class Scalars(NamedTuple):
    learning_rate: float
    momentum: float


def sgd(p, g, slots, s):
    return p - g * s.learning_rate, ()


def momentum(p, g, slots, s):
    (velocity,) = slots
    velocity = velocity * s.momentum - g * s.learning_rate
    return p + velocity, (velocity,)


def nesterov(p, g, slots, s):
    (velocity,) = slots
    velocity = velocity * s.momentum - g * s.learning_rate
    return p + (velocity * s.momentum - g * s.learning_rate), (velocity,)


def derive(step: Step, rate: Any, momentum: Any) -> Scalars:
    """A step's scalars. rate: its learning rate, in the step's dtype."""
    return Scalars(rate, step.number(momentum))


class SGD(Optimizer):
    """Gradient descent: `w -= lr * g`; with momentum `v = momentum * v - lr * g; w += v`.

    The learning rate is inside the velocity: changing it does not rescale what was gathered. With `nesterov`, `w +=
    momentum * v - lr * g` (new v). Slots: `momentum` (0), only where momentum is used, which construction decides.

    Args:
        learning_rate: number, 0-d tensor, callable or schedule. Default 0.01.
        momentum: in [0, 1] where it is a Python number; ValueError otherwise. Default 0.
        nesterov: default False; without momentum it changes nothing.
        name: default "SGD".
        **options: see fused_kopt.optimizer.Optimizer.

    Source: Keras OptimizerV2; Sutskever et al., On the importance of initialization and momentum in deep learning, 2013.
    """

    momentum = Hyperparameter()

    def __init__(
        self, learning_rate: Any = 0.01, momentum: Any = 0.0, nesterov: bool = False, name: str | None = "SGD", **options: Unpack[Options]
    ) -> None:
        super().__init__(name, learning_rate, options)
        check_fraction("momentum", momentum)
        self._has_momentum = bool(callable(momentum) or isinstance(momentum, Tensor) or momentum > 0)
        self.momentum = momentum
        self.nesterov = nesterov

    @property
    def sparse_rows(self) -> SparseRows:  # type: ignore[override]
        """Keras applies every occurrence of a row by itself without momentum, and their sum with it."""
        return "touched" if self._has_momentum else "each"

    def slot_groups(self) -> SlotGroups:
        return ((Slot("momentum"),),) if self._has_momentum else ()

    def rule(self) -> Rule:
        if not self._has_momentum:
            return sgd
        return nesterov if self.nesterov else momentum

    def scalars(self, step: Step) -> Scalars:
        return derive(step, self._rate(step), self.momentum)

    def get_config(self) -> dict[str, Any]:
        return self._config(momentum=self._value("momentum"), nesterov=self.nesterov)
