"""Lion as Keras 3 has it."""

from typing import Any

import keras

from fused_kopt.execute import Rule
from fused_kopt.keras.declaration import Declaration, Step
from fused_kopt.keras.fused import Fused, registered
from fused_kopt.optimizers.lion import Scalars, lion


def _slots(optimizer: Any) -> tuple[str, ...]:
    return ("_momentums",)


def _rule(optimizer: Any) -> Rule:
    return lion


def _scalars(optimizer: Any, step: Step) -> Scalars:
    return Scalars(step.rate, optimizer.beta_1, optimizer.beta_2, 1 - optimizer.beta_1, 1 - optimizer.beta_2)


DECLARATIONS = (Declaration(keras.optimizers.Lion, _slots, _rule, _scalars),)


@registered
class Lion(Fused, keras.optimizers.Lion):
    """`keras.optimizers.Lion` in fused launches: `w -= lr * sign(beta_1 * m + (1 - beta_1) * g)`, old m.

    Then `m = beta_2 * m + (1 - beta_2) * g`. Arguments, config, variables and files: Keras's.
    """

    declaration = DECLARATIONS[0]
