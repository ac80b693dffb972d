"""Options of any rule, as rules around it: weight decay, an L2 penalty, an average of the variables."""

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

from fused_kopt.execute import Rule


def inner(p, g, slots, s):
    """Where `around` puts the rule."""
    raise NotImplementedError


def decayed(p, g, slots, s):
    """Decoupled weight decay, before the rule: `s.decay` = 1 - weight_decay * learning rate, 1 for none."""
    return inner(p * s.decay, g, slots, s)


def penalised(p, g, slots, s):
    """An L2 penalty, added to the gradient: `s.penalty` is the weight decay of torch.optim's uncoupled optimizers."""
    return inner(p, g + p * s.penalty, slots, s)


def averaged(p, g, slots, s):
    """An exponential average of the new variable, in the last slot: `s.average` is its momentum."""
    p, values = inner(p, g, slots[:-1], s)
    return p, values + (slots[-1] * s.average + p * s.one_minus_average,)  # noqa: RUF005 - Triton has no starred tuples


@functools.cache
def around(option: Rule, rule: Rule, rounding: Callable[..., Any] | None = None) -> Rule:
    """The rule with an option around it; always the same function, because executors keep kernels by it.

    rounding: what a codec that names it rounds with (`fused_kopt.codecs`).
    """
    assert isinstance(option, types.FunctionType)
    assert isinstance(rule, types.FunctionType)
    scope = {**option.__globals__, "inner": rule} | ({"rounding": rounding} if rounding else {})
    function = types.FunctionType(option.__code__, scope, f"{option.__name__}_{rule.__name__}")
    function.__module__, function.__qualname__ = option.__module__, function.__name__
    return function


@functools.cache
def extended(scalars: type, *names: str) -> Any:
    """The NamedTuple class of a rule's scalars with those of options behind them."""
    fields: Any = scalars
    return NamedTuple(f"{scalars.__name__}_{'_'.join(names)}", [(name, float) for name in (*fields._fields, *names)])
