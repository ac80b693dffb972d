"""Which steps can be repeated: the last few are kept, and found again by their tensors or by their Flat."""

from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kopt import gradients
from fused_kopt.execute import Chosen, Executor
from fused_kopt.flat import Flat
from fused_kopt.repeat import Repeat
from fused_kopt.updates import Launch

# Launches kept: of the full set of variables, and of subsets that come again (alternating losses, frozen parts).
KEPT = 4


class Known(NamedTuple):
    """A Flat's launches."""

    flat: Flat
    each: Repeat
    """Segment by segment."""
    together: Repeat
    """A buffer as one segment, where the slots lie in the same order."""
    addresses: list[int]
    """Of the gradients; another list once `each` has served others."""


class Repeats:
    """The last few steps that can be repeated, the latest first."""

    def __init__(self) -> None:
        self._kept: list[Repeat] = []
        self._flat: Known | None = None

    def find(self, flat: Sequence[Any], executor: Executor) -> Repeat | None:
        """The launches for gradients and variables in turn, holding their addresses; None where the long way must be taken."""
        repeat = self.match(flat[::2], flat[1::2], executor)
        if repeat is None and any(gradient is None for gradient in flat[::2]):
            pairs = list(zip(flat[::2], flat[1::2], strict=True))
            there = [pair for pair in pairs if pair[0] is not None]
            repeat = self.match([g for g, _ in there], [v for _, v in there], executor)
            if repeat is not None:
                gradients.warn_missing([gradients.name(v, i) for i, (g, v) in enumerate(pairs) if g is None])
        return repeat

    def match(self, gradients: Sequence[Any], variables: Sequence[Any], executor: Executor, slots: Sequence[Any] = ()) -> Repeat | None:
        """The same, without a look for absent gradients. slots: those that somebody else owns."""
        for position, repeat in enumerate(self._kept):
            if repeat.executor == executor and repeat.meets(gradients, variables, slots):
                self._kept.insert(0, self._kept.pop(position))
                return repeat
        return None

    def of(self, flat: Flat, together: bool, executor: Executor) -> Repeat | None:
        """The launches for a Flat that is whole; None where its tensors must be looked at.

        together: whether its variables share their scalars and factors.
        """
        if self._flat is None or self._flat.flat is not flat or not flat.whole():
            return None
        repeat = self._flat.together if together else self._flat.each
        same = repeat.executor == executor and self._flat.each.stays() and self._flat.each.gradient_addresses is self._flat.addresses
        return repeat if same else None

    def remember(self, flat: Flat) -> None:
        """The latest step was this Flat's: if it is whole and the step can be repeated, the next ones need not compare its tensors."""
        repeat = self._kept[0] if flat.whole() and self._kept else None
        if repeat and repeat.meets(flat.gradients, flat.variables):
            self._flat = Known(flat, repeat, repeat.together(flat), repeat.gradient_addresses)

    def learn(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        launches: Sequence[Launch],
        chosen: Sequence[Chosen],
        executor: Executor,
        slots: Sequence[Tensor] = (),
    ) -> None:
        """Keep a step's launches if they can run again: in place, each variable once, on executors that read addresses only."""
        updates = [launch.update for launch in launches]
        borrowed = {g.data_ptr() for update in updates for g in update.gradients if g is not None}
        if (
            "reference" in chosen
            or any(launch.finish for launch in launches)
            or len({id(update.bucket) for update in updates}) != len(updates)
            or sum(g is not None for update in updates for g in update.gradients) != len(pairs)
            or any(g.layout != torch.strided or g.data_ptr() not in borrowed for g, _ in pairs)
        ):
            return
        repeat = Repeat(pairs, updates, chosen, executor, slots)
        others = [old for old in self._kept if len(old.variables) != len(pairs) or not all(map(is_, old.variables, repeat.variables))]
        self._kept = [repeat, *others[: KEPT - 1]]
