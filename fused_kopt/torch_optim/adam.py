"""Adam and its AMSGrad variant, with a penalty or with decoupled weight decay (AdamW)."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from fused_kopt.execute import Rule
from fused_kopt.hyperparameters import Step
from fused_kopt.optimizers import adam
from fused_kopt.torch_optim.arguments import Default, Options
from fused_kopt.torch_optim.optimizer import Optimizer


class Adam(Optimizer):
    """Running mean and uncentered variance of the gradient: `p -= alpha * m / (sqrt(v) + eps)`.

    `m += (1 - beta_1) * (g - m)`, `v += (1 - beta_2) * (g^2 - v)`, `alpha = lr * sqrt(1 - beta_2^t) / (1 - beta_1^t)`. Unlike
    torch.optim's, eps is added to the uncorrected root. With `amsgrad` the root is of the largest v so far. State: `step`,
    `exp_avg` (m, 0), `exp_avg_sq` (v, 0), `max_exp_avg_sq` (0, if amsgrad).

    Args:
        params: parameters, (name, parameter) pairs, or groups.
        lr: number >= 0 or 0-d tensor. Default 0.001.
        betas: decay of the averages, each in [0, 1). Default (0.9, 0.999).
        eps: default 1e-7.
        weight_decay: an L2 penalty: adds weight_decay * p to the gradient. Default 0.
        amsgrad: default False.
        decoupled_weight_decay: True makes it AdamW. Default False.
        **options: see fused_kopt.torch_optim.Optimizer.

    Source: Keras OptimizerV2; Kingma and Ba, Adam: a method for stochastic optimization, 2014; Reddi et al., On the
    convergence of Adam and beyond, 2018.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = Default(0.001),
        betas: tuple[float, float] = (Default(0.9), Default(0.999)),
        eps: float = Default(1e-7),
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, {**defaults, "decoupled_weight_decay": decoupled_weight_decay}, options)

    def slots(self, group: Mapping[str, Any]) -> dict[str, float]:
        return {"exp_avg": 0.0, "exp_avg_sq": 0.0, **({"max_exp_avg_sq": 0.0} if group["amsgrad"] else {})}

    def rule(self, group: Mapping[str, Any]) -> Rule:
        return adam.amsgrad if group["amsgrad"] else adam.adam

    def scalars(self, group: Mapping[str, Any], step: Step) -> Any:
        beta_1, beta_2 = group["betas"]
        return adam.derive(step, step.number(group["lr"]), beta_1, beta_2, group["eps"])

    def decoupled(self, group: Mapping[str, Any]) -> bool:
        return bool(group["decoupled_weight_decay"])


class AdamW(Adam):
    """Adam with decoupled weight decay: `p *= 1 - lr * weight_decay` before Adam's step. Otherwise as Adam.

    Args:
        params: parameters, (name, parameter) pairs, or groups.
        lr: number >= 0 or 0-d tensor. Default 0.001.
        betas: decay of the averages, each in [0, 1). Default (0.9, 0.999).
        eps: default 1e-7.
        weight_decay: default 0.004, as in Keras 3.
        amsgrad: default False.
        **options: see fused_kopt.torch_optim.Optimizer.

    Source: Loshchilov and Hutter, Decoupled weight decay regularization, 2019.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = Default(0.001),
        betas: tuple[float, float] = (Default(0.9), Default(0.999)),
        eps: float = Default(1e-7),
        weight_decay: float = 0.004,
        amsgrad: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay=True, **options)
