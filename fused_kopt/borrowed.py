"""Fused steps on variables, gradients and slots that somebody else owns: what the Keras 3 and torch.optim classes call."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kopt import execute, gradients, layout
from fused_kopt.buffers import Bucket
from fused_kopt.clipping import Clips
from fused_kopt.execute import Executor, Rule, Update

NO_CLIPS = Clips(1.0, None, None, None)


class Borrowed(NamedTuple):
    """What a step is given. It may lie elsewhere in every step."""

    variables: Sequence[Tensor]
    """Distinct leaves."""
    gradients: Sequence[Tensor]
    """Dense, of the variables' shapes and devices; float16, bfloat16, float32 or float64."""
    slots: Sequence[Sequence[Tensor]]
    """For each slot of the rule, in its order, one tensor per variable, in the variable's shape and on its device."""
    names: Sequence[str] | None = None
    """What messages call the variables; by default their positions."""


class Borrower:
    """Takes steps on tensors that are looked at anew in every step: whoever owns them may replace or move them in between.

    executor: as for every optimizer.
    """

    def __init__(self, executor: Executor = "auto") -> None:
        self.executor = executor

    def step(
        self,
        rule: Rule,
        given: Borrowed,
        scalars: Callable[[torch.dtype], Sequence[Any]],
        clips: Clips = NO_CLIPS,
        exact: bool = True,
    ) -> None:
        """Update variables and slots in place: one launch per device and dtypes.

        Args:
            rule: a module-level function, or what `options.around` made of one.
            given: variables, gradients and slots.
            scalars: function of a compute dtype (float32, or float64 for float64 variables) that returns the rule's NamedTuple
                of scalars, rounded to that dtype: one for all variables, or one per variable.
            clips: what happens to gradients before the rule.
            exact: whether executors owe each other equal bits.

        Raises what `Optimizer.apply_gradients` raises for gradients and variables, before anything is written.
        """
        pairs = gradients.check(list(zip(given.gradients, given.variables, strict=True)))
        with torch.no_grad():
            for position, (gradient, variable) in enumerate(pairs):
                compute = layout.compute_dtype(variable.dtype)
                bucket = Bucket(variable.device, variable.dtype)
                bucket.adopt([variable], layout.plan([variable]), {})
                bucket.views = {str(i): [column[position]] for i, column in enumerate(given.slots)}
                rows = scalars(compute)
                row = rows[position if len(rows) > 1 else 0]
                execute.run(Update(bucket, [variable.detach()], [gradient], tuple(bucket.views), rule, row, exact), "reference")
        torch.autograd.graph.increment_version(list(given.variables))
