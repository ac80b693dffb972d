"""Lamb as Keras 3 has it: a launch for the direction, norms of variables and directions, a launch that goes there."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import keras
import torch
from torch import Tensor

from fused_kopt import clipping, description, op, options
from fused_kopt.borrowed import Borrowed, Borrower
from fused_kopt.clipping import Clips
from fused_kopt.description import Description
from fused_kopt.keras.declaration import Declaration, Step, bias_correction, constant
from fused_kopt.keras.fused import Fused, registered
from fused_kopt.keras.plan import Plan, values
from fused_kopt.keras.stepper import Momentum, Stepper


class Direction(NamedTuple):
    decay: float
    one_minus_beta_1: float
    one_minus_beta_2: float
    correction_1: float
    correction_2: float
    epsilon: float


class Rate(NamedTuple):
    rate: float


def direction(p, g, slots, s):
    """The last slot receives the direction; the variable decays before its norm is taken."""
    m, v, _ = slots
    m = m + (g - m) * s.one_minus_beta_1
    v = v + (g * g - v) * s.one_minus_beta_2
    return p * s.decay, (m, v, op.div(op.div(m, s.correction_1), op.sqrt(op.div(v, s.correction_2)) + s.epsilon))


def go(p, g, slots, s):
    """g is the direction times its trust ratio."""
    return p - g * s.rate, ()


class LambStepper(Stepper):
    """Two rules in a step. The directions lie in scratch tensors between them, one more per variable."""

    def __init__(self, optimizer: Any, declaration: Declaration, stock: Callable[[Any, Any], None]) -> None:
        super().__init__(optimizer, declaration, stock)
        self._going = Borrower()
        self._directions: dict[int, Tensor] = {}

    def _executor(self) -> None:
        super()._executor()
        if self.recorder.every:
            raise ValueError("`stats_every` must be 0 for Lamb: its step is two launches, and neither sees all of it.")
        self._going.executor = self._updates.executor

    def describe(self, variables: Any = None) -> Description:
        """Of both launches, and of the norms between them."""
        first, optimizer = super().describe(variables), self.optimizer
        given = values(optimizer._trainable_variables if variables is None else variables)
        last = description.describe(optimizer.name, [(v.detach(), v) for v in given], (), self._going.executor, clipping.TRUST, alignment=1)
        return replace(
            first,
            buckets=(*first.buckets, *last.buckets),
            norm_launches=first.norm_launches + 2 * last.norm_launches,
            norm_bytes=first.norm_bytes + 2 * last.norm_bytes,
            notes=(
                *first.notes,
                "two launches with norms between them, and one more tensor per variable, its direction",
            ),
        )

    def _update(self, plan: Plan, grads: list[Tensor], step: Step, clips: Clips) -> None:
        optimizer, variables = self.optimizer, values(plan.variables)
        directions = [self._scratch(variable, momentum) for variable, momentum in zip(variables, values(plan.slots[0]), strict=True)]
        first = self.declaration.scalars(optimizer, step)
        decays = (1 - optimizer.weight_decay * step.rate, 1.0)[: 1 if plan.which is None else 2] if plan.decays else (1.0,)
        slots = [*map(values, plan.slots[:2]), directions]
        given = Borrowed(variables, grads, slots, plan.names, plan.which)
        self._updates.step(direction, given, constant(*(first._replace(decay=decay) for decay in decays)), clips)
        rule, scalars = go, Rate(step.rate)
        if optimizer.use_ema:
            rule = options.around(options.averaged, go)
            scalars = options.extended(Rate, *Momentum._fields)(step.rate, *self._momentum(step))
        given = Borrowed(variables, directions, [values(column) for column in plan.slots[2:]], plan.names)
        self._going.step(rule, given, constant(scalars), clipping.TRUST)

    def _scratch(self, variable: Tensor, like: Tensor) -> Tensor:
        found = self._directions.get(id(variable))
        if found is None or found.shape != like.shape or found.dtype != like.dtype or found.device != like.device:
            found = self._directions[id(variable)] = torch.zeros_like(like)
        return found


def _scalars(optimizer: Any, step: Step) -> Direction:
    beta_1, beta_2 = optimizer.beta_1, optimizer.beta_2
    return Direction(1.0, 1 - beta_1, 1 - beta_2, bias_correction(beta_1, step.t), bias_correction(beta_2, step.t), optimizer.epsilon)


DECLARATION = Declaration(keras.optimizers.Lamb, lambda optimizer: ("_momentums", "_velocities"), lambda optimizer: direction, _scalars)


@registered
class Lamb(Fused, keras.optimizers.Lamb):
    """`keras.optimizers.Lamb` in fused launches: `w -= lr * r * u`, `u = m / (1 - beta_1^t) / (sqrt(v / (1 - beta_2^t)) + epsilon)`.

    The trust ratio r is |w| / |u| for each variable, 1 where either norm is 0; the norms are summed in float64, and stay on the
    device. Weight decay comes before all this, as in Keras and unlike in the paper. Between its two launches a step keeps u, a
    tensor of the momentum's size per variable. Arguments, config, variables and files: Keras's. `fuse` does not take it.

    Source: Keras 3; You et al., Large batch optimization for deep learning: training BERT in 76 minutes, 2019.
    """

    declaration = DECLARATION

    def _steps(self) -> Stepper:
        if self._stepper is None:
            self._stepper = LambStepper(self, self.declaration, super(Fused, self).apply)
        return self._stepper  # type: ignore[no-any-return]
