"""Catalogue D, continued: the kernels' text, and what keeps the interpreter honest."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from support import build, outcome, python, randn

from fused_kopt import execute
from fused_kopt.kernels import launch

KERNELS = Path(launch.__file__).parent


def test_D7_a_table_is_never_written_again() -> None:
    """A launch in flight may still read it."""
    optimizer, variable = build("sgd", "triton"), torch.nn.Parameter(torch.zeros(3))
    tables, rows = [], []
    for _ in range(5):
        variable.data = torch.zeros(3)
        optimizer.apply_gradients([(torch.ones(3), variable)])
        (bucket,) = optimizer._state.buckets.values()
        tables.append(next(iter(bucket.tables.values()))._segments[torch.float32][2])
        rows.append(tables[-1].clone())
    assert all(torch.equal(t, r) for t, r in zip(tables, rows, strict=True))


def names_in(path: Path) -> set[str]:
    """Every name, attribute and import of a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        found |= {getattr(node, field) for field in ("id", "attr", "name") if isinstance(getattr(node, field, None), str)}
    return found


def test_D12_D13_D24_kernels_are_neither_tuned_by_trial_nor_silently_asserting() -> None:
    """A trial run of an in-place kernel is an update; tuned choices differ between ranks; interpreted asserts are silent."""
    files = [file for file in sorted(KERNELS.glob("*.py")) if file.stem not in ("scratch", "tuning")]
    assert {"launch", "norms", "update", "cpp_launch"} < {file.stem for file in files}
    for file in files:
        forbidden = {"autotune", "heuristics", "do_bench", "device_assert", "static_assert", "perf_counter", "time"}
        assert names_in(file) & forbidden == set(), file
    assert {launch.block_size(d) for d in (torch.float32, torch.bfloat16, torch.float16)} == {1024}
    assert launch.block_size(torch.float64) == 512


def test_D22_the_interpreter_refuses_device_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 runs kernels on CPU tensors only"):
        execute.choose("triton", torch.device("cuda"))
    assert execute.choose("triton", torch.device("cpu")) == "triton"
    execute.warn_fallback.cache_clear()
    with pytest.warns(RuntimeWarning, match="falls back to the reference executor"):
        assert execute.choose("auto", torch.device("cuda")) == "reference"


def test_D22_an_interpreting_process_steps_and_counts() -> None:
    code = """
import numpy, torch, fused_kopt, support
results = [support.outcome("adam", e, [support.randn(9)], [[support.randn(9, seed=1)]]) for e in support.EXECUTORS]
support.assert_same(*results)
print(fused_kopt.stats())
"""
    assert python(code, TRITON_INTERPRET="1") == "Stats(launches=1, compilations=0)\n"


def test_D23_the_launcher_passes_exactly_the_arguments_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter accepts keywords that no kernel has."""
    calls: list[Any] = []
    run = launch._run
    monkeypatch.setattr(launch, "_run", lambda *arguments: (calls.append(arguments), run(*arguments)))
    outcome("adam", "triton", [randn(5)], [[randn(5)]], clipnorm=1.0)
    assert [kernel.fn.__name__ for kernel, *_ in calls] == ["square_blocks", "fold", "update_bucket"]
    assert all(len(kernel.arg_names) == len(arguments) + len(constants) for kernel, _, arguments, constants, *_ in calls)
