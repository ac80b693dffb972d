"""Adadelta."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from fused_kopt.execute import Rule
from fused_kopt.hyperparameters import Step
from fused_kopt.optimizers import adadelta
from fused_kopt.torch_optim.arguments import Default, Options
from fused_kopt.torch_optim.optimizer import Optimizer


class Adadelta(Optimizer):
    """Steps in the parameter's own units: `u = sqrt(d + eps) / sqrt(a + eps) * g; p -= lr * u`.

    `a = rho * a + (1 - rho) * g^2` before, `d = rho * d + (1 - rho) * u^2` after. State: `step`, `square_avg` (a, 0), `acc_delta`
    (d, 0).

    Args:
        params: parameters, (name, parameter) pairs, or groups.
        lr: number >= 0 or 0-d tensor. Default 0.001 (torch.optim has 1.0, as the paper).
        rho: decay of the averages, in [0, 1). Default 0.95.
        eps: default 1e-7.
        weight_decay: an L2 penalty: adds weight_decay * p to the gradient. Default 0.
        **options: see fused_kopt.torch_optim.Optimizer.

    Source: Keras OptimizerV2; Zeiler, ADADELTA: an adaptive learning rate method, 2012.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = Default(0.001),
        rho: float = 0.95,
        eps: float = Default(1e-7),
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay}, options)

    def slots(self, group: Mapping[str, Any]) -> dict[str, float]:
        return {"square_avg": 0.0, "acc_delta": 0.0}

    def rule(self, group: Mapping[str, Any]) -> Rule:
        return adadelta.adadelta

    def scalars(self, group: Mapping[str, Any], step: Step) -> Any:
        return adadelta.derive(step, step.number(group["lr"]), group["rho"], group["eps"])
