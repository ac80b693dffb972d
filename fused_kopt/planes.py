"""Where the state of variables is kept, and how many bytes that takes: from shapes alone."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kopt import layout, precision, slots
from fused_kopt.slots import Slot, SlotGroups
from fused_kopt.state import State

Pairs = Sequence[tuple[Tensor, Tensor]]


class Plane(NamedTuple):
    """One flat buffer: a slot, a part of one, or what a master keeps besides its variable."""

    name: str
    dtype: torch.dtype
    group: int
    """How many elements share one value."""
    bytes: int
    """Padding included."""
    padding: int
    """So many of these bytes belong to no element."""

    @property
    def per_element(self) -> float:
        """Bytes of an element, without padding."""
        return self.dtype.itemsize / self.group


class Kept(NamedTuple):
    """How a variable's state is kept."""

    precision: str
    """The policy's name, or what it consists of."""
    slots: tuple[str, ...]
    stored: tuple[Slot, ...]
    """What a launch reads and writes besides the variable."""
    policy: Hashable = None
    """What the variables of one bucket share, besides device and dtype."""
    part: int = 0
    """Of launches that are kept apart, which."""


def borrowed(names: tuple[str, ...]) -> Callable[[Tensor], Kept]:
    """Slots that somebody else owns: in the compute dtype."""
    how = Kept("float32", names, tuple(map(Slot, names)))
    return lambda _: how


def owned(state: State, groups: SlotGroups) -> Callable[[Tensor], Kept]:
    """An optimizer's own: as each variable's precision policy says."""
    names = tuple(slot.name for slot in slots.flatten(groups))

    def of(variable: Tensor) -> Kept:
        policy: Any
        _, _, policy, part = state.key(variable)
        return Kept(precision.title(policy), names, policy.planes(variable.dtype, groups), policy, part)

    return of


def members(pairs: Pairs, how: Callable[[Tensor], Kept]) -> list[tuple[Kept, Pairs]]:
    """The pairs of each bucket, in order of first appearance."""
    found: dict[Any, tuple[Kept, list[tuple[Tensor, Tensor]]]] = {}
    for gradient, variable in pairs:
        mine = how(variable)
        found.setdefault((variable.device, variable.dtype, mine), (mine, []))[1].append((gradient, variable))
    return list(found.values())


def distinct(pairs: Pairs) -> list[Tensor]:
    """The variables of pairs, each once."""
    return list({id(variable): variable for _, variable in pairs}.values())


def of(how: Kept, variables: Sequence[Tensor], alignment: int) -> tuple[Plane, ...]:
    """The flat buffers of a bucket. alignment: elements that a variable's part is rounded up to."""
    padded = [-(-v.numel() // alignment) * alignment for v in variables]
    found = []
    for slot in (slot for slot in how.stored if slot.group):
        dtype = slot.stored or layout.compute_dtype(variables[0].dtype)
        whole = sum(-(-elements // slot.group) for elements in padded)
        used = sum(-(-v.numel() // slot.group) for v in variables)
        found.append(Plane(slot.name, dtype, slot.group, whole * dtype.itemsize, (whole - used) * dtype.itemsize))
    return tuple(found)


def moved(planes: Sequence[Plane], elements: int) -> int:
    """Bytes of a variable's parts, read once and written once."""
    return 2 * sum(plane.dtype.itemsize * -(-elements // plane.group) for plane in planes)
