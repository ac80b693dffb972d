"""Adam, AMSGrad and AdamW as Keras 3 has them."""

from typing import Any

import keras

from fused_kopt.execute import Rule
from fused_kopt.keras.declaration import Declaration, Step, bias_correction, divide, root
from fused_kopt.keras.fused import Fused, registered
from fused_kopt.optimizers.adam import Scalars, adam, amsgrad


def _slots(optimizer: Any) -> tuple[str, ...]:
    slots = "_momentums", "_velocities", "_velocity_hats"
    return slots if optimizer.amsgrad else slots[:2]


def _rule(optimizer: Any) -> Rule:
    return amsgrad if optimizer.amsgrad else adam


def _scalars(optimizer: Any, step: Step) -> Scalars:
    beta_1, beta_2 = optimizer.beta_1, optimizer.beta_2
    alpha = divide(step.rate * root(bias_correction(beta_2, step.t)), bias_correction(beta_1, step.t))
    return Scalars(alpha, alpha, beta_1, beta_2, 1 - beta_1, 1 - beta_2, optimizer.epsilon)


DECLARATIONS = tuple(Declaration(stock, _slots, _rule, _scalars) for stock in (keras.optimizers.Adam, keras.optimizers.AdamW))


@registered
class Adam(Fused, keras.optimizers.Adam):
    """`keras.optimizers.Adam` in fused launches: `w -= alpha * m / (sqrt(v) + epsilon)`.

    `m += (1 - beta_1) * (g - m)`, `v += (1 - beta_2) * (g^2 - v)`, `alpha = lr * sqrt(1 - beta_2^t) / (1 - beta_1^t)`;
    with `amsgrad` the root is of the largest v so far. Arguments, config, variables and files: Keras's.
    """

    declaration = DECLARATIONS[0]


@registered
class AdamW(Fused, keras.optimizers.AdamW):
    """`keras.optimizers.AdamW` in fused launches: Adam after `w -= lr * weight_decay * w`.

    Arguments, config, variables and files: Keras's.
    """

    declaration = DECLARATIONS[1]
