"""What the sources' words mean in OptimizerV2's: slots, options, and where the update rules themselves differ."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fused_kopt.checkpoint.neutral import Checkpoint
from fused_kopt.slots import Slot, SlotGroups

# Slots of Keras 3's classes: their names (those of TensorFlow's new classes too, where they are others) to ours.
KERAS3_SLOTS: dict[str, dict[str, str]] = {
    "SGD": {"momentum": "momentum", "m": "momentum"},
    "RMSprop": {"velocity": "rms", "momentum": "momentum", "average_gradient": "mg"},
    "Adam": {"momentum": "m", "velocity": "v", "velocity_hat": "vhat", "m": "m", "v": "v", "vhat": "vhat"},
    "Adadelta": {"accumulated_grad": "accum_grad", "accumulated_delta_var": "accum_var"},
    "Adagrad": {"accumulator": "accumulator"},
    "Adamax": {"momentum": "m", "norm": "v", "m": "m", "u": "v"},
    "Nadam": {"momentum": "m", "velocity": "v", "m": "m", "v": "v"},
    "Ftrl": {"accumulator": "accumulator", "linear": "linear"},
    "Lion": {"momentum": "m", "m": "m"},
}
KERAS3_SLOTS["AdamW"] = KERAS3_SLOTS["Adam"]
# What a Keras 3 config says of options that are not in use.
KERAS3_IDLE = {
    "weight_decay": None,
    "clipnorm": None,
    "global_clipnorm": None,
    "clipvalue": None,
    "use_ema": False,
    "loss_scale_factor": None,
    "gradient_accumulation_steps": None,
    "jit_compile": False,
    "is_legacy_optimizer": False,
}


def keras3_groups(class_name: str, config: Mapping[str, Any]) -> SlotGroups:
    """The slots of a Keras 3 optimizer in the order of its `variables`, under OptimizerV2's names. KeyError for unknown classes."""
    first: SlotGroups = ((Slot("average"),),) if config.get("use_ema") else ()
    if config.get("gradient_accumulation_steps"):
        first += ((Slot("gradient_accumulator"),),)
    names = list(dict.fromkeys(KERAS3_SLOTS[class_name].values()))
    if class_name == "SGD":
        return first + (((Slot("momentum"),),) if config.get("momentum") or is_tensorflow(config) else ())
    if class_name == "RMSprop":
        used = {"rms": True, "momentum": config.get("momentum"), "mg": config.get("centered")}
        return first + tuple((Slot(name),) for name in names if used[name])
    if "vhat" in names:
        return (*first, (Slot("m"), Slot("v")), *([(Slot("vhat"),)] if config.get("amsgrad") else []))
    return (*first, tuple(Slot(name) for name in names))


def is_tensorflow(config: Mapping[str, Any]) -> bool:
    """Whether a config is of TensorFlow 2.11+'s classes, which lack Keras 3's learning rate and Nadam's product among their variables."""
    return "is_legacy_optimizer" in config


def momentum_product(iterations: int, beta_1: float) -> Tensor:
    """What Keras 3's Nadam has multiplied up after so many steps, with the beta_1 of now: TensorFlow's files lack it."""
    product = math.prod(beta_1 * (1 - 0.5 * 0.96**t) for t in range(1, iterations + 1))
    return torch.tensor(product, dtype=torch.float32)


def from_keras3(class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A Keras 3 config in OptimizerV2's words: options that are not in use left out; Nadam's momentum schedule by `decay`."""
    kept = {key: value for key, value in config.items() if key not in KERAS3_IDLE or value != KERAS3_IDLE[key]}
    if not kept.get("use_ema"):
        kept = {key: value for key, value in kept.items() if not key.startswith("ema_")}
    # Keras 3's 0.96^t is OptimizerV2's 0.96^(schedule_decay * t), which its config calls `decay`
    return kept | ({"decay": 1.0} if class_name == "Nadam" else {})


_ADAM = "torch.optim adds epsilon to sqrt(v / (1 - beta_2^t)), Keras to sqrt(v): Keras's counts up to 32 times as much in early steps."
_DIFFERENT = {
    ("torch.optim", "Adam"): _ADAM,
    ("torch.optim", "AdamW"): _ADAM,
    ("torch.optim", "Adamax"): "torch.optim's norm contains epsilon, Keras adds it in the step: v is up to epsilon too large.",
    ("Keras 3", "Adagrad"): "Keras 3 divides by sqrt(accumulator + epsilon), OptimizerV2 by sqrt(accumulator) + epsilon.",
}


def differences(checkpoint: Checkpoint) -> list[str]:
    """Where OptimizerV2's update rule continues this state otherwise than its source would have, beyond rounding."""
    source, cls = checkpoint.source, checkpoint.class_name
    found = [_DIFFERENT[source, cls]] if (source, cls) in _DIFFERENT else []
    momentum = checkpoint.config.get("momentum")
    if cls == "RMSprop" and source == "torch.optim" and momentum:
        found.append("With momentum, torch.optim divides by sqrt(rms) + epsilon, Keras by sqrt(rms + epsilon).")
    if cls == "RMSprop" and source == "Keras 3" and not momentum:
        found.append("Without momentum, Keras 3 divides by sqrt(rms + epsilon), OptimizerV2 by sqrt(rms) + epsilon.")
    return [f"{cls} from {source} goes on with OptimizerV2's rule. {text}" for text in found]
