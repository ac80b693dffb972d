"""The Triton twin of `fused_kopt.op`: the same names in the same order, the same rounding.

Plain `/` and `tl.sqrt` compile to `div.full.f32` and `sqrt.approx.ftz.f32`; the `_rn` forms are correctly rounded. They
exist for float32 only; in float64 the plain operators are.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def abs(x):
    return tl.abs(x)


@triton.jit
def clip(x, bound):
    x = tl.maximum(x, -bound, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def div(x, y):
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def maximum(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, tl.where(x == 0, 0.0, x)))


@triton.jit
def sqrt(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def where(condition, x, y):
    return tl.where(condition, x, y)


@triton.jit
def pow(x, y):
    return libdevice.pow(x.to(tl.float64), tl.zeros_like(x).to(tl.float64) + y.to(tl.float64)).to(x.dtype)


GROUP = tl.constexpr(64)


@triton.jit
def bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def number(x):
    return x.to(tl.float32, bitcast=True)


@triton.jit
def integer(x):
    return x.to(tl.int32)


@triton.jit
def position(at):
    return at[0]


@triton.jit
def largest(x, at):
    x = tl.where(at[1], x, 0) if at[1] is not None else x
    return tl.max(tl.reshape(x, (x.shape[0] // GROUP, GROUP)), axis=1)


@triton.jit
def spread(x, like):
    wide = tl.broadcast_to(tl.expand_dims(x, 1), (x.shape[0], GROUP))
    return tl.reshape(wide, (x.shape[0] * GROUP,))
