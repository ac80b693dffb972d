"""From a checkpoint's description to the tensors of it that this rank reads, and from these into the optimizer."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kopt import layout
from fused_kopt.checkpoint import live, scaling, snapshot, tables
from fused_kopt.checkpoint.neutral import Checkpoint
from fused_kopt.distributed.elastic.pieces import DTYPES, Chunk, Part, described, pieces, some
from fused_kopt.errors import CheckpointError
from fused_kopt.optimizer import Optimizer


class Blank(NamedTuple):
    """A saved state as this rank needs it: the chunks to read, and a checkpoint whose tensors they are."""

    chunks: dict[str, Chunk]
    checkpoint: Checkpoint
    known: dict[str, Tensor]
    """What the checkpoint's names are here: variables or pieces of them."""


def blank(state: dict[str, Any], optimizer: Optimizer, variables: Mapping[str, Tensor], device: str = "cpu") -> Blank:
    """The slots that this rank reads, not read yet. device: "meta" if they never will be."""
    inner = scaling.inner(optimizer)
    mine = pieces(inner, variables)
    known = {name: piece.tensor for name, piece in mine.items() if piece.tensor is not None}
    chunks: dict[str, Chunk] = {}
    slots: dict[str, dict[str, Tensor]] = {name: {} for name in [*state["slots"], *known] if name in known}
    for name, found in slots.items():
        for slot, told in state["slots"].get(name, {}).items():
            part, piece = Part(*told), mine[name]
            first, last = part.range(piece.start, piece.end)
            data = torch.empty(last - first, dtype=DTYPES[part.dtype], device=device)
            chunks[f"slot/{slot}/{name}"] = Chunk(first, part.range(0, variables[name].numel())[1], data)
            found[slot] = _laid(data, part, known[name])
    extra = {name: torch.tensor(value, dtype=DTYPES[dtype]) for name, (dtype, value) in state["extra"].items()}
    if not any(slots.values()):  # see `capture`: what steps carry here has no dtype that matters
        carried = live.extras(inner)
        extra = {
            name: value.to(carried[name].dtype) if name in carried else value
            for name, value in extra.items()
            if name in (*carried, *scaling.NAMES)
        }
    strides = {name: live.order(variable) for name, variable in known.items()}  # `check` compares those of whole variables
    return Blank(some(chunks), Checkpoint(state["class_name"], state["config"], state["iterations"], slots, extra, strides=strides), known)


def _laid(data: Tensor, part: Part, variable: Tensor) -> Tensor:
    """A slot's elements in its shape."""
    if part.shape is not None:
        return data.view(part.shape)
    return layout.shaped(data, variable) if part.group == 1 else data


def values(variables: Mapping[str, Tensor]) -> dict[str, Chunk]:
    """The chunks of all variables' values, which every rank reads."""
    found = {f"variable/{name}": Chunk(0, v.numel(), torch.empty(v.numel(), dtype=v.dtype, device="cpu")) for name, v in variables.items()}
    return some(found)


def check(state: dict[str, Any], optimizer: Optimizer, variables: Mapping[str, Tensor], settings: bool, with_values: bool) -> None:
    """Raises CheckpointError where a saved state does not fit the optimizer or the variables; nothing is read or written."""
    both = (state["variables"], {name: described(variable) for name, variable in variables.items()})
    found, expected = ({name: f"{dtype} {shape}, strides {strides}" for name, (shape, strides, dtype) in told.items()} for told in both)
    tables.refuse_unless(tables.rows(found, expected), "The checkpoint's variables are not those passed as `variables`:")
    if with_values and not state["values"]:
        raise CheckpointError("The checkpoint has no values of variables. Save with with_values=True, or load with with_values=False.")
    planned = blank(state, optimizer, variables, "meta")
    snapshot.check(planned.checkpoint, optimizer, planned.known, settings)


def build(state: dict[str, Any], optimizer: Optimizer, variables: Mapping[str, Tensor]) -> None:
    """Create the slots that are about to be read, in the order in which they were created once. Ranks of a sharded optimizer meet here."""
    started = [variables[name] for name, found in state["slots"].items() if found]
    if started:
        snapshot.begin(scaling.inner(optimizer), started)


@torch.no_grad()
def write(state: dict[str, Any], read: Blank, optimizer: Optimizer, variables: Mapping[str, Tensor], settings: bool) -> None:
    """Write what was read into the optimizer, and into the variables where `values` are among the chunks."""
    snapshot.fill(read.checkpoint, optimizer, read.known, settings)
    for name, multiplier in state["multipliers"].items() if settings else ():
        optimizer.scale_learning_rate([variables[name]], multiplier)
    for name, variable in variables.items():
        if f"variable/{name}" in read.chunks:
            variable.copy_(layout.shaped(read.chunks[f"variable/{name}"].data, variable))
