"""What the tests of hosts share: our optimizers by name, and runs compared bit for bit."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fused_kopt import torch_optim

# One of each kind: decoupled decay, one slot, a product beside the slots, slots that do not start at 0.
OPTIONS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "SGD": {"lr": 0.05, "momentum": 0.9},
    "Nadam": {"lr": 0.01},
    "Ftrl": {"lr": 0.1},
}


def make(name: str, parameters: Iterable[Any], **options: Any) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = getattr(torch_optim, name)(parameters, **OPTIONS[name], **options)
    return optimizer


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """The values of nested dicts and lists by their paths."""
    if isinstance(tree, (dict, list, tuple)):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {key: value for name, branch in pairs for key, value in leaves(branch, f"{path}/{name}").items()}
    return {path: tree}


def assert_equal(first: Any, second: Any) -> None:
    """Two trees hold the same values: tensors of equal dtypes, bit for bit."""
    first, second = leaves(first), leaves(second)
    assert first.keys() == second.keys()
    for path, value in first.items():
        other = second[path]
        if isinstance(value, Tensor):
            assert (value.dtype, value.shape) == (other.dtype, other.shape), path
            assert torch.equal(value, other), path
        else:
            assert value == other, path
