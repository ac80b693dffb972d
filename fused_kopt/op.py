"""The torch twin of the `op` namespace that update rules, and the codecs around them, are written in.

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


# For codecs (`fused_kopt.codecs`), in float32 only. Integers are int32: they wrap, and `>>` keeps the sign.

GROUP = 64  # elements that share a scale: 4 bytes for 64 of 1


def bits(x: Tensor) -> Tensor:
    """The bit pattern of float32."""
    return x.view(torch.int32)


def number(x: Tensor) -> Tensor:
    """The float32 of a bit pattern."""
    return x.view(torch.float32)


def integer(x: Tensor) -> Tensor:
    """A whole float32 number as an integer."""
    return x.to(torch.int32)


def position(at: Tensor) -> Tensor:
    """Where elements are in their bucket, int32. `at` is what a rule gets for it; kernels put masks there too."""
    return at


def largest(x: Tensor, at: Tensor) -> Tensor:
    """The largest of each GROUP of consecutive integers >= 0: [n] to [groups]."""
    padded = torch.nn.functional.pad(x, (0, -x.numel() % GROUP))
    return padded.view(-1, GROUP).amax(1)


def spread(x: Tensor, like: Tensor) -> Tensor:
    """What groups have, for their elements: [groups] to the shape of `like`."""
    return x.repeat_interleave(GROUP)[: like.numel()]
