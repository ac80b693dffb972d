"""Adamax as Keras 3 has it."""

from typing import Any

import keras

from fused_kopt.execute import Rule
from fused_kopt.keras.declaration import Declaration, Step, bias_correction, divide
from fused_kopt.keras.fused import Fused, registered
from fused_kopt.optimizers.adamax import Scalars, adamax


def _slots(optimizer: Any) -> tuple[str, ...]:
    return ("_m", "_u")


def _rule(optimizer: Any) -> Rule:
    return adamax


def _scalars(optimizer: Any, step: Step) -> Scalars:
    alpha = divide(step.rate, bias_correction(optimizer.beta_1, step.t))
    return Scalars(alpha, optimizer.beta_1, optimizer.beta_2, 1 - optimizer.beta_1, optimizer.epsilon)


DECLARATIONS = (Declaration(keras.optimizers.Adamax, _slots, _rule, _scalars),)


@registered
class Adamax(Fused, keras.optimizers.Adamax):
    """`keras.optimizers.Adamax` in fused launches: `w -= lr / (1 - beta_1^t) * m / (u + epsilon)`.

    `m += (1 - beta_1) * (g - m)`, `u = max(beta_2 * u, |g|)`. Arguments, config, variables and files: Keras's.
    """

    declaration = DECLARATIONS[0]
