"""SGD as Keras 3 has it."""

from typing import Any

import keras

from fused_kopt.execute import Rule
from fused_kopt.keras.declaration import Declaration, Step
from fused_kopt.keras.fused import Fused, registered
from fused_kopt.optimizers.sgd import Scalars, momentum, nesterov, sgd


def _slots(optimizer: Any) -> tuple[str, ...]:
    return ("momentums",) if optimizer.momentum != 0 else ()


def _rule(optimizer: Any) -> Rule:
    if optimizer.momentum == 0:
        return sgd
    return nesterov if optimizer.nesterov else momentum


def _scalars(optimizer: Any, step: Step) -> Scalars:
    return Scalars(step.rate, optimizer.momentum)


DECLARATIONS = (Declaration(keras.optimizers.SGD, _slots, _rule, _scalars),)


@registered
class SGD(Fused, keras.optimizers.SGD):
    """`keras.optimizers.SGD` in fused launches: `w -= lr * g`; with momentum `v = momentum * v - lr * g; w += v`.

    With `nesterov`, `w += momentum * v - lr * g` (new v). Arguments, config, variables and files: Keras's.
    """

    declaration = DECLARATIONS[0]
