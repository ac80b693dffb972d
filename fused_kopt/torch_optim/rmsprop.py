"""RMSprop, plain or centered, with or without momentum."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from fused_kopt.execute import Rule
from fused_kopt.hyperparameters import Step
from fused_kopt.optimizers import rmsprop
from fused_kopt.torch_optim.arguments import Default, WithRho
from fused_kopt.torch_optim.optimizer import Optimizer


class RMSprop(Optimizer):
    """Divides the gradient by a running root mean square: `s = alpha * s + (1 - alpha) * g^2`.

    Without momentum `p -= lr * g / (sqrt(s) + eps)`; with it `v = momentum * v + lr * g / sqrt(s + eps); p -= v`: unlike
    torch.optim's, v has the learning rate in it, and eps is under the root. `centered` subtracts the square of the running mean
    from s. State: `step`, `square_avg` (s, 0), `momentum` (v, 0, where the group's momentum is not 0), `grad_avg` (0, if centered).

    Args:
        params: parameters, (name, parameter) pairs, or groups.
        lr: number >= 0 or 0-d tensor. Default 0.001.
        alpha: decay of the averages, in [0, 1); Keras's rho. Default 0.9.
        eps: default 1e-7.
        weight_decay: an L2 penalty: adds weight_decay * p to the gradient. Default 0.
        momentum: in [0, 1]. Default 0.
        centered: default False.
        **options: see fused_kopt.torch_optim.Optimizer.

    Source: Keras OptimizerV2; Hinton, Neural Networks for Machine Learning, lecture 6e, 2012.
    """

    momentum_sign = 1

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = Default(0.001),
        alpha: float = Default(0.9),
        eps: float = Default(1e-7),
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        **options: Unpack[WithRho],
    ) -> None:
        defaults = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum, "centered": centered}
        super().__init__(params, defaults, options)

    def slots(self, group: Mapping[str, Any]) -> dict[str, float]:
        names = ["square_avg", *["momentum"] * bool(group["momentum"]), *["grad_avg"] * group["centered"]]
        return dict.fromkeys(names, 0.0)

    def rule(self, group: Mapping[str, Any]) -> Rule:
        if group["momentum"]:
            return rmsprop.centered_with_momentum if group["centered"] else rmsprop.with_momentum
        return rmsprop.centered if group["centered"] else rmsprop.rmsprop

    def scalars(self, group: Mapping[str, Any], step: Step) -> Any:
        return rmsprop.derive(step, step.number(group["lr"]), group["alpha"], group["momentum"], group["eps"])
