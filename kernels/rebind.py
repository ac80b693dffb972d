"""The same code over other globals: how one rule text reaches Triton, its interpreter and C++."""

import dis
import types
from collections.abc import Callable, Iterator
from typing import Any


def _globals_of(code: types.CodeType) -> Iterator[str]:
    """The global names a function reads (`co_names` would add the attributes, where `tl.abs` names `abs`)."""
    yield from (i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL")
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals_of(constant)


def rebind(function: types.FunctionType, replace: Callable[[Any], Any]) -> types.FunctionType:
    """The same code over globals in which every name the code uses went through `replace`."""
    scope = dict(function.__globals__)
    for name in set(_globals_of(function.__code__)):
        if name in scope:
            scope[name] = replace(scope[name])
    clone = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
    clone.__module__ = function.__module__
    clone.__qualname__ = function.__qualname__
    clone.__annotations__ = function.__annotations__
    return clone


def is_torch_op(value: Any) -> bool:
    """Whether a rule's global is the torch twin of `op`, which every other executor replaces."""
    return isinstance(value, types.ModuleType) and value.__name__ == "fused_kopt.op"
