"""Adagrad."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from fused_kopt.execute import Rule
from fused_kopt.hyperparameters import Step
from fused_kopt.optimizers import adagrad
from fused_kopt.torch_optim.arguments import Default, Options
from fused_kopt.torch_optim.optimizer import Optimizer


class Adagrad(Optimizer):
    """Divides by the root of all squared gradients: `a += g^2; p -= lr / (1 + lr_decay * (t - 1)) * g / (sqrt(a) + eps)`.

    State, made at the first step: `step`, `sum` (a, initial_accumulator_value).

    Args:
        params: parameters, (name, parameter) pairs, or groups.
        lr: number >= 0 or 0-d tensor. Default 0.001.
        lr_decay: Keras's decay. Default 0.
        weight_decay: an L2 penalty: adds weight_decay * p to the gradient. Default 0.
        initial_accumulator_value: default 0.1 (torch.optim has 0).
        eps: default 1e-7.
        **options: see fused_kopt.torch_optim.Optimizer.

    Source: Keras OptimizerV2; Duchi et al., Adaptive subgradient methods for online learning, 2011.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = Default(0.001),
        lr_decay: float = Default(0.0),
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.1,
        eps: float = Default(1e-7),
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps}
        super().__init__(params, {**defaults, "initial_accumulator_value": initial_accumulator_value}, options)

    def slots(self, group: Mapping[str, Any]) -> dict[str, float]:
        return {"sum": float(group["initial_accumulator_value"])}

    def rule(self, group: Mapping[str, Any]) -> Rule:
        return adagrad.adagrad

    def scalars(self, group: Mapping[str, Any], step: Step) -> Any:
        return adagrad.derive(step, step.learning_rate(group["lr"], float(group["lr_decay"])), group["eps"])
