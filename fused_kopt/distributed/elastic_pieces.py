"""An optimizer's state as ranges of 1-D tensors: which of them this rank writes and reads, whatever the number of ranks."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fused_kopt import collectives, layout
from fused_kopt.checkpoint import scaling, snapshot, tables
from fused_kopt.checkpoint.neutral import Checkpoint
from fused_kopt.collectives import Group
from fused_kopt.distributed.elastic_files import Chunk
from fused_kopt.errors import CheckpointError
from fused_kopt.layout import ALIGNMENT
from fused_kopt.optimizer import Optimizer

KINDS = (*(torch.float16, torch.bfloat16, torch.float32, torch.float64), *(torch.uint8, torch.int8, torch.int16, torch.int64))
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in KINDS}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@runtime_checkable
class Sharding(Protocol):
    """A stage under which the optimizer steps on pieces of variables."""

    def pieces(self) -> Mapping[int, tuple[Tensor | None, int, int]]:
        """By id of a variable: this rank's piece, 1-D, or None, and which of the variable's elements that is, in memory order."""
        ...


class Piece(NamedTuple):
    """What an optimizer has slots for on this rank: a variable, a 1-D piece of one, or nothing."""

    tensor: Tensor | None
    start: int
    """First element in the variable's memory order, a multiple of ALIGNMENT."""
    end: int
    sharded: bool
    """Whether other ranks have the other elements; else they have the same ones."""


def pieces(optimizer: Optimizer, variables: Mapping[str, Tensor]) -> dict[str, Piece]:
    """By name what the optimizer steps on in the place of each variable."""
    shards: dict[int, tuple[Tensor | None, int, int]] = {}
    for stage in getattr(optimizer, "_stages", ()):
        shards |= stage.pieces() if isinstance(stage, Sharding) else {}
    whole = {name: Piece(variable, 0, variable.numel(), False) for name, variable in variables.items()}
    return {name: Piece(*shards[id(v)], True) if id(v) in shards else whole[name] for name, v in variables.items()}


