"""From a checkpoint's description to the tensors of it that this rank reads, and from these into the optimizer."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kopt import layout
from fused_kopt.checkpoint import scaling, snapshot, tables
from fused_kopt.checkpoint.neutral import Checkpoint
from fused_kopt.distributed.elastic_files import Chunk
from fused_kopt.distributed.elastic_pieces import DTYPES, Part, described, pieces, some
from fused_kopt.errors import CheckpointError
from fused_kopt.optimizer import Optimizer


class Blank(NamedTuple):
    """A saved state as this rank needs it: the chunks to read, and a checkpoint whose tensors they are."""

    chunks: dict[str, Chunk]
    checkpoint: Checkpoint
    known: dict[str, Tensor]
    """What the checkpoint's names are here: variables or pieces of them."""


def blank(state: dict[str, Any], optimizer: Optimizer, variables: Mapping[str, Tensor], device: str) -> Blank:
    """The slots that this rank reads, still without values. device: "meta" where they are not wanted."""
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
        live = snapshot.extras(inner)
        extra = {
            name: value.to(live[name].dtype) if name in live else value for name, value in extra.items() if name in (*live, *scaling.NAMES)
        }
    strides = {name: snapshot.order(variable) for name, variable in known.items()}  # `check` compares those of whole variables
    return Blank(some(chunks), Checkpoint(state["class_name"], state["config"], state["iterations"], slots, extra, strides=strides), known)


def _laid(data: Tensor, part: Part, variable: Tensor) -> Tensor:
    """A slot's elements in its shape."""
    if part.shape is not None:
        return data.view(part.shape)
    return layout.shaped(data, variable) if part.group == 1 else data


def blank_values(variables: Mapping[str, Tensor]) -> dict[str, Chunk]:
    """The chunks of all variables' values, which every rank reads."""
    found = {f"variable/{name}": Chunk(0, v.numel(), torch.empty(v.numel(), dtype=v.dtype, device="cpu")) for name, v in variables.items()}
    return some(found)


@torch.no_grad()
def write_values(chunks: Mapping[str, Chunk], variables: Mapping[str, Tensor]) -> None:
    """Write what was read into the variables."""
    for name, variable in variables.items():
        if f"variable/{name}" in chunks:
            variable.copy_(layout.shaped(chunks[f"variable/{name}"].data, variable))


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
