"""What a rank contributes to a checkpoint, and what the ranks' contributions are together."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fused_kopt import collectives, layout
from fused_kopt.checkpoint import live, scaling, tables
from fused_kopt.collectives import Group
from fused_kopt.distributed.elastic.pieces import NAMES, Chunk, Part, Piece, described, pieces, shares, some
from fused_kopt.errors import CheckpointError
from fused_kopt.optimizer import Optimizer


class Captured(NamedTuple):
    """A rank's share of a checkpoint."""

    common: dict[str, Any]
    """What is the same on all ranks, JSON-able."""
    own: dict[str, dict[str, Any]]
    """What other ranks may not know: `ranges`, `slots` of pieces and the `numbers` that order them, `extra`."""
    chunks: dict[str, Chunk]


def capture(optimizer: Optimizer, variables: Mapping[str, Tensor], group: Group, with_values: bool) -> Captured:
    """This rank's share, copied to the CPU. Raises TornStepError; ValueError where the optimizer has slots for a tensor without name."""
    scale, optimizer = scaling.live(optimizer), scaling.inner(optimizer)
    with optimizer._lock:
        live.refuse_torn(optimizer)
        mine = pieces(optimizer, variables)
        names = {id(piece.tensor): name for name, piece in mine.items() if piece.tensor is not None}
        views = live.slot_views(optimizer, names)
        parts = {name: {slot: _part(optimizer, mine[name], slot, view) for slot, view in found.items()} for name, found in views.items()}
        known = {id(variable): name for name, variable in variables.items()}
        common = {
            "class_name": type(optimizer).__name__,
            "config": {key: value for key, value in optimizer.get_config().items() if key != "name"},
            "iterations": optimizer._state.steps_taken(),
            "variables": {name: described(variable) for name, variable in variables.items()},
            "values": with_values,
            "slots": {name: found for name, found in parts.items() if not mine[name].sharded},
            "multipliers": {known[i]: m for i, (_, m) in optimizer._multipliers.items() if i in known},
            "sharded": [name for name, piece in mine.items() if piece.sharded],
        }
        extra = (live.extras(optimizer) if any(views.values()) else {}) | scale  # without slots, what steps carry is nobody's
        shards = {name: found for name, found in parts.items() if mine[name].sharded and found}
        own: dict[str, dict[str, Any]] = {
            "ranges": {name: (piece.start, piece.end) for name, piece in mine.items() if piece.sharded},
            "slots": shards,
            "numbers": {name: _number(optimizer, mine[name]) for name in shards},
            "extra": {name: (NAMES[v.dtype], v.item()) for name, v in extra.items()},
        }
        chunks = {}
        for name, (start, end) in _written(mine, group).items():
            piece, elements = mine[name], variables[name].numel()
            for slot, part in parts.get(name, {}).items():
                ranges = [part.range(*ends) for ends in ((piece.start, piece.end), (start, end), (0, elements))]
                chunks[f"slot/{slot}/{name}"] = _copy(views[name][slot], *ranges)
            if with_values:
                chunks[f"variable/{name}"] = _copy(variables[name], (0, elements), (start, end), (0, elements))
        return Captured(common, own, some(chunks))


def _number(optimizer: Optimizer, piece: Piece) -> int:
    """Which number the variable's first element has among those that have slots: the order in which variables got theirs."""
    _, _, number = optimizer._state.parts[id(piece.tensor)]
    return number - piece.start


def _part(optimizer: Optimizer, piece: Piece, slot: str, view: Tensor) -> Part:
    assert piece.tensor is not None
    if "/" in slot:
        raise CheckpointError(f"A slot's name must not contain '/'. Received: {slot!r}.")
    if (id(piece.tensor), slot) not in optimizer._state.extra:
        return Part(NAMES[view.dtype], optimizer._state.bucket(piece.tensor).kind(slot)[1])
    if piece.sharded:
        raise CheckpointError(f"Slot {slot!r} of a sharded variable has a shape of its own, {tuple(view.shape)}, and cannot be saved.")
    return Part(NAMES[view.dtype], 0, list(view.shape))


def _written(mine: Mapping[str, Piece], group: Group) -> dict[str, tuple[int, int]]:
    """The ranges of variables' elements that this rank writes: its pieces, and an equal part of what every rank has."""
    whole = {name: piece.end for name, piece in mine.items() if not piece.sharded}
    dealt = zip(whole, shares(list(whole.values()), collectives.rank(group), collectives.size(group)), strict=True)
    return {name: (piece.start, piece.end) for name, piece in mine.items()} | dict(dealt)


def _copy(view: Tensor, held: tuple[int, int], written: tuple[int, int], whole: tuple[int, int]) -> Chunk:
    """Of a tensor's elements in memory order, which are `held` of a global one, those that are to be written."""
    first, last = (end - held[0] for end in written)
    return Chunk(written[0], whole[1], layout.memory_order(view.detach())[first:last].to("cpu", copy=True))


def merged(common: dict[str, Any], owns: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """The state of all ranks, as JSON has it. Raises CheckpointError where two ranks differ, or all together lack a part."""
    for name in common["sharded"]:
        there = sum(end - start for start, end in {own["ranges"][name] for own in owns})
        if there != math.prod(common["variables"][name][0]):
            raise CheckpointError(
                f"These ranks have {there} elements of {name}'s slots, not all. Pass the `group` that shares the optimizer."
            )
    found: dict[str, dict[str, Any]] = {"slots": {}, "numbers": {}, "extra": {}}
    for rank, own in enumerate(owns):
        for kind, before in found.items():
            told = own[kind]
            both = [name for name in told if name in before]
            lines = tables.rows({name: str(told[name]) for name in both}, {name: str(before[name]) for name in both})
            tables.refuse_unless(lines, f"Rank {rank} and those before it have different {kind}:")
            before |= told
    numbers = found.pop("numbers")
    pieces = {name: found["slots"][name] for name in sorted(numbers, key=lambda name: numbers[name])}
    state = {kind: told for kind, told in common.items() if kind != "sharded"}
    return state | found | {"slots": common["slots"] | pieces}
