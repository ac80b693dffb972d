"""Gradients of several backward passes, added up in float32 beside variables of fewer bits."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kopt import gradients, layout, tape
from fused_kopt.borrowed import Borrowed, Borrower
from fused_kopt.execute import Executor


class Scalars(NamedTuple):
    weight: float


def added(p, g, slots, s):  # type: ignore[no-untyped-def]
    """A buffer and what is added to it."""
    return p + g * s.weight, ()


class GradientBuffers:
    """A float32 buffer for the gradient of every variable ("main_grad"): what micro-batches add to, and what a step reads.

        buffers = GradientBuffers(model.parameters())
        for batch in batches:
            loss(model, batch).backward()
            buffers.add(weight=1 / len(batches))
        optimizer.apply_gradients(buffers)
        buffers.zero()

    One launch per device and dtypes adds all gradients, reading each in its own dtype; of bfloat16 gradients alone, small ones would be
    lost in the sum. The step reads the buffers in place. Iterating gives (buffer, variable) pairs, with None for a variable that had no
    gradient since `zero`. Buffers are 4 bytes an element (8 of a float64 variable), side by side in one tensor per device and dtype.

    Args:
        variables: leaves, each once; they may be nested in lists.
        executor: as for every optimizer.

    Attributes:
        variables: in order. buffers: for each its buffer, in its shape.

    Raises what `apply_gradients` raises for a variable.
    """

    def __init__(self, variables: Iterable[Tensor], executor: Executor = "auto") -> None:
        self.variables = list({id(v): v for v in tape.flatten(variables)}.values())
        gradients.check([(v.detach(), v) for v in self.variables])
        self._flat: list[Tensor] = []
        self._borrower = Borrower(executor)
        buffers: dict[int, Tensor] = {}
        alike: dict[Any, list[Tensor]] = {}
        for variable in self.variables:
            alike.setdefault((variable.device, layout.compute_dtype(variable.dtype)), []).append(variable)
        for (device, dtype), members in alike.items():
            segments = layout.plan(members)
            self._flat.append(torch.zeros(segments[-1].end, dtype=dtype, device=device))
            places = [segment.of(self._flat[-1]) for segment in segments]
            buffers |= {id(variable): place for variable, place in zip(members, places, strict=True)}
        self.buffers = [buffers[id(variable)] for variable in self.variables]
        self._filled = [False] * len(self.variables)

    def add(self, grads: Sequence[Tensor | None] | None = None, weight: float = 1.0) -> None:
        """Add gradients times `weight`, computed in the buffers' dtype.

        grads: one for each variable, dense or None. Default: every variable's `.grad`, which is None afterwards.

        Raises ValueError for another count, and what `apply_gradients` raises for a gradient; nothing has been added then.
        """
        given = [v.grad for v in self.variables] if grads is None else list(grads)
        if len(given) != len(self.variables):
            raise ValueError(f"`grads` must have one gradient for each of {len(self.variables)} variables. Received: {len(given)}.")
        there = [(g, b) for g, b in zip(given, self.buffers, strict=True) if g is not None]
        if there:
            borrowed = Borrowed([b for _, b in there], [g for g, _ in there], ())
            self._borrower.step(added, borrowed, functools.partial(_scalars, float(weight)))
        self._filled = [filled or g is not None for filled, g in zip(self._filled, given, strict=True)]
        if grads is None:
            for variable in self.variables:
                variable.grad = None

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor]]:
        """(buffer, variable) pairs, for `apply_gradients`."""
        return iter([(b if filled else None, v) for b, v, filled in zip(self.buffers, self.variables, self._filled, strict=True)])

    def zero(self) -> None:
        """Start again from zeros: one operation per device and dtype."""
        for flat in self._flat:
            flat.zero_()
        self._filled = [False] * len(self.variables)


def _scalars(weight: float, compute: torch.dtype) -> list[Scalars]:
    return [Scalars(weight)]
