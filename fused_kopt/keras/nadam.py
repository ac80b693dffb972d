"""Nadam as Keras 3 has it: `0.96^t`, without OptimizerV2's 0.004."""

from collections.abc import Sequence
from typing import Any

import keras

from fused_kopt.execute import Rule
from fused_kopt.keras.declaration import Declaration, Step, bias_correction
from fused_kopt.keras.fused import Fused, registered
from fused_kopt.optimizers.nadam import Scalars, nadam


def _slots(optimizer: Any) -> tuple[str, ...]:
    return ("_momentums", "_velocities")


def _rule(optimizer: Any) -> Rule:
    return nadam


def _momentum(beta_1: float, t: int) -> float:
    return beta_1 * (1 - 0.5 * 0.96**t)


def _product(optimizer: Any, step: Step) -> float:
    """The product of all momenta up to this step."""
    return step.read(optimizer._u_product) * _momentum(optimizer.beta_1, step.t)


def _scalars(optimizer: Any, step: Step) -> Scalars:
    beta_1, beta_2 = optimizer.beta_1, optimizer.beta_2
    following, product = _momentum(beta_1, step.t + 1), _product(optimizer, step)
    return Scalars(
        learning_rate=step.rate,
        beta_1=beta_1,
        beta_2=beta_2,
        one_minus_beta_1=1 - beta_1,
        one_minus_beta_2=1 - beta_2,
        one_minus_momentum=1 - _momentum(beta_1, step.t),
        next_momentum=following,
        one_minus_cache=1 - product,
        one_minus_next_cache=1 - product * following,
        one_minus_beta_2_power=bias_correction(beta_2, step.t),
        epsilon=optimizer.epsilon,
    )


def _carried(optimizer: Any, step: Step) -> Sequence[tuple[Any, float]]:
    return [(optimizer._u_product, _product(optimizer, step))]


DECLARATIONS = (Declaration(keras.optimizers.Nadam, _slots, _rule, _scalars, carried=_carried),)


@registered
class Nadam(Fused, keras.optimizers.Nadam):
    """`keras.optimizers.Nadam` in fused launches: Adam with Nesterov momentum `mu_t = beta_1 * (1 - 0.5 * 0.96^t)`.

    With the product u of all mu so far: `w -= lr * ((1 - mu_t) * g / (1 - u) + mu_{t+1} * m / (1 - u * mu_{t+1})) /
    (sqrt(v / (1 - beta_2^t)) + epsilon)`. Arguments, config, variables (u is the last) and files: Keras's.
    """

    declaration = DECLARATIONS[0]
