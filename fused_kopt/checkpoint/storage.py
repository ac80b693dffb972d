"""Files of one's own: safetensors with a schema in the metadata, written whole or not at all."""

import contextlib
import importlib.util
import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from fused_kopt.checkpoint import tables
from fused_kopt.checkpoint.neutral import SOURCES, Checkpoint
from fused_kopt.errors import CheckpointError

FORMAT, VERSION = "fused_kopt.checkpoint", 1
FilePath = str | os.PathLike[str]


@contextlib.contextmanager
def replacing(path: FilePath) -> Iterator[Path]:
    """A new file beside `path` that takes its place at the end of the block; on any error it is deleted and `path` stays as it was."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    temporary.touch(exist_ok=False)  # an OSError of ours where nothing can be written
    try:
        yield temporary
        sync(temporary, os.O_RDWR)
        os.replace(temporary, target)
        sync(target.parent, os.O_RDONLY)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path, flags: int) -> None:
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _require() -> None:
    if importlib.util.find_spec("safetensors") is None:
        raise CheckpointError("Checkpoints are safetensors files: pip install 'fused-kopt[checkpoint]'")


def write(path: FilePath, checkpoint: Checkpoint) -> None:
    """Write a checkpoint as safetensors. Raises CheckpointError for what the format cannot hold, OSError; `path` stays as it was then."""
    _require()
    from safetensors.torch import save_file

    schema = {
        "class_name": checkpoint.class_name,
        "config": checkpoint.config,
        "iterations": checkpoint.iterations,
        "slots": {name: list(values) for name, values in checkpoint.slots.items()},
        "extra": list(checkpoint.extra),
        "variables": list(checkpoint.variables),
        "overrides": checkpoint.overrides,
        "source": checkpoint.source,
        **({"strides": checkpoint.strides} if checkpoint.strides else {}),  # readers that do not know them must not read the rest
    }
    try:
        text = json.dumps(schema)
        text.encode()
        names = list(_keys(schema))
        b"".join(name.encode() for name in names)
    except (TypeError, ValueError) as error:  # UnicodeEncodeError is a ValueError
        raise CheckpointError(f"The configuration or a name of this {checkpoint.class_name} cannot be written as JSON: {error}") from error
    own = [value for values in checkpoint.slots.values() for value in values.values()]
    tensors = [*own, *checkpoint.extra.values(), *checkpoint.variables.values()]
    # clones: safetensors refuses tensors that share memory
    content = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in zip(names, tensors, strict=True)}
    with replacing(path) as temporary:
        save_file(content, temporary, {"format": FORMAT, "version": str(VERSION), "checkpoint": text})


def _keys(schema: dict[str, Any]) -> Iterator[str]:
    """The tensors' names in the file, in the order of the schema."""
    for name, slots in schema["slots"].items():
        for slot in slots:
            if "/" in slot:
                raise ValueError(f"a slot's name must not contain '/'. Received: {slot!r}.")
            yield f"slot/{slot}/{name}"
    yield from (f"extra/{name}" for name in schema["extra"])
    yield from (f"variable/{name}" for name in schema["variables"])


def read(path: FilePath) -> Checkpoint:
    """A checkpoint from a file of `write`. Raises CheckpointError for any other file, or a damaged one; OSError. Nothing is unpickled."""
    _require()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata, found = file.metadata() or {}, list(file.keys())
            schema = _schema(path, metadata)
            expected = list(_keys(schema))
            if len(set(expected)) < len(expected):
                raise CheckpointError(f"{path}: the file's schema names a tensor twice.")
            there = [dict.fromkeys(names, "a tensor") for names in (found, expected)]
            tables.refuse_unless(tables.rows(*there), f"{path}: the tensors are not those of the file's own schema:")
            tensors = {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, RecursionError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    return _assembled(schema, tensors)


def _assembled(schema: dict[str, Any], tensors: dict[str, Tensor]) -> Checkpoint:
    return Checkpoint(
        schema["class_name"],
        schema["config"],
        schema["iterations"],
        {name: {slot: tensors[f"slot/{slot}/{name}"] for slot in slots} for name, slots in schema["slots"].items()},
        {name: tensors[f"extra/{name}"] for name in schema["extra"]},
        {name: tensors[f"variable/{name}"] for name in schema["variables"]},
        schema["overrides"],
        schema["source"],
        schema["strides"],
    )


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "class_name": lambda value: isinstance(value, str),
    "config": lambda value: isinstance(value, dict),
    "iterations": lambda value: type(value) is int and 0 <= value < 2**63,
    "slots": lambda value: isinstance(value, dict) and all(map(_strings, value.values())),
    "extra": _strings,
    "variables": _strings,
    "overrides": lambda value: isinstance(value, dict) and all(isinstance(keys, dict) for keys in value.values()),
    "source": lambda value: value in SOURCES,
    "strides": lambda value: isinstance(value, dict) and all(isinstance(order, list) for order in value.values()),
}


def _schema(path: FilePath, metadata: dict[str, str]) -> dict[str, Any]:
    """The metadata's schema, checked."""
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by fused_kopt: its metadata has format={metadata.get('format')!r}, not {FORMAT!r}.")
    if metadata.get("version") != str(VERSION):
        raise CheckpointError(f"{path} has format version {metadata.get('version')!r}; this fused_kopt reads version {VERSION}. Update it.")
    schema = json.loads(metadata.get("checkpoint", "null"))
    if not isinstance(schema, dict):
        raise CheckpointError(f"{path}: the metadata's `checkpoint` is not a JSON object.")
    schema.setdefault("strides", {})
    wrong = [key for key, fits in _CHECKS.items() if not fits(schema.get(key))]
    if wrong or set(schema) != set(_CHECKS):
        unknown = sorted(set(schema) - set(_CHECKS))
        raise CheckpointError(f"{path}: the file's schema is damaged. Missing or of the wrong type: {wrong}; unknown: {unknown}.")
    return schema
