"""Adagrad as Keras 3 has it: epsilon is inside the root."""

from typing import Any, NamedTuple

import keras

from fused_kopt import op
from fused_kopt.execute import Rule
from fused_kopt.keras.declaration import Declaration, Step
from fused_kopt.keras.fused import Fused, registered


class Scalars(NamedTuple):
    learning_rate: float
    epsilon: float


def adagrad(p, g, slots, s):
    a = slots[0] + g * g
    return p - op.div(g * s.learning_rate, op.sqrt(a + s.epsilon)), (a,)


def _slots(optimizer: Any) -> tuple[str, ...]:
    return ("_accumulators",)


def _rule(optimizer: Any) -> Rule:
    return adagrad


def _scalars(optimizer: Any, step: Step) -> Scalars:
    return Scalars(step.rate, optimizer.epsilon)


DECLARATIONS = (Declaration(keras.optimizers.Adagrad, _slots, _rule, _scalars),)


@registered
class Adagrad(Fused, keras.optimizers.Adagrad):
    """`keras.optimizers.Adagrad` in fused launches: `a += g^2; w -= lr * g / sqrt(a + epsilon)`.

    Arguments, config, variables and files: Keras's.
    """

    declaration = DECLARATIONS[0]
