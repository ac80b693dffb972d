"""The torch twin of the `op` namespace that update rules are written in.

Every function is correctly rounded (`pow` within one unit in the last place) in float32 and float64, on CPU and GPU.
`kernels/op.py` is the Triton twin: the same names in the same order. Arguments are floating tensors of one dtype
and device; scalars are 0-d tensors on that device, because torch divides a CUDA tensor by a Python number with a reciprocal.
"""

import numpy as np
import torch
from torch import Tensor


def abs(x: Tensor) -> Tensor:
    """|x|; NaN stays NaN."""
    return torch.abs(x)


def clip(x: Tensor, bound: Tensor) -> Tensor:
    """x limited to [-bound, bound]; NaN stays NaN."""
    return torch.minimum(torch.maximum(x, -bound), bound)


def div(x: Tensor, y: Tensor) -> Tensor:
    """x / y, correctly rounded."""
    return torch.div(x, y)


def maximum(x: Tensor, y: Tensor) -> Tensor:
    """The larger of x and y; NaN if either is NaN."""
    return torch.maximum(x, y)


def sign(x: Tensor) -> Tensor:
    """-1, 0 or 1; 0 for both zeros, NaN for NaN."""
    return torch.where(x != x, x, torch.sign(x))


def sqrt(x: Tensor) -> Tensor:
    """Square root, correctly rounded; NaN below zero.

    torch's own CPU square root is not: MKL's is one unit off in 17 % of float32 results. numpy's and torch.compile's are exact.
    """
    if torch.compiler.is_compiling():
        return torch.sqrt(x)
    if x.device.type != "cpu":
        return x.double().sqrt().to(x.dtype)
    root = torch.empty_like(x)
    with np.errstate(invalid="ignore"):
        np.sqrt(x.numpy(), out=root.numpy())
    return root


def where(condition: Tensor, x: Tensor, y: Tensor | float) -> Tensor:
    """x where condition holds, else y."""
    return torch.where(condition, x, y)


def pow(x: Tensor, y: Tensor) -> Tensor:
    """x ** y through float64, rounded once: float32 results agree between executors but for 1 in about 10^8."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.pow(x.double(), y.double()).to(x.dtype)
    with np.errstate(all="ignore"):
        power = np.power(x.numpy().astype(np.float64), y.item())
    return torch.from_numpy(np.asarray(power)).to(x.dtype)
