"""`fused-kopt tune` with an injected timer, and the launches that it times."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import triton
from matplotlib import image
from rich.console import Console
from terminal import Run

from fused_kopt import execute, prepare
from fused_kopt.commands import tune, variants
from fused_kopt.commands.common import RefusedError
from fused_kopt.commands.tune import Machine, Settings, Sweep, Trial
from fused_kopt.commands.variants import Kernel
from fused_kopt.hyperparameters import Step
from fused_kopt.kernels import launch, offline, scratch, tuning
from fused_kopt.kernels.offline import Spec
from fused_kopt.kernels.scratch import Scratch
from fused_kopt.kernels.tuning import Config
from fused_kopt.kernels.update import update_bucket

pytestmark = pytest.mark.usefixtures("cache")

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
DEFAULT = Config(1024, 8)

CANDIDATES = {
    (F32, 32): "512/2 512/4 512/8 1024/4 1024/8 1024/16 2048/8 2048/16 4096/16",
    (F64, 32): "512/4 512/8 512/16 1024/8 1024/16 2048/16",
    (BF16, 32): "512/4 512/8 1024/8 1024/16 2048/16",
    (F32, 64): "512/1 512/2 512/4 1024/2 1024/4 1024/8 2048/4 2048/8 2048/16 4096/8 4096/16",
}


@pytest.mark.parametrize("case", CANDIDATES, ids=str)
def test_candidates(case: tuple[torch.dtype, int]) -> None:
    found = tune.candidates(*case)
    assert " ".join(f"{block}/{warps}" for block, warps in found) == CANDIDATES[case]
    assert offline.default(*case) in found


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [((1.0, 0.9, 0.95), (2048, 8)), ((1.0, 0.995, 0.992), DEFAULT), ((1.0, 1.1, 1.2), DEFAULT), ((1.0, 0.98, 0.97), (2048, 16))],
)
def test_the_winner_is_the_fastest_by_a_margin(seconds: tuple[float, ...], expected: Config) -> None:
    configs = (DEFAULT, Config(2048, 8), Config(2048, 16))
    trials = [Trial(*pair) for pair in zip(configs, seconds, strict=True)]
    assert Sweep(variants.kernels("sgd")[0], F32, DEFAULT, trials).winner == expected


def machine(best: Config) -> Machine:
    """Every configuration takes a millisecond, one half of that."""
    return Machine("H100", 32, lambda kernel, dtype: lambda config: 5e-4 if config == best else 1e-3)


def test_a_sweep(tmp_path: Path, cache: Path) -> None:
    console = Console(file=(printed := io.StringIO()), width=120)
    settings = Settings("lion", (F32, BF16), 1_000_000, out=tmp_path / "new")
    assert tune.sweep(settings, machine(Config(2048, 16)), console) == 0
    text = printed.getvalue()
    assert "Lion lion, float32" in text
    assert "Lion lion, bfloat16" in text
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert ["2048", "16", "500.0 us", "40", "winner"] in rows  # 20 bytes per element
    assert ["1024", "8", "1,000.0 us", "20", "default"] in rows
    assert len(rows) == 9 + 5
    assert str(cache) in text.replace("\n", "")
    assert image.imread(tmp_path / "new" / tune.PICTURE).shape[:2] == (715, 1170)
    lion = offline.hash_of(variants.kernels("lion")[0].rule)
    assert [tuning.lookup(lion, "H100", pair) for pair in ((F32, F32), (BF16, BF16))] == [(2048, 16)] * 2


def test_a_sweep_that_cannot_store(tmp_path: Path, cache: Path) -> None:
    cache.parent.parent.mkdir(parents=True)
    cache.parent.write_text("in the way")
    with (
        pytest.warns(RuntimeWarning, match="ignores"),
        pytest.raises(RefusedError, match=r"cannot be stored: .*Make the directory writable"),
    ):
        tune.sweep(Settings("lion", out=tmp_path), machine(DEFAULT), Console(quiet=True))


def test_without_a_gpu(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("tune", "--optimizer", "adam")
    assert (result.code, result.out) == (2, "")
    assert "nothing to tune: torch finds no CUDA or ROCm device" in result.err
    monkeypatch.setattr(launch, "INTERPRETED", True)
    assert "TRITON_INTERPRET=1" in run("tune").err
    monkeypatch.setattr(execute, "why_not_triton", lambda: "pip install 'fused-kopt[triton]'")
    assert run("tune").err == "fused-kopt: nothing to tune: pip install 'fused-kopt[triton]'\n"


def test_a_gpu_that_is_not_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "--device cuda:2: there are 2 devices" in run("tune", "--device", "cuda:2").err
    for wrong in ("cpu", "cuda:x"):
        assert f"must be cuda or cuda:N. Received: {wrong}." in run("tune", "--device", wrong).err


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_a_scratch_launch_computes_the_same_in_every_block_size(dtype: torch.dtype) -> None:
    kernel: Kernel = variants.kernels("adam")[0]
    spec = Spec(kernel.rule, prepare.keep, kernel.scalars, kernel.slots, dtype, dtype)
    scalars = [float(x) for x in kernel.optimizer.scalars(Step(0, spec.compute))]
    results = []
    for block in (64, 1024):
        buffers = Scratch(spec, scalars, 200, torch.device("cpu"))
        launch._run(update_bucket, -(-200 // block), buffers.arguments(block), tuple(spec.constants(block, interpret=True).values()))
        results.append((buffers.variable, *buffers.slots))
    one = torch.ones(200, dtype=spec.compute)
    row = kernel.scalars(*torch.tensor(scalars, dtype=spec.compute).unbind())
    p, values = kernel.rule(one, one, (one, one), row)
    for expected, *found in zip((p.to(dtype), *values), *results, strict=True):
        assert all(torch.equal(expected, tensor) for tensor in found)


class Recorder:
    """Stands for the kernel: remembers how it was launched."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **named: self.launches.append((grid, arguments, named))


def test_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "update_bucket", recorder := Recorder())
    monkeypatch.setattr(triton.testing, "do_bench", lambda launch, return_mode: launch() or {"median": 2.5}[return_mode])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Mock(warp_size=32))
    name, warp, prepared = tune._gpu(5000, torch.device("cpu"))
    assert (name, warp) == ("H100", 32)
    assert prepared(variants.kernels("adam")[0], BF16)(Config(2048, 16)) == 2.5e-3
    ((grid, arguments, named),) = recorder.launches
    assert grid == (3,)
    assert (named["BLOCK"], named["num_warps"], named["enable_fp_fusion"]) == (2048, 16, False)
    assert (arguments[0].tolist()[0][2], arguments[1].tolist()) == (5000, [[0, 0], [0, 1], [0, 2]])
    assert (arguments[0].shape, named["STORED"]) == ((1, 5), (triton.language.float32,) * 2)


def test_too_many_elements(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(tune, "_gpu", Mock(side_effect=torch.OutOfMemoryError("8 GiB are free.")))
    assert "fused-kopt: --elements 99: 8 GiB are free. Ask for fewer." in run("tune", "--elements", 99).err


@pytest.mark.gpu
def test_on_a_gpu(run: Run, tmp_path: Path, cache: Path) -> None:
    result = run("tune", "--optimizer", "adam", "--dtype", "float32,bfloat16,float64", "--elements", 1 << 20, "--out", tmp_path)
    assert result.code == 0, result.err
    assert len(json.loads(cache.read_text())["entries"]) == 12