def shares(sizes: Sequence[int], rank: int, ranks: int) -> list[tuple[int, int]]:
    """The ranges that a rank writes of variables that every rank has: an equal part of all elements, cut where groups end."""
    cuts = [-(-sum(sizes) // ranks) * number for number in (rank, rank + 1)]
    found, offset = [], 0
    for size in sizes:
        start, end = (min(max(-(-(cut - offset) // ALIGNMENT) * ALIGNMENT, 0), size) for cut in cuts)
        found.append((start, end))
        offset += size
    return found


class Part(NamedTuple):
    """How a slot, or a part of one, is stored."""

    dtype: str
    group: int
    """How many elements of the variable share a value."""
    shape: list[int] | None = None
    """Of a slot of a shape of its own, which has no `group`."""

    def range(self, start: int, end: int) -> tuple[int, int]:
        """Where its values for a range of the variable's elements lie in the global tensor; all of them for one of its own shape."""
        if self.shape is not None:
            return 0, torch.Size(self.shape).numel()
        return start // self.group, -(-end // self.group) if end > start else start // self.group


class Captured(NamedTuple):
    """A rank's share of a checkpoint."""

    common: dict[str, Any]
    """What is the same on all ranks, JSON-able."""
    own: dict[str, dict[str, Any]]
    """What other ranks may not know: `slots` of pieces, `overrides`, `extra`."""
    chunks: dict[str, Chunk]


def capture(optimizer: Optimizer, variables: Mapping[str, Tensor], group: Group, with_values: bool) -> Captured:
    """This rank's share, copied to the CPU. Raises TornStepError; ValueError where the optimizer has slots for a tensor without name."""
    scale, optimizer = scaling.live(optimizer), scaling.inner(optimizer)
    with optimizer._lock:
        snapshot.refuse_torn(optimizer)
        mine = pieces(optimizer, variables)
        names = {id(piece.tensor): name for name, piece in mine.items() if piece.tensor is not None}
        views = snapshot.slot_views(optimizer, names)
        parts = {name: {slot: _part(optimizer, mine[name], slot, view) for slot, view in found.items()} for name, found in views.items()}
        known = names | {id(variable): name for name, variable in variables.items()}
        common = {
            "class_name": type(optimizer).__name__,
            "config": {key: value for key, value in optimizer.get_config().items() if key != "name"},
            "iterations": optimizer._state.steps_taken(),
            "variables": {name: described(variable) for name, variable in variables.items()},
            "values": with_values,
            "slots": {name: found for name, found in parts.items() if not mine[name].sharded},
        }
        own: dict[str, dict[str, Any]] = {
            "slots": {name: found for name, found in parts.items() if mine[name].sharded},
            "overrides": {known[i]: {snapshot.MULTIPLIER: m} for i, (_, m) in optimizer._multipliers.items() if i in known},
            "extra": {name: (NAMES[v.dtype], v.item()) for name, v in (snapshot.extras(optimizer) | scale).items()},
        }
        chunks = {}
        for name, (start, end) in _written(mine, group).items():
            piece, elements = mine[name], variables[name].numel()
            for slot, part in parts.get(name, {}).items():
                ranges = [part.range(*ends) for ends in ((piece.start, piece.end), (start, end), (0, elements))]
                chunks[f"slot/{slot}/{name}"] = _copy(views[name][slot], *ranges)
            if with_values and piece.tensor is not None:
                chunks[f"variable/{name}"] = _copy(piece.tensor, (piece.start, piece.end), (start, end), (0, elements))
        return Captured(common, own, _some(chunks))


def described(variable: Tensor) -> list[Any]:
    """Shape, strides of the dimensions above 1, dtype: what elements in memory order mean."""
    strides = [step for size, step in zip(variable.shape, layout.dense_stride(variable), strict=True) if size > 1]
    return [list(variable.shape), strides, NAMES[variable.dtype]]


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
    """The state of all ranks, as JSON has it. Raises CheckpointError where two ranks say different things of one name."""
    found: dict[str, dict[str, Any]] = {"slots": dict(common["slots"]), "overrides": {}, "extra": {}}
    for rank, own in enumerate(owns):
        for kind, told in own.items():
            before = {name: str(found[kind][name]) for name in told if name in found[kind]}
            lines = tables.rows({name: str(told[name]) for name in before}, before)
            tables.refuse_unless(lines, f"Rank {rank} and those before it have different {kind}:")
            found[kind] |= told
    return common | found


class Blank(NamedTuple):
    """A saved state as this rank needs it: the chunks to read, and a checkpoint whose tensors they are."""

    chunks: dict[str, Chunk]
    checkpoint: Checkpoint
    known: dict[str, Tensor]
    """What the checkpoint's names are here: variables or pieces of them."""


def blank(state: dict[str, Any], optimizer: Optimizer, variables: Mapping[str, Tensor], device: str) -> Blank:
    """The slots that this rank reads, still without values. device: "meta" where they are not wanted."""
    mine = pieces(scaling.inner(optimizer), variables)
    known = {name: piece.tensor for name, piece in mine.items() if piece.tensor is not None}
    chunks: dict[str, Chunk] = {}
    slots: dict[str, dict[str, Tensor]] = {name: {} for name in state["slots"] if name in known}
    for name, found in slots.items():
        for slot, told in state["slots"][name].items():
            part, piece = Part(*told), mine[name]
            first, last = part.range(piece.start, piece.end)
            data = torch.empty(last - first, dtype=DTYPES[part.dtype], device=device)
            chunks[f"slot/{slot}/{name}"] = Chunk(first, part.range(0, variables[name].numel())[1], data)
            found[slot] = _laid(data, part, known[name])
    extra = {name: torch.tensor(value, dtype=DTYPES[dtype]) for name, (dtype, value) in state["extra"].items()}
    if not known:  # nothing to step on: what a step carries is not here
        extra = {name: value for name, value in extra.items() if name in scaling.NAMES}
    overrides = {name: told for name, told in state["overrides"].items() if name in known}
    checkpoint = Checkpoint(state["class_name"], state["config"], state["iterations"], slots, extra, overrides=overrides)
    return Blank(_some(chunks), checkpoint, known)


def _laid(data: Tensor, part: Part, variable: Tensor) -> Tensor:
    """A slot's elements in its shape."""
    if part.shape is not None:
        return data.view(part.shape)
    return layout.shaped(data, variable) if part.group == 1 else data


def blank_values(variables: Mapping[str, Tensor]) -> dict[str, Chunk]:
    """The chunks of all variables' values, which every rank reads."""
    found = {f"variable/{name}": Chunk(0, v.numel(), torch.empty(v.numel(), dtype=v.dtype, device="cpu")) for name, v in variables.items()}
    return _some(found)


@torch.no_grad()
def write_values(chunks: Mapping[str, Chunk], variables: Mapping[str, Tensor]) -> None:
    """Write what was read into the variables."""
    for name, variable in variables.items():
        if f"variable/{name}" in chunks:
            variable.copy_(layout.shaped(chunks[f"variable/{name}"].data, variable))


def _some(chunks: dict[str, Chunk]) -> dict[str, Chunk]:
    """Those that are not empty: DCP has none for them."""
    return {key: chunk for key, chunk in chunks.items() if chunk.data.numel()}


def check(state: dict[str, Any], optimizer: Optimizer, variables: Mapping[str, Tensor], settings: bool, with_values: bool) -> None:
    """Raises CheckpointError where a saved state does not fit the optimizer or the variables; nothing is read or written."""
    both = (state["variables"], {name: described(variable) for name, variable in variables.items()})
    found, expected = ({name: f"{dtype} {shape}, strides {strides}" for name, (shape, strides, dtype) in told.items()} for told in both)
    tables.refuse_unless(tables.rows(found, expected), "The checkpoint's variables are not those passed as `variables`:")
    if with_values and not state["values"]:
        raise CheckpointError("The checkpoint has no values of variables. Save with with_values=True, or load with with_values=False.")
    planned = blank(state, optimizer, variables, "meta")
    snapshot.check(planned.checkpoint, optimizer, planned.known, settings)
