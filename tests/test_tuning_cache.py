"""The tuning cache: round trips, and files that were damaged, forged or contested."""

import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from fused_kopt.commands import variants
from fused_kopt.kernels import offline, tuning
from fused_kopt.kernels.tuning import Config

pytestmark = pytest.mark.usefixtures("cache")

F32, BF16 = torch.float32, torch.bfloat16
PAIR = (F32, F32)
DEFAULT = Config(1024, 8)
ENTRY = {"device": "H100", "triton": "3.9.0", "kernel": "k", "variable": "float32", "gradient": "float32", "block": 2048, "warps": 8}


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def test_what_is_stored_is_found(cache: Path) -> None:
    assert tuning.lookup("k", "H100", PAIR) is None
    assert tuning.store("k", "H100", PAIR, Config(2048, 8)) == cache
    tuning.store("k", "H100", (BF16, F32), Config(512, 4))
    tuning.store("k", "H100", PAIR, Config(2048, 16))
    tuning._stored.cache_clear()  # as another process
    assert tuning.lookup("k", "H100", PAIR) == (2048, 16)
    assert tuning.lookup("k", "H100", (BF16, F32)) == (512, 4)
    for other in (("other", "H100", PAIR), ("k", "H200", PAIR), ("k", "H100", (F32, BF16))):
        assert tuning.lookup(*other) is None
    assert os.listdir(cache.parent) == [cache.name]


def test_another_version_of_triton_finds_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.store("k", "H100", PAIR, Config(2048, 8))
    monkeypatch.setattr(tuning.triton, "__version__", "9.9.9")
    assert tuning.lookup("k", "H100", PAIR) is None


def test_the_file_is_read_once(cache: Path) -> None:
    tuning.store("k", "H100", PAIR, DEFAULT)
    assert tuning.lookup("k", "H100", PAIR) == DEFAULT
    cache.unlink()
    assert tuning.lookup("k", "H100", PAIR) == DEFAULT


def test_without_a_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("no home")))
    assert tuning.lookup("k", "H100", PAIR) is None


class Trap:
    """Unpickling it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path.home() / "executed",)


def file_of(**changes: Any) -> dict[str, Any]:
    return {"format": 1, "entries": [{**ENTRY, "triton": tuning.triton.__version__}, {**ENTRY, **changes}]}


HOSTILE: dict[str, Callable[[], Any]] = {
    "empty": lambda: b"",
    "not JSON": lambda: b"import os; os.abort()",
    "cut off": lambda: json.dumps(file_of()).encode()[:-9],
    "not text": lambda: b"\xff\xfe\x00",
    "pickled": lambda: pickle.dumps(Trap()),
    "deep": lambda: b"[" * 200_000,
    "long number": lambda: b'{"format": 1, "entries": ' + b"9" * 10_000 + b"}",
    "large": lambda: json.dumps(file_of()).encode() + b" " * tuning.MAX_BYTES,
    "a list": lambda: [],
    "foreign": lambda: {"version": 2, "configs": []},
    "later format": lambda: {"format": 2, "entries": []},
    "an extra field": lambda: {"format": 1, "entries": [], "run": "rm"},
    "entries of text": lambda: {"format": 1, "entries": "k"},
    "an entry of text": lambda: {"format": 1, "entries": ["k"]},
    "an entry with more": lambda: file_of(command="ls"),
    "a missing field": lambda: {"format": 1, "entries": [{"block": 512, "warps": 4}]},
    "a huge block": lambda: file_of(block=1 << 40),
    "block 1000": lambda: file_of(block=1000),
    "a negative block": lambda: file_of(block=-512),
    "a block of text": lambda: file_of(block="512"),
    "a fractional block": lambda: file_of(block=512.0),
    "a block in a list": lambda: file_of(block=[512]),
    "warps true": lambda: file_of(warps=True),
    "warps 64": lambda: file_of(warps=64),
    "no warps": lambda: file_of(warps=None),
    "NaN warps": lambda: file_of(warps=float("nan")),
    "a device of numbers": lambda: file_of(device=1),
    "a kernel in a list": lambda: file_of(kernel=["k"]),
    "another dtype": lambda: file_of(gradient="int8"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_or_forged_file_is_ignored_with_one_warning(name: str, cache: Path) -> None:
    content = HOSTILE[name]()
    write(cache, content)
    before = cache.read_bytes()
    with pytest.warns(RuntimeWarning, match="ignores the tuning cache .*Delete it") as caught:
        assert [tuning.lookup("k", "H100", PAIR) for _ in range(3)] == [None] * 3
    assert len(caught) == 1
    assert len(str(caught[0].message)) < 700
    assert cache.read_bytes() == before
    assert not (Path.home() / "executed").exists()
    with pytest.warns(RuntimeWarning, match="ignores"):
        tuning.store("k", "H100", PAIR, DEFAULT)  # replaces it
    assert tuning.lookup("k", "H100", PAIR) == DEFAULT


@pytest.mark.parametrize("kind", ["directory", "pipe", "link to a directory", "link to a device"])
def test_what_is_no_file_is_ignored(kind: str, cache: Path, tmp_path: Path) -> None:
    cache.parent.mkdir(parents=True)
    if kind == "directory":
        cache.mkdir()
    elif kind == "pipe":
        os.mkfifo(cache)  # opening one that nobody writes to would wait for ever
    else:
        cache.symlink_to("/dev/zero" if kind == "link to a device" else tmp_path)
    with pytest.warns(RuntimeWarning, match="ignores the tuning cache"):
        assert tuning.lookup("k", "H100", PAIR) is None


def test_a_link_is_replaced_and_its_target_kept(cache: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.json"
    write(target, file_of())
    cache.parent.mkdir(parents=True)
    cache.symlink_to(target)
    before = target.read_bytes()
    assert tuning.lookup("k", "H100", PAIR) == (2048, 8)
    tuning.store("k", "H100", PAIR, DEFAULT)
    assert target.read_bytes() == before
    assert not cache.is_symlink()
    cache.unlink()
    cache.symlink_to(tmp_path / "nowhere")
    tuning._stored.cache_clear()
    assert tuning.lookup("k", "H100", PAIR) is None


def test_concurrent_writers_leave_a_whole_file(cache: Path) -> None:
    with warnings.catch_warnings(), ThreadPoolExecutor(8) as pool:
        warnings.simplefilter("error")  # no reader ever sees half a file
        for _ in pool.map(lambda i: (tuning.store(f"k{i % 9}", "H100", PAIR, DEFAULT), tuning.lookup("k0", "H100", PAIR)), range(200)):
            pass
    tuning.store("last", "H100", PAIR, Config(512, 4))
    assert tuning.lookup("last", "H100", PAIR) == (512, 4)
    assert os.listdir(cache.parent) == [cache.name]


def test_a_failed_write_leaves_no_trace(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.store("k", "H100", PAIR, DEFAULT)
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tuning.store("k", "H100", PAIR, Config(512, 4))
    assert os.listdir(cache.parent) == [cache.name]
    assert tuning.lookup("k", "H100", PAIR) == DEFAULT


def test_the_hash_is_the_text_of_kernel_and_rule() -> None:
    adam, sgd = (variants.kernels(name)[0].rule for name in ("adam", "sgd"))
    code = "from fused_kopt.kernels import offline; from fused_kopt.optimizers import adam; print(offline.hash_of(adam.adam))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert offline.hash_of(adam) == other  # in another process
    assert offline.hash_of(adam) != offline.hash_of(sgd)
    assert len(other) == 64
