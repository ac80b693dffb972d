"""A folder of checkpoints: version after version, each complete or none, and a pointer to the newest, which is replaced as one."""

import os
import re
import shutil
from pathlib import Path

from fused_kopt.checkpoint import storage
from fused_kopt.distributed.elastic import schema
from fused_kopt.distributed.elastic.schema import SCHEMA, Schema
from fused_kopt.errors import CheckpointError

LATEST = "latest"
NAME = re.compile(r"version-(\d{8})")
KEPT = 2  # complete versions: someone may still be reading the older one


def versions(folder: Path) -> list[Path]:
    """All versions, complete or not, oldest first."""
    return sorted(entry for entry in folder.iterdir() if NAME.fullmatch(entry.name))


def begun(folder: Path) -> Path:
    """A new version, empty. What killed processes have left is deleted."""
    folder.mkdir(parents=True, exist_ok=True)
    prune(folder)
    last = [int(version.name[-8:]) for version in versions(folder)[-1:]]
    version = folder / f"version-{max(last, default=0) + 1:08d}"
    version.mkdir()
    return version


def publish(version: Path) -> None:
    """Let the pointer name a complete version, and delete those that are too old."""
    storage.sync(version.parent, os.O_RDONLY)  # the version must not get lost where the pointer does not
    with storage.replacing(version.parent / LATEST) as temporary:
        temporary.write_text(version.name)
    prune(version.parent)


def prune(folder: Path) -> None:
    """Delete versions that are not complete, all complete ones but the newest, and pointers that were never put in place."""
    complete = [version for version in versions(folder) if (version / SCHEMA).is_file()]
    kept = {version.name for version in complete[-KEPT:]} | {named(folder)}
    for version in versions(folder):
        if version.name not in kept:
            (version / SCHEMA).unlink(missing_ok=True)  # first, so that half of it is never taken for all
            shutil.rmtree(version, ignore_errors=True)
    for temporary in folder.glob(f".{LATEST}.*.tmp"):
        temporary.unlink(missing_ok=True)


def named(folder: Path) -> str | None:
    """What the pointer says; None where there is none."""
    try:
        return (folder / LATEST).read_text(errors="replace").strip()
    except FileNotFoundError:
        return None


def newest(folder: Path) -> tuple[Path, Schema]:
    """The version that the pointer names, or the folder itself if it is a version. Raises CheckpointError where there is none; OSError."""
    if (folder / SCHEMA).is_file():
        return folder, schema.read(folder)
    name = named(folder)
    if name is None:
        raise CheckpointError(f"{folder} has no checkpoint: no file {LATEST!r}, no {SCHEMA}.")
    if not NAME.fullmatch(name) or not (folder / name).is_dir():
        there = [version.name for version in versions(folder)]
        raise CheckpointError(f"{folder / LATEST} names {name!r}, which is not there. There are {there}: pass the path of one of them.")
    return folder / name, schema.read(folder / name)
