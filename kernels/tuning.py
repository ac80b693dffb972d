"""Tuned launch configurations: a plain JSON file in the user's cache directory, which can choose numbers and execute nothing.

An element's result depends on no other element, so that no configuration changes a bit.
"""

import contextlib
import functools
import hashlib
import json
import os
import stat
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

BLOCKS, WARPS = (512, 1024, 2048, 4096), (1, 2, 4, 8, 16)
"""What a configuration may hold; anything else makes a cache file invalid."""
FORMAT = 1
MAX_BYTES = 1 << 20  # about 4,000 entries; a larger file is not ours
DTYPES = ("float32", "float64", "float16", "bfloat16")
_WORDS, _NUMBERS = ("device", "triton", "kernel", "variable", "gradient"), ("block", "warps")

Key = tuple[str, ...]  # device, Triton's version, kernel hash, dtype of the variable, dtype of the gradient


class Config(NamedTuple):
    """How a compiled kernel is launched: elements per program, and warps (wavefronts on AMD) that share them."""

    block: int
    warps: int


def path() -> Path:
    """The cache file. Raises RuntimeError where there is no home directory."""
    return Path.home() / ".cache" / "fused_kopt" / "tuning.json"


def kernel_hash(*functions: Any) -> str:
    """One hash of the texts of `triton.jit` functions and of all that they call: the kernel and its rule."""
    return hashlib.sha256("".join(function.cache_key for function in functions).encode()).hexdigest()


def lookup(kernel: str, device: str, dtypes: tuple[torch.dtype, torch.dtype]) -> Config | None:
    """The stored configuration, or None. The file is read once per process.

    kernel: `kernel_hash` of the kernel and its rule. device: its name. dtypes: of the variable and of the gradient.
    """
    return _stored().get(_key(kernel, device, dtypes))


def store(kernel: str, device: str, dtypes: tuple[torch.dtype, torch.dtype], config: Config) -> Path:
    """Keep a configuration for later processes; returns the file. Raises OSError where it cannot be written.

    Of two processes that store at once, the later one's file stays whole, and the other's entry may be lost.
    """
    file = path()
    entries = _read(file) | {_key(kernel, device, dtypes): config}
    rows = [dict(zip(_WORDS, key, strict=True)) | value._asdict() for key, value in entries.items()]
    text = json.dumps({"format": FORMAT, "entries": rows}, indent=1)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as written:
            written.write(text)
        os.replace(name, file)  # atomic: a reader sees the old file or the new one
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    _stored.cache_clear()
    return file


def _key(kernel: str, device: str, dtypes: tuple[torch.dtype, torch.dtype]) -> Key:
    return (device, triton.__version__, kernel, *(str(dtype).removeprefix("torch.") for dtype in dtypes))


@functools.cache
def _stored() -> dict[Key, Config]:
    try:
        return _read(path())
    except RuntimeError:  # no home directory, hence nothing stored
        return {}


def _read(file: Path) -> dict[Key, Config]:
    """The entries of a valid file, or none: with a warning unless there is no file."""
    try:
        return _parsed(_text(file))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"fused_kopt ignores the tuning cache {file} ({reason}). Delete it, or run fused-kopt tune.", RuntimeWarning, stacklevel=2
    )
    return {}


def _text(file: Path) -> str:
    # a pipe in its place must not block, nor a device be read
    handle = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(handle, "rb") as opened:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("not a regular file")
        data = opened.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES} bytes")
    return data.decode("utf-8")


def _parsed(text: str) -> dict[Key, Config]:
    """Entries by key. Raises ValueError on anything that `store` does not write."""
    content = json.loads(text)
    if not isinstance(content, dict) or content.keys() != {"format", "entries"} or content["format"] != FORMAT:
        raise ValueError(f"must be an object with format {FORMAT} and entries")
    if not isinstance(content["entries"], list):
        raise ValueError("entries must be a list")
    return dict(map(_entry, content["entries"]))


def _entry(row: Any) -> tuple[Key, Config]:
    if not isinstance(row, dict) or row.keys() != {*_WORDS, *_NUMBERS}:
        raise ValueError(f"an entry must have the fields {', '.join((*_WORDS, *_NUMBERS))}. Received: {row!r:.200}")
    words, (block, warps) = tuple(row[name] for name in _WORDS), (row[name] for name in _NUMBERS)
    # type(), not isinstance(): True is an int
    if not all(type(word) is str for word in words) or not set(words[3:]) <= set(DTYPES):
        raise ValueError(f"a name must be text, a dtype one of {', '.join(DTYPES)}. Received: {words!r:.200}")
    if type(block) is not int or type(warps) is not int or block not in BLOCKS or warps not in WARPS:
        raise ValueError(f"block must be one of {BLOCKS}, warps one of {WARPS}. Received: block={block!r:.50}, warps={warps!r:.50}")
    return words, Config(block, warps)
