"""What stands between the pairs that a caller passes and the launches, where a step is not one process's own: stages, and how ranks
describe their steps to each other."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from operator import is_
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fused_kopt import agreement, gradients, hyperparameters, precision, tensors
from fused_kopt.agreement import Claim, Facts
from fused_kopt.buffers import Bucket
from fused_kopt.loss_scale import Guard

Piece = tuple[Tensor | None, int, int]


class Stage(Protocol):
    """A step's part before and after the launches. `enter` and `leave` are called once per step, in this and in reversed order.

    Attributes: `aggregates`, whether it sums gradients over ranks where it is asked to.
    """

    aggregates: bool

    def reported(self) -> AbstractContextManager[None]:
        """A block around the step, in which other ranks hear of errors."""

    def enter(self, owner: Any, given: Any, aggregated: bool) -> Any:
        """From what `apply_gradients` got to what is updated here. aggregated: whether gradients are to be summed over the ranks.

        Nothing of the optimizer has changed where it raises.
        """

    def before(self, bucket: Bucket) -> None:
        """A bucket's launch comes next."""

    def after(self, bucket: Bucket) -> None:
        """A bucket was launched."""

    def leave(self) -> None:
        """All launches are under way."""

    def publish(self, written: Sequence[Tensor]) -> None:
        """What the optimizer's pieces hold goes to the caller's variables, outside a step. written: those that changed."""

    def settle(self, owner: Any, variables: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the optimizer keeps slots for in place of these variables (`Optimizer.build`)."""

    def pieces(self) -> Mapping[int, Piece]:
        """By id of a caller's variable: what the optimizer has slots for here, and which of its elements, in memory order, that is."""


class Seen:
    """One look at pairs, and the test that the next ones are alike, so that they need no other look.

    Attributes: `gradients` (None where there is none), `variables`, `codes`; `facts` and their hash, `plan`.
    """

    def __init__(self, owner: Any, given: Sequence[tuple[Any, Any]]) -> None:
        """Raises what `apply_gradients` raises for gradients and variables, RuntimeError for a sparse gradient."""
        checked = gradients.check([(v if g is None else g, v) for g, v in given])
        self.gradients: list[Tensor | None] = [None if g is None else c for (g, _), (c, _) in zip(given, checked, strict=True)]
        self.variables = [v for _, v in given]
        _refuse_sparse(self.gradients)
        if owner is not None:
            owner._check_known([(g, v) for g, v in zip(self.gradients, self.variables, strict=True) if g is not None])
        self.codes = agreement.codes(self.gradients)
        self._absent = [g is None for g in self.gradients]
        self._whole = not any(self._absent)
        self.facts = facts(owner, self.variables)
        self.plan = agreement.hashed(self.facts)
        self._settings = None if owner is None else owner._repeats  # made anew where policies or multipliers change
        self._guards = tensors.guards([t for t in (*self.gradients, *self.variables) if t is not None])

    def again(self, owner: Any, found: Sequence[Any], variables: Sequence[Any]) -> bool:
        """Whether these gradients and variables are like those; if so, `gradients` are these."""
        if len(variables) != len(self.variables) or (owner is not None and owner._repeats is not self._settings):
            return False
        if not all(map(is_, variables, self.variables)) or [g is None for g in found] != self._absent:
            return False
        if not self._guards.check(*(found if self._whole else [g for g in found if g is not None]), *variables):
            return False
        self.gradients = list(found)
        return True


def _refuse_sparse(given: Sequence[Tensor | None]) -> None:
    for position, gradient in enumerate(given):
        if gradient is not None and gradient.layout != torch.strided:
            raise RuntimeError(
                f"Gradient {position} is sparse ({gradient.layout}), which cannot be aggregated in a flat buffer. "
                "Reduce it yourself and pass experimental_aggregate_gradients=False."
            )


def look(owner: Any, given: Any, before: Seen | None) -> Seen:
    """A look at pairs: the one before where it holds for them too. Raises what `Seen` raises, TypeError for anything but pairs."""
    pairs, flat = gradients.flattened(given)
    if before is not None and flat and before.again(owner, flat[::2], flat[1::2]):
        return before
    return Seen(owner, gradients.listed(pairs))


def tell(owner: Any, variable: Tensor, piece: Tensor) -> None:
    """What was said of a variable counts for what stands in its place."""
    if id(variable) in owner._state.policies:
        owner._state.policies[id(piece)] = (piece, owner._state.policies[id(variable)][1])
    if id(variable) in owner._multipliers:
        owner._multipliers[id(piece)] = (piece, owner._multipliers[id(variable)][1])


def claim(owner: Any, seen: Seen, values: Callable[[], list[tuple[str, Tensor]]], compare: bool) -> Claim:
    """What a rank is about to do with these pairs."""
    return Claim(seen.plan, numbers(owner), seen.codes, lambda: seen.facts, values, compare)


def facts(owner: Any, variables: Sequence[Tensor]) -> list[tuple[str, str]]:
    """What ranks must have in common: the optimizer's settings, and the variables in their order."""
    found = [] if owner is None else settings(owner)
    found.append(("how many pairs there are", str(len(variables))))
    for position, variable in enumerate(variables):
        text = agreement.described(variable)
        if owner is not None:
            policy, multiplier = owner._state.key(variable)[2], owner._multipliers.get(id(variable))
            text += "" if policy == precision.DEFAULT else f", {precision.title(policy)}"
            text += "" if multiplier is None else f", learning rate times {multiplier[1]}"
        name = getattr(variable, "name", None)
        found.append((f"variable {position}", f"{name!r} {text}" if name else text))
    return found


def settings(owner: Any) -> list[tuple[str, str]]:
    """An optimizer's class and configuration, without calling functions that hyperparameters may be."""
    raw = owner._hyper
    fixed = {name: 0.0 if callable(value) and not hyperparameters.is_schedule(value) else value for name, value in raw.items()}
    owner._hyper = {name: value if hyperparameters.is_schedule(value) else 0.0 for name, value in fixed.items()}
    try:
        config = owner.get_config()
    finally:
        owner._hyper = raw
    found = [("the optimizer's class", type(owner).__name__)]
    found += [(name, repr(value)) for name, value in config.items() if name != "name" and name not in owner._clips]
    functions = [getattr(f, "__qualname__", type(f).__name__) for f in owner._transformers]
    return [*found, ("gradient_transformers", repr(functions))]


def numbers(owner: Any) -> Facts:
    """What may change from step to step: iterations, hyperparameters, limits, how the loss is scaled."""
    if owner is None:
        return []
    live = [(name, _number(value)) for name, value in owner._hyper.items()]
    clips = [(name, repr(value)) for name, value in owner._clips.items()]
    return [
        ("iterations", str(owner._state.steps_taken())),
        *live,
        *clips,
        ("grad_scale", repr(owner.grad_scale)),
        ("loss scaling", _scaling(owner._guard)),
        ("the learning rate of the last step", repr(owner._last_rate)),
    ]


def _number(value: Any) -> str:
    if callable(value):  # calling it may change what the step will get
        return "a schedule" if hyperparameters.is_schedule(value) else "a function"
    return repr(float(np.float32(value)))  # as every rank will have it once it is live


def _scaling(guard: Guard | None) -> str:
    if guard is None:
        return "none"
    scale = guard.state.scale
    known = "" if scale.is_cuda else f", scale {scale.item()}"  # reading it there would wait for the device
    return f"{guard.state.growth_steps} growth steps{known}, {'' if guard.unscale is None else 'still '}in the gradients"
