"""Slots: the per-variable state of an optimizer, declared in groups that give Keras's weight order."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Slot(NamedTuple):
    """One slot: its Keras name and the number every element starts from.

    Where a precision policy stores a slot in parts (`fused_kopt.precision`), each part is a Slot again, of a dtype of its own.
    """

    name: str
    initial: float = 0.0
    positive: bool = False
    """Whether no element is ever negative."""
    stored: torch.dtype | None = None
    """None: the bucket's compute dtype."""
    group: int = 1
    """How many elements share one value."""
    copied: bool = False
    """Whether it starts as a copy of the variable. Policies store such a slot in the compute dtype, unless they name it."""

    def shape(self, variable: Tensor) -> tuple[int, ...]:
        """Of a variable's part: its own shape, or one value for each group of elements."""
        return tuple(variable.shape) if self.group == 1 else (-(-variable.numel() // self.group),)


# What a launch counts and does not store: where an element is among those of its bucket.
POSITION = Slot("position", stored=torch.int32, group=0)

# The last slot where `ema_momentum` is set.
AVERAGE = Slot("average", copied=True)

# Slots of one group are created together, hence interleaved per variable (Ftrl); groups follow one another.
SlotGroups = tuple[tuple[Slot, ...], ...]


def flatten(groups: SlotGroups) -> tuple[Slot, ...]:
    """The slots in rule order: the order in which a rule receives and returns them."""
    return tuple(slot for group in groups for slot in group)


def creation_order(variables: Iterable[Tensor], groups_of: Callable[[Tensor], SlotGroups]) -> Iterator[tuple[Tensor, Slot]]:
    """(variable, slot) in the order in which Keras creates them, and so lists them in `weights`."""
    groups = [(variable, groups_of(variable)) for variable in variables]
    for number in range(max((len(mine) for _, mine in groups), default=0)):
        for variable, mine in groups:
            for slot in mine[number] if number < len(mine) else ():
                yield variable, slot
