"""Options and markers: `--slow`, `gpu`, `slow`; the command line, the tuning cache."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from terminal import Result, Run

os.environ["KERAS_BACKEND"] = "torch"  # Keras reads it when it is imported


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run all of what is sampled by default (minutes instead of seconds)")


@pytest.fixture
def slow(request: pytest.FixtureRequest) -> bool:
    """Whether `--slow` was given."""
    return bool(request.config.getoption("--slow"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in a terminal in which no line wraps."""
    from fused_kopt import cli

    monkeypatch.setenv("COLUMNS", "250")

    def call(*arguments: object) -> Result:
        try:
            code: Any = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty home directory; yields the tuning cache in it, which does not exist."""
    from fused_kopt.kernels import tuning

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    tuning._stored.cache_clear()
    yield tuning.path()
    tuning._stored.cache_clear()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors of a few elements in one thread: five times as fast as two threads on two busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where there is no GPU. Without `--slow` keep every n-th case of `slow(every=n)`, and skip plain `slow`."""
    no_gpu = pytest.mark.skip(reason="needs a CUDA or ROCm device")
    too_slow = pytest.mark.skip(reason="runs with --slow")
    seen: Counter[str] = Counter()
    left_out = []
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        marker = item.get_closest_marker("slow")
        if marker is None or config.getoption("--slow"):
            continue
        every = marker.kwargs.get("every")
        name = item.nodeid.partition("[")[0]
        if every is None:
            item.add_marker(too_slow)
        elif seen[name] % every:
            left_out.append(item)
        seen[name] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
