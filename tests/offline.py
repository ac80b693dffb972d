"""Every rule compiled once per target and dtypes, in the default configuration; needs no GPU."""

import functools
from collections.abc import Callable
from typing import Any

from fused_kopt import prepare
from fused_kopt.kernels import offline
from fused_kopt.kernels.offline import TARGETS, Code, Spec

__all__ = ["TARGETS", "Code", "compile_rule"]


@functools.cache
def compile_rule(rule: Callable[..., Any], scalars: type, slots: int, target: str, dtypes: tuple[Any, Any], clipped: bool) -> Code:
    """Compile one rule for one target. dtypes: of the variable and of the gradient."""
    return offline.build(Spec(rule, prepare.scale_and_clip if clipped else prepare.keep, scalars, slots, *dtypes), target)
