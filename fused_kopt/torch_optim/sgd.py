"""SGD, with momentum and Nesterov's momentum."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from fused_kopt.execute import Rule
from fused_kopt.hyperparameters import Step
from fused_kopt.optimizers import sgd
from fused_kopt.torch_optim import arguments
from fused_kopt.torch_optim.arguments import Default, Options
from fused_kopt.torch_optim.optimizer import Optimizer


class SGD(Optimizer):
    """Gradient descent: `p -= lr * g`; with momentum `v = momentum * v - lr * g; p += v`.

    Unlike torch.optim's, the velocity has the learning rate in it: changing `lr` does not rescale what was gathered. With
    `nesterov`, `p += momentum * v - lr * g` (new v). State: `step`, and `momentum` (v, 0) where the group's momentum is not 0.

    Args:
        params: parameters, (name, parameter) pairs, or groups.
        lr: number >= 0 or 0-d tensor. Default 0.01.
        momentum: in [0, 1]. Default 0.
        dampening: must be 0.
        weight_decay: an L2 penalty: adds weight_decay * p to the gradient. Default 0.
        nesterov: without momentum it changes nothing. Default False.
        **options: see fused_kopt.torch_optim.Optimizer.

    Source: Keras OptimizerV2; Sutskever et al., On the importance of initialization and momentum in deep learning, 2013.
    """

    momentum_sign = -1

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = Default(0.01),
        momentum: float = 0.0,
        dampening: float = 0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        arguments.refuse(type(self).__name__, {"dampening": dampening})
        super().__init__(params, defaults, options)

    def slots(self, group: Mapping[str, Any]) -> dict[str, float]:
        return {"momentum": 0.0} if group["momentum"] else {}

    def rule(self, group: Mapping[str, Any]) -> Rule:
        if not group["momentum"]:
            return sgd.sgd
        return sgd.nesterov if group["nesterov"] else sgd.momentum

    def scalars(self, group: Mapping[str, Any], step: Step) -> Any:
        return sgd.derive(step, step.number(group["lr"]), group["momentum"])
