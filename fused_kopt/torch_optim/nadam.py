"""Nadam."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from fused_kopt.execute import Rule
from fused_kopt.hyperparameters import Step
from fused_kopt.optimizers import nadam
from fused_kopt.torch_optim.arguments import Default, Options
from fused_kopt.torch_optim.optimizer import Optimizer


class Nadam(Optimizer):
    """Adam with Nesterov momentum and a momentum schedule `mu_t = beta_1 * (1 - 0.5 * 0.96^(momentum_decay * t))`.

    With `mu_product` the product of all mu so far: `p -= lr * ((1 - mu_t) * g / (1 - mu_product) + mu_{t+1} * m / (1 - mu_product *
    mu_{t+1})) / (sqrt(v / (1 - beta_2^t)) + eps)`. torch.optim calls it NAdam. State: `step`, `mu_product` (0-d float64 on the CPU,
    1), `exp_avg` (m, 0), `exp_avg_sq` (v, 0).

    Args:
        params: parameters, (name, parameter) pairs, or groups.
        lr: number >= 0 or 0-d tensor. Default 0.001.
        betas: decay of the averages, each in [0, 1). Default (0.9, 0.999).
        eps: default 1e-7.
        weight_decay: an L2 penalty: adds weight_decay * p to the gradient. Default 0.
        momentum_decay: Keras's schedule_decay. Default 0.004.
        decoupled_weight_decay: True shrinks the parameter instead: `p *= 1 - lr * weight_decay` before. Default False.
        **options: see fused_kopt.torch_optim.Optimizer.

    Source: Keras OptimizerV2; Dozat, Incorporating Nesterov momentum into Adam, 2015.
    """

    counters = {"step": (torch.float32, 0.0), "mu_product": (torch.float64, 1.0)}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = Default(0.001),
        betas: tuple[float, float] = (Default(0.9), Default(0.999)),
        eps: float = Default(1e-7),
        weight_decay: float = 0.0,
        momentum_decay: float = Default(0.004),
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "momentum_decay": momentum_decay}
        super().__init__(params, {**defaults, "decoupled_weight_decay": decoupled_weight_decay}, options)

    def slots(self, group: Mapping[str, Any]) -> dict[str, float]:
        return {"exp_avg": 0.0, "exp_avg_sq": 0.0}

    def rule(self, group: Mapping[str, Any]) -> Rule:
        return nadam.nadam

    def scalars(self, group: Mapping[str, Any], step: Step) -> Any:
        momenta = nadam.momenta(step, group["betas"][0], float(group["momentum_decay"]), step.exact(step.cache))
        step.cache = momenta.cache
        return nadam.derive(step, step.number(group["lr"]), group["betas"], group["eps"], momenta)

    def decoupled(self, group: Mapping[str, Any]) -> bool:
        return bool(group["decoupled_weight_decay"])
