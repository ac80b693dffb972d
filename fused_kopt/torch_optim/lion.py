"""Lion."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from fused_kopt.execute import Rule
from fused_kopt.hyperparameters import Step
from fused_kopt.optimizers import lion
from fused_kopt.torch_optim.arguments import Default, Options
from fused_kopt.torch_optim.optimizer import Optimizer


class Lion(Optimizer):
    """Steps of one size in the sign of a momentum: `p -= lr * sign(beta_1 * m + (1 - beta_1) * g)`, old m.

    Then `m = beta_2 * m + (1 - beta_2) * g`. State: `step`, `exp_avg` (m, 0).

    Args:
        params: parameters, (name, parameter) pairs, or groups.
        lr: number >= 0 or 0-d tensor. Default 0.0001.
        betas: weight of m in the step, and its decay; each in [0, 1). Default (0.9, 0.99).
        weight_decay: decoupled: `p *= 1 - lr * weight_decay` before the step. Default 0.
        **options: see fused_kopt.torch_optim.Optimizer.

    Source: Chen et al., Symbolic discovery of optimization algorithms, 2023; Keras 2.15's Lion.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = Default(0.0001),
        betas: tuple[float, float] = (Default(0.9), Default(0.99)),
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, options)

    def slots(self, group: Mapping[str, Any]) -> dict[str, float]:
        return {"exp_avg": 0.0}

    def rule(self, group: Mapping[str, Any]) -> Rule:
        return lion.lion

    def scalars(self, group: Mapping[str, Any], step: Step) -> Any:
        return lion.derive(step, step.number(group["lr"]), *group["betas"])

    def decoupled(self, group: Mapping[str, Any]) -> bool:
        return True
