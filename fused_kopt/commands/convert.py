"""`fused-kopt convert`: an optimizer's state from one framework's file to another's."""

import importlib.util
import pkgutil
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from fused_kopt.checkpoint import formats, tables
from fused_kopt.checkpoint.formats import POSITIONAL, Format, Hints
from fused_kopt.checkpoint.neutral import Checkpoint, named, renamed
from fused_kopt.commands.common import RefusedError
from fused_kopt.errors import CheckpointError

ABOUT = """Convert an optimizer's state between files: .safetensors (fused_kopt's), .h5, .weights.h5, .keras (Keras's), .pt (state_dicts
of torch.optim) and .npz (np.savez of get_weights()). Prints which weight became which; --dry-run stops there.

Weights are matched by name. .weights.h5, .keras, .npz and many .pt have positions only: give names in their order, --names a,b,c, or a
model, --model mypackage.module:build, whose build() returns a Keras model, a torch module or a list of (name, tensor). With old=new,
--names renames. A Keras TARGET must exist, with a model in it: only its optimizer's state is replaced."""


class Settings(NamedTuple):
    """What to convert, and what the files do not say."""

    source: Path
    target: Path
    to: Format | None = None
    names: tuple[str, ...] = ()
    model: str | None = None
    optimizer: str | None = None
    dry_run: bool = False


def convert(settings: Settings, console: Console) -> int:
    """Convert a file and print a table of its weights. Returns the exit code, 0; raises RefusedError where it cannot be done."""
    try:
        return _convert(settings, console)
    except (CheckpointError, OSError, ValueError, TypeError) as error:
        raise RefusedError(str(error)) from error


def _convert(settings: Settings, console: Console) -> int:
    source, target = formats.format_of(settings.source), formats.format_of(settings.target, settings.to)
    order, renames = _names(settings.names)
    model = None if settings.model is None else _variables(settings.model, source)
    given = order or model
    checkpoint = formats.read(settings.source, Hints(given, settings.optimizer, source))
    if renames:
        checkpoint = renamed(checkpoint, renames)
    rows = _rows(checkpoint, model)
    console.print(tables.table(rows))
    tables.refuse_unless(rows, f"{settings.source} does not fit {settings.model}:")
    summary = f"{checkpoint.class_name} of {checkpoint.source} after {checkpoint.iterations} steps, {len(checkpoint.slots)} variables"
    if settings.dry_run:
        console.print(f"{summary}: {settings.target} would be written as {target}.", markup=False)
        return 0
    by_order = [*checkpoint.slots] if source in POSITIONAL or renames else None
    formats.write(settings.target, checkpoint, Hints(given or by_order, settings.optimizer, target))
    console.print(f"{summary}: written to {settings.target} as {target}.", markup=False)
    return 0


def _names(names: Iterable[str]) -> tuple[list[str] | None, dict[str, str]]:
    """--names as an order, or as renames."""
    parts = [name.partition("=") for name in names]
    if any(separator for _, separator, _ in parts):
        if not all(separator for _, separator, _ in parts):
            raise RefusedError("--names: either names in order (a,b,c) or renames (old=new,...), not both.")
        return None, {old: new for old, _, new in parts}
    return [name for name, _, _ in parts] or None, {}


def _variables(model: str, source: Format) -> list[tuple[str, Tensor]]:
    """The named variables of what `package.module:build` returns."""
    sys.path.insert(0, str(Path.cwd()))  # a console script's own folder is there instead
    package = re.match(r"(\w+)[\w.]*:\w", model)
    if package is None or importlib.util.find_spec(package[1]) is None:
        raise RefusedError(f"--model: name a function as package.module:function, importable from here. Received: {model}.")
    try:
        build = pkgutil.resolve_name(model)
    except AttributeError as error:
        raise RefusedError(f"--model: {error}.") from error
    built: Any = build()
    if hasattr(built, "trainable_variables"):
        return [(variable.path, variable.value) for variable in built.trainable_variables]
    if isinstance(built, torch.nn.Module):
        if source in POSITIONAL:
            raise RefusedError(
                f"--model: the positions of {source} are those of Keras's trainable_variables, and a torch module orders its own "
                "otherwise. Let the function return the Keras model, or (name, tensor) pairs in Keras's order; or use --names."
            )
        return list(built.named_parameters())
    return list(named(built, "--model").items())


def _rows(checkpoint: Checkpoint, model: list[tuple[str, Tensor]] | None) -> list[tables.Row]:
    """One row per weight: what the file has, and what the model's variables expect."""
    shapes = None if model is None else {name: tuple(tensor.shape) for name, tensor in model}
    rows = []
    for name in dict.fromkeys([*checkpoint.slots, *(shapes or {})]):
        slots = checkpoint.slots.get(name)
        if slots is None or (shapes is not None and name not in shapes):
            rows.append(tables.Row(name, *(("-", "a variable") if slots is None else ("a variable", "-"))))
            continue
        for slot, value in slots.items():
            shape = tuple(value.shape)
            rows.append(tables.Row(f"{slot} of {name}", str(shape), str(shape if shapes is None else shapes[name])))
    return rows + [tables.Row(name, str(tuple(value.shape)), str(tuple(value.shape))) for name, value in checkpoint.extra.items()]
