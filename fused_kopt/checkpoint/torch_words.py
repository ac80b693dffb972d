"""torch.optim's words for what Keras's optimizers have: SGD, RMSprop, Adam, AdamW, Adadelta, Adagrad, Adamax, NAdam."""

from collections.abc import Mapping
from typing import Any

from fused_kopt.errors import CheckpointError

SLOTS: dict[str, dict[str, str]] = {
    "SGD": {"momentum_buffer": "momentum"},
    "RMSprop": {"square_avg": "rms", "momentum_buffer": "momentum", "grad_avg": "mg"},
    "Adam": {"exp_avg": "m", "exp_avg_sq": "v", "max_exp_avg_sq": "vhat"},
    "AdamW": {"exp_avg": "m", "exp_avg_sq": "v", "max_exp_avg_sq": "vhat"},
    "Adadelta": {"square_avg": "accum_grad", "acc_delta": "accum_var"},
    "Adagrad": {"sum": "accumulator"},
    "Adamax": {"exp_avg": "m", "exp_inf": "v"},
    "Nadam": {"exp_avg": "m", "exp_avg_sq": "v"},
}
# Hyperparameters, torch's name to Keras's; `betas` is two of them.
OPTIONS: dict[str, dict[str, str]] = {
    "SGD": {"momentum": "momentum", "nesterov": "nesterov"},
    "RMSprop": {"alpha": "rho", "momentum": "momentum", "eps": "epsilon", "centered": "centered"},
    "Adam": {"eps": "epsilon", "amsgrad": "amsgrad"},
    "AdamW": {"eps": "epsilon", "amsgrad": "amsgrad", "weight_decay": "weight_decay"},
    "Adadelta": {"rho": "rho", "eps": "epsilon"},
    "Adagrad": {"lr_decay": "decay", "initial_accumulator_value": "initial_accumulator_value", "eps": "epsilon"},
    "Adamax": {"eps": "epsilon"},
    "Nadam": {"eps": "epsilon", "momentum_decay": "decay"},
}
# What Keras has no word for: refused unless idle. How a step is executed (foreach, fused...) is no part of the state.
IDLE = {"weight_decay": 0, "maximize": False, "dampening": 0, "precision": "float32"}
# The keys that tell the classes apart, first match first.
MARKS = {
    "SGD": {"dampening"},
    "RMSprop": {"alpha", "centered"},
    "Nadam": {"momentum_decay"},
    "Adagrad": {"lr_decay"},
    "Adam": {"betas", "amsgrad"},
    "Adadelta": {"rho"},
}
_ADAMAX = {"lr", "betas", "eps", "weight_decay", "maximize", "foreach", "capturable", "differentiable"} | {
    *("params", "param_names", "initial_lr", "precision"),
}


def class_of(group: Mapping[str, Any]) -> str:
    """OptimizerV2's name of the class that a parameter group belongs to. Raises CheckpointError for groups of no known class."""
    name = next((name for name, marks in MARKS.items() if marks <= set(group)), None)
    if name == "Adam":
        return "AdamW" if group.get("decoupled_weight_decay") else "Adam"
    if name is None and {"betas", "eps"} <= set(group) <= _ADAMAX:
        return "Adamax"
    if name is None:
        known = ", ".join(SLOTS)
        raise CheckpointError(f"A parameter group with the keys {sorted(group)} belongs to none of torch.optim's {known}.")
    return name


def factor(cls: str, slot: str, rate: float) -> float | None:
    """What a slot of torch.optim is multiplied by to be Keras's, which folds the learning rate into the momentum; None for 1."""
    return {"SGD": -rate, "RMSprop": rate}.get(cls) if slot == "momentum" else None
