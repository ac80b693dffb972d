"""From a rule's text to a kernel: clone it over the Triton `op`, then compile it or hand it to the interpreter."""

import functools
import types
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

from fused_kopt.kernels import op, update
from fused_kopt.kernels.rebind import is_torch_op, rebind


@functools.cache
def compiled(rule: types.FunctionType) -> Any:
    """The rule as a `triton.jit` function: its `op` is the Triton twin, the functions it calls are jitted too.

    The clone's hash covers `op`, so that a change there misses Triton's disk cache.
    """

    def replace(value: Any) -> Any:
        if is_torch_op(value):
            return op
        return compiled(value) if isinstance(value, types.FunctionType) else value

    clone = rebind(rule, replace)
    clone.__globals__["tl"] = tl
    return triton.jit(clone)


def _interpreted_pow(x: Any, y: Any) -> Any:
    """`op.pow` for the interpreter, which has no libdevice."""
    with np.errstate(all="ignore"):
        power = np.power(x.handle.data.astype(np.float64), np.float64(y.handle.data.item()))
    dtype = x.handle.data.dtype
    return tl.core.tensor(interpreter.TensorHandle(power.astype(dtype), x.dtype), x.type)


def _interpreted_largest(x: Any, at: Any) -> Any:
    """`op.largest` for the interpreter, which cannot call tl.max from a kernel that it interprets."""
    values = x.handle.data if at[1] is None else np.where(at[1].handle.data, x.handle.data, 0)
    found = values.reshape(-1, op.GROUP.value).max(axis=1)
    return tl.core.tensor(interpreter.TensorHandle(found, x.dtype), tl.block_type(x.dtype, list(found.shape)))


def _interpreted_total(x: Any) -> Any:
    """`update.total` for the interpreter: `tl.sum` is a kernel function, which only a compiled kernel may call."""
    return tl.core.tensor(interpreter.TensorHandle(np.sum(x.handle.data, keepdims=True), x.dtype), x.dtype)


@functools.cache
def interpreted(function: types.FunctionType) -> Any:
    """A kernel's or a rule's plain Python twin for Triton's interpreter.

    TRITON_INTERPRET chooses for the whole process, when a kernel is decorated; unwrapping the decorated functions lets
    one process interpret and compile the same text. Kernel text uses language builtins only, so that this is complete.
    """
    if function in (op.pow.fn, op.largest.fn, update.total.fn):
        return {op.pow.fn: _interpreted_pow, op.largest.fn: _interpreted_largest}.get(function, _interpreted_total)

    def replace(value: Any) -> Any:
        if is_torch_op(value):
            return types.SimpleNamespace(**{name: interpreted(f.fn) for name, f in vars(op).items() if hasattr(f, "fn")})
        if isinstance(value, triton.runtime.JITFunction):
            return interpreted(value.fn)
        return interpreted(value) if isinstance(value, types.FunctionType) else value

    clone = rebind(function, replace)
    clone.__globals__["tl"] = tl
    return clone
