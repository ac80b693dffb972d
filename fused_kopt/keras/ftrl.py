"""Ftrl as Keras 3 has it: OptimizerV2's, written with a clip, so that NaN stays NaN."""

from typing import Any

import keras

from fused_kopt import op
from fused_kopt.execute import Rule
from fused_kopt.keras.declaration import Declaration, Step, divide
from fused_kopt.keras.fused import Fused, registered
from fused_kopt.optimizers.ftrl import Scalars

# n is the accumulator, z the linear slot; root = n ** -learning_rate_power.


def _linear(p, g, z, growth, s):
    """The new z; growth: how much the root grew."""
    return z + (g + p * s.two_l2_shrinkage - op.div(growth, s.learning_rate) * p)


def _solve(z, root, s):
    """The variable."""
    return op.div(op.clip(z, s.l1) - z, op.div(root, s.learning_rate) + s.two_l2)


def ftrl(p, g, slots, s):
    n = slots[0] + g * g
    root = op.sqrt(n)
    z = _linear(p, g, slots[1], root - op.sqrt(slots[0]), s)
    return _solve(z, root, s), (n, z)


def ftrl_power(p, g, slots, s):
    n = slots[0] + g * g
    root = op.pow(n, s.power)
    z = _linear(p, g, slots[1], root - op.pow(slots[0], s.power), s)
    return _solve(z, root, s), (n, z)


def _slots(optimizer: Any) -> tuple[str, ...]:
    return ("_accumulators", "_linears")


def _exact(optimizer: Any) -> bool:
    return bool(optimizer.learning_rate_power == -0.5)


def _rule(optimizer: Any) -> Rule:
    return ftrl if _exact(optimizer) else ftrl_power


def _scalars(optimizer: Any, step: Step) -> Scalars:
    l2 = optimizer.l2_regularization_strength + divide(optimizer.beta, 2 * step.rate)
    l1, shrinkage = optimizer.l1_regularization_strength, optimizer.l2_shrinkage_regularization_strength
    return Scalars(step.rate, -optimizer.learning_rate_power, l1, 2 * l2, 2 * shrinkage)


DECLARATIONS = (Declaration(keras.optimizers.Ftrl, _slots, _rule, _scalars, exact=_exact),)


@registered
class Ftrl(Fused, keras.optimizers.Ftrl):
    """`keras.optimizers.Ftrl` in fused launches; the variable is rebuilt in every step from the linear slot z.

    `n' = n + g^2; z += g + 2 * l2_shrinkage * w - (n'^-power - n^-power) / lr * w; w = (clip(z, -l1, l1) - z) / (n'^-power /
    lr + 2 * l2 + beta / lr)`. Power -0.5 takes the exact square root; others may differ by 2 ulp between executors.
    Arguments, config, variables and files: Keras's.
    """

    declaration = DECLARATIONS[0]
