"""What a checkpoint's tensors mean, and its files' sums: JSON, whose presence says that all else is there."""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fused_kopt.checkpoint import storage
from fused_kopt.errors import CheckpointError

FORMAT, VERSION = "fused_kopt.distributed", 1
SCHEMA = "checkpoint.json"
BLOCK = 1 << 20  # bytes of a file that are summed at a time
OLDER = "Load an older checkpoint: pass the path of another version-... folder beside it."


class Schema(NamedTuple):
    """A checkpoint's JSON."""

    state: dict[str, Any]
    files: dict[str, tuple[int, int]]


def write(folder: Path, content: Schema) -> None:
    """Write it; then the checkpoint is complete."""
    told = content._asdict()
    text = json.dumps({"format": FORMAT, "version": VERSION, "crc32": _crc(told), **told})
    with storage.replacing(folder / SCHEMA) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read(folder: Path) -> Schema:
    """What a checkpoint contains. Raises CheckpointError for a folder that is none, or a damaged one; OSError."""
    path = folder / SCHEMA
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT or found["version"] != VERSION:
            raise CheckpointError(f"{path} is {found['format']!r} {found['version']!r}; this fused_kopt reads {FORMAT!r} {VERSION}.")
        if found["crc32"] != _crc({key: found[key] for key in Schema._fields}):
            raise CheckpointError(f"{path} is damaged: its checksum is another.")
        return Schema(found["state"], found["files"])
    except (KeyError, TypeError, RecursionError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not the description of a checkpoint: {error}") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {SCHEMA}.") from error


def verify(folder: Path, files: Mapping[str, Sequence[int]]) -> None:
    """Raises CheckpointError for a file that is not as it was written. files: name -> bytes and CRC-32."""
    for name, (size, crc) in files.items():
        found = summed(folder / name) if (folder / name).is_file() else None
        if found != (size, crc):
            raise CheckpointError(f"{folder / name} is damaged: bytes and CRC-32 are {found}, were {(size, crc)}. {OLDER}")


def summed(file: Path) -> tuple[int, int]:
    """A file's bytes and CRC-32."""
    size = crc = 0
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def _crc(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content).encode())
