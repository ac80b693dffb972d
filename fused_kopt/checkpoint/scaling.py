"""Loss scaling in a checkpoint: that of the optimizer inside, with the scale and its counter as two more extras."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from fused_kopt.checkpoint.neutral import Checkpoint
from fused_kopt.errors import CheckpointError
from fused_kopt.mixed_precision import LossScaleOptimizer
from fused_kopt.optimizer import Optimizer

NAMES = ("loss_scale", "dynamic_counter")


def inner(optimizer: Any) -> Optimizer:
    """The optimizer that takes the steps."""
    return optimizer.inner_optimizer if type(optimizer) is LossScaleOptimizer else optimizer


def live(optimizer: Any) -> dict[str, Tensor]:
    """The tensors of a dynamic loss scale, by NAMES; none of any other optimizer."""
    if type(optimizer) is not LossScaleOptimizer or not optimizer.dynamic:
        return {}
    state = optimizer._scale
    return {"loss_scale": state.scale, "dynamic_counter": state.counter}


def without(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint of the optimizer inside."""
    return dataclasses.replace(checkpoint, extra={name: value for name, value in checkpoint.extra.items() if name not in NAMES})


def taken(checkpoint: Checkpoint, optimizer: Optimizer) -> dict[str, Tensor]:
    """The values that the checkpoint has for the optimizer's loss scale, checked; none where either has no dynamic scale."""
    if not live(optimizer) or not set(NAMES) & set(checkpoint.extra):
        return {}
    found = {name: checkpoint.extra.get(name, torch.tensor(-1)) for name in NAMES}
    scale, counter = (value.item() if value.numel() == 1 else -1 for value in found.values())
    if not (0 < scale < math.inf and counter >= 0 and counter == int(counter)):
        raise CheckpointError(f"A loss scale must be a finite number > 0, its counter a whole one >= 0. The checkpoint has {found}.")
    return found
