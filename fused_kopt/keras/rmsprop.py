"""RMSprop as Keras 3 has it: epsilon is always inside the root."""

from typing import Any, NamedTuple

import keras

from fused_kopt import op
from fused_kopt.execute import Rule
from fused_kopt.keras.declaration import Declaration, Step
from fused_kopt.keras.fused import Fused, registered


class Scalars(NamedTuple):
    learning_rate: float
    rho: float
    one_minus_rho: float
    momentum: float
    epsilon: float


def rmsprop(p, g, slots, s):
    (v,) = slots
    v = v * s.rho + g * g * s.one_minus_rho
    return p - op.div(g * s.learning_rate, op.sqrt(v + s.epsilon)), (v,)


def with_momentum(p, g, slots, s):
    v, velocity = slots
    v = v * s.rho + g * g * s.one_minus_rho
    velocity = velocity * s.momentum + op.div(g * s.learning_rate, op.sqrt(v + s.epsilon))
    return p - velocity, (v, velocity)


def centered(p, g, slots, s):
    v, mean = slots
    v = v * s.rho + g * g * s.one_minus_rho
    mean = mean * s.rho + g * s.one_minus_rho
    return p - op.div(g * s.learning_rate, op.sqrt(v - mean * mean + s.epsilon)), (v, mean)


def centered_with_momentum(p, g, slots, s):
    v, velocity, mean = slots
    v = v * s.rho + g * g * s.one_minus_rho
    mean = mean * s.rho + g * s.one_minus_rho
    velocity = velocity * s.momentum + op.div(g * s.learning_rate, op.sqrt(v - mean * mean + s.epsilon))
    return p - velocity, (v, velocity, mean)


def _slots(optimizer: Any) -> tuple[str, ...]:
    return ("_velocities", *["_momentums"] * (optimizer.momentum > 0), *["_average_gradients"] * bool(optimizer.centered))


def _rule(optimizer: Any) -> Rule:
    if optimizer.centered:
        return centered_with_momentum if optimizer.momentum > 0 else centered
    return with_momentum if optimizer.momentum > 0 else rmsprop


def _scalars(optimizer: Any, step: Step) -> Scalars:
    return Scalars(step.rate, optimizer.rho, 1 - optimizer.rho, optimizer.momentum, optimizer.epsilon)


DECLARATIONS = (Declaration(keras.optimizers.RMSprop, _slots, _rule, _scalars),)


@registered
class RMSprop(Fused, keras.optimizers.RMSprop):
    """`keras.optimizers.RMSprop` in fused launches: `w -= lr * g / sqrt(v + epsilon)`.

    `v = rho * v + (1 - rho) * g^2`; `centered` subtracts the square of the running mean from v; with momentum the steps are
    summed as `mom = momentum * mom + step; w -= mom`. Arguments, config, variables and files: Keras's.
    """

    declaration = DECLARATIONS[0]
