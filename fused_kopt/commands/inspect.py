"""`fused-kopt inspect`: what is in a checkpoint."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fused_kopt.checkpoint import formats, tables
from fused_kopt.checkpoint.formats import Hints
from fused_kopt.checkpoint.neutral import Checkpoint
from fused_kopt.commands.common import RefusedError
from fused_kopt.errors import CheckpointError

ABOUT = """Print what a checkpoint contains: class, settings, steps, and every weight with its dtype, shape and root mean square.

Reads .safetensors (fused_kopt's), .h5, .weights.h5, .keras (Keras's), .pt (state_dicts of torch.optim) and .npz (get_weights()).
Files without names show their variables as #0, #1... Nothing in a file is executed."""


def inspect(path: Path, hints: Hints, console: Console) -> int:
    """Print a checkpoint. Returns the exit code, 0; raises RefusedError for a file that cannot be read."""
    try:
        checkpoint = _read(path, hints)
    except (CheckpointError, OSError, ValueError) as error:
        raise RefusedError(str(error)) from error
    summary = Table(show_header=False)
    rows: dict[str, Any] = {"optimizer": checkpoint.class_name, "update rule of": checkpoint.source, "iterations": checkpoint.iterations}
    rows |= {f"{key}": value for key, value in checkpoint.config.items()}
    rows |= {f"of {name}": own for name, own in checkpoint.overrides.items()}
    for key, value in rows.items():
        summary.add_row(escape(key), escape(str(value)))
    console.print(summary)
    console.print(weights(checkpoint))
    return 0


def _read(path: Path, hints: Hints) -> Checkpoint:
    """The checkpoint, with made-up names where the file needs some."""
    if hints.variables is not None:
        return formats.read(path, hints)
    try:
        return formats.read(path, hints)
    except CheckpointError as refusal:
        for count in range(1, formats.most_variables(path, hints.format) + 1):
            names = [f"#{index}" for index in range(count)]
            try:
                return formats.read(path, hints._replace(variables=names))
            except CheckpointError:
                continue
        raise refusal


def weights(checkpoint: Checkpoint) -> Table:
    """A table of every tensor in a checkpoint."""
    table = Table("variable", "weight", "dtype and shape", "root mean square")
    found = [(name, slot, value) for name, values in checkpoint.slots.items() for slot, value in values.items()]
    found += [("", name, value) for name, value in checkpoint.extra.items()]
    found += [(name, "(its value)", value) for name, value in checkpoint.variables.items()]
    for name, slot, value in found:
        size = value.double().square().mean().sqrt().item() if value.numel() else 0.0
        table.add_row(escape(name), escape(slot), tables.shown(value), f"{size:.6g}")
    for name in (name for name, values in checkpoint.slots.items() if not values):
        table.add_row(escape(name), "(no slots)", "", "")
    return table
