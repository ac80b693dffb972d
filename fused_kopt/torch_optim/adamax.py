"""Adamax."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from fused_kopt.execute import Rule
from fused_kopt.hyperparameters import Step
from fused_kopt.optimizers import adamax
from fused_kopt.torch_optim.arguments import Default, Options
from fused_kopt.torch_optim.optimizer import Optimizer


class Adamax(Optimizer):
    """Adam with the infinity norm: `p -= lr / (1 - beta_1^t) * m / (v + eps)`.

    `m += (1 - beta_1) * (g - m)`, `v = max(beta_2 * v, |g|)`; torch.optim's adds eps to |g| instead. State: `step`, `exp_avg`
    (m, 0), `exp_inf` (v, 0).

    Args:
        params: parameters, (name, parameter) pairs, or groups.
        lr: number >= 0 or 0-d tensor. Default 0.001.
        betas: decay of the mean and of the norm, each in [0, 1). Default (0.9, 0.999).
        eps: default 1e-7.
        weight_decay: an L2 penalty: adds weight_decay * p to the gradient. Default 0.
        **options: see fused_kopt.torch_optim.Optimizer.

    Source: Keras OptimizerV2; Kingma and Ba, Adam, section 7, 2014.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = Default(0.001),
        betas: tuple[float, float] = (Default(0.9), Default(0.999)),
        eps: float = Default(1e-7),
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, options)

    def slots(self, group: Mapping[str, Any]) -> dict[str, float]:
        return {"exp_avg": 0.0, "exp_inf": 0.0}

    def rule(self, group: Mapping[str, Any]) -> Rule:
        return adamax.adamax

    def scalars(self, group: Mapping[str, Any], step: Step) -> Any:
        beta_1, beta_2 = group["betas"]
        return adamax.derive(step, step.number(group["lr"]), beta_1, beta_2, group["eps"])
