"""From a rule's text to a kernel: clone it over the Triton `op`, then compile it or hand it to the interpreter."""

import dis
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

from fused_kopt.kernels import op


def _globals_of(code: types.CodeType) -> Iterator[str]:
    """The global names a function reads (`co_names` would add the attributes, where `tl.abs` names `abs`)."""
    yield from (i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL")
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals_of(constant)


def _rebind(function: types.FunctionType, replace: Callable[[Any], Any]) -> types.FunctionType:
    """The same code over globals in which every name the code uses went through `replace`."""
    scope = dict(function.__globals__)
    for name in set(_globals_of(function.__code__)):
        if name in scope:
            scope[name] = replace(scope[name])
    clone = types.FunctionType(function.__code__, {**scope, "tl": tl}, function.__name__, function.__defaults__)
    clone.__module__ = function.__module__
    clone.__qualname__ = function.__qualname__
    clone.__annotations__ = function.__annotations__
    return clone


def _is_torch_op(value: Any) -> bool:
    return isinstance(value, types.ModuleType) and value.__name__ == "fused_kopt.op"


@functools.cache
def compiled(rule: types.FunctionType) -> Any:
    """The rule as a `triton.jit` function: its `op` is the Triton twin, the functions it calls are jitted too.

    The clone's hash covers `op`, so that a change there misses Triton's disk cache.
    """

    def replace(value: Any) -> Any:
        if _is_torch_op(value):
            return op
        return compiled(value) if isinstance(value, types.FunctionType) else value

    return triton.jit(_rebind(rule, replace))


def _interpreted_pow(x: Any, y: Any) -> Any:
    """`op.pow` for the interpreter, which has no libdevice."""
    with np.errstate(all="ignore"):
        power = np.power(x.handle.data.astype(np.float64), np.float64(y.handle.data.item()))
    dtype = x.handle.data.dtype
    return tl.core.tensor(interpreter.TensorHandle(power.astype(dtype), x.dtype), x.type)


@functools.cache
def interpreted(function: types.FunctionType) -> Any:
    """A kernel's or a rule's plain Python twin for Triton's interpreter.

    TRITON_INTERPRET chooses for the whole process, when a kernel is decorated; unwrapping the decorated functions lets
    one process interpret and compile the same text. Kernel text uses language builtins only, so that this is complete.
    """
    if function is op.pow.fn:
        return _interpreted_pow

    def replace(value: Any) -> Any:
        if _is_torch_op(value):
            return types.SimpleNamespace(**{name: interpreted(f.fn) for name, f in vars(op).items() if hasattr(f, "fn")})
        if isinstance(value, triton.runtime.JITFunction):
            return interpreted(value.fn)
        return interpreted(value) if isinstance(value, types.FunctionType) else value

    return _rebind(function, replace)
