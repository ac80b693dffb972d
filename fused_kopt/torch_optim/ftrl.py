"""Ftrl."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from fused_kopt.execute import Rule
from fused_kopt.hyperparameters import Step
from fused_kopt.optimizers import ftrl
from fused_kopt.torch_optim.arguments import Default, Options
from fused_kopt.torch_optim.optimizer import Optimizer


class Ftrl(Optimizer):
    """Follow the regularized leader: the parameter is rebuilt in every step from a linear slot; see fused_kopt.Ftrl.

    The first step multiplies the initial parameter by `1 - sqrt(n / n')`, and a zero gradient is not a no-op. torch.optim has no
    such class. State: `step`, `accumulator` (n, initial_accumulator_value), `linear` (z, 0).

    Args:
        params: parameters, (name, parameter) pairs, or groups.
        lr: number > 0 or 0-d tensor. Default 0.001.
        learning_rate_power: not positive; -0.5 takes the exact square root, other powers may differ by 2 ulp between executors.
            Default -0.5.
        initial_accumulator_value: default 0.1.
        l1_regularization_strength, l2_regularization_strength: defaults 0.
        l2_shrinkage_regularization_strength: adds to the gradient in z, not in n. Default 0.
        beta: adds beta / (2 * lr) to l2. Default 0.
        weight_decay: an L2 penalty: adds weight_decay * p to the gradient, in z and in n. Default 0.
        **options: see fused_kopt.torch_optim.Optimizer.

    Source: Keras OptimizerV2; McMahan et al., Ad click prediction, 2013.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = Default(0.001),
        learning_rate_power: float = -0.5,
        initial_accumulator_value: float = 0.1,
        l1_regularization_strength: float = 0.0,
        l2_regularization_strength: float = 0.0,
        *,
        l2_shrinkage_regularization_strength: float = 0.0,
        beta: float = 0.0,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "learning_rate_power": learning_rate_power,
            "initial_accumulator_value": initial_accumulator_value,
            "l1_regularization_strength": l1_regularization_strength,
            "l2_regularization_strength": l2_regularization_strength,
            "l2_shrinkage_regularization_strength": l2_shrinkage_regularization_strength,
            "beta": beta,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, options)

    def slots(self, group: Mapping[str, Any]) -> dict[str, float]:
        return {"accumulator": float(group["initial_accumulator_value"]), "linear": 0.0}

    def exact(self, group: Mapping[str, Any]) -> bool:
        return float(group["learning_rate_power"]) == -0.5

    def rule(self, group: Mapping[str, Any]) -> Rule:
        shrunk = group["l2_shrinkage_regularization_strength"] > 0
        if self.exact(group):
            return ftrl.ftrl_shrunk if shrunk else ftrl.ftrl
        return ftrl.ftrl_power_shrunk if shrunk else ftrl.ftrl_power

    def scalars(self, group: Mapping[str, Any], step: Step) -> Any:
        if not float(group["lr"]) > 0:
            raise ValueError(f"Ftrl divides by the learning rate, which must be > 0. Received: lr={group['lr']}. Start schedules above 0.")
        names = ("l1_regularization_strength", "l2_regularization_strength", "l2_shrinkage_regularization_strength", "beta")
        strengths = ftrl.Strengths(*(group[name] for name in names))
        return ftrl.derive(step, step.number(group["lr"]), group["learning_rate_power"], strengths)
