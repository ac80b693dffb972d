"""Slots: the per-variable state of an optimizer, declared in groups that give Keras's weight order."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor


class Slot(NamedTuple):
    """One slot: its Keras name and the number every element starts from."""

    name: str
    initial: float = 0.0


# Slots of one group are created together, hence interleaved per variable (Ftrl); groups follow one another.
SlotGroups = tuple[tuple[Slot, ...], ...]


def flatten(groups: SlotGroups) -> tuple[Slot, ...]:
    """The slots in rule order: the order in which a rule receives and returns them."""
    return tuple(slot for group in groups for slot in group)


def creation_order(variables: Iterable[Tensor], groups: SlotGroups) -> Iterator[tuple[Tensor, Slot]]:
    """(variable, slot) in the order in which Keras creates them, and so lists them in `weights`."""
    variables = list(variables)
    for group in groups:
        for variable in variables:
            for slot in group:
                yield variable, slot
