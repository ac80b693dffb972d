"""Adadelta as Keras 3 has it."""

from typing import Any

import keras

from fused_kopt.execute import Rule
from fused_kopt.keras.declaration import Declaration, Step
from fused_kopt.keras.fused import Fused, registered
from fused_kopt.optimizers.adadelta import Scalars, adadelta


def _slots(optimizer: Any) -> tuple[str, ...]:
    return ("_accumulated_grads", "_accumulated_delta_vars")


def _rule(optimizer: Any) -> Rule:
    return adadelta


def _scalars(optimizer: Any, step: Step) -> Scalars:
    return Scalars(step.rate, optimizer.rho, 1 - optimizer.rho, optimizer.epsilon, 1.0)


DECLARATIONS = (Declaration(keras.optimizers.Adadelta, _slots, _rule, _scalars),)


@registered
class Adadelta(Fused, keras.optimizers.Adadelta):
    """`keras.optimizers.Adadelta` in fused launches: `u = sqrt(d + epsilon) / sqrt(a + epsilon) * g; w -= lr * u`.

    `a = rho * a + (1 - rho) * g^2` before, `d = rho * d + (1 - rho) * u^2` after. Arguments, config, variables and files: Keras's.
    """

    declaration = DECLARATIONS[0]
