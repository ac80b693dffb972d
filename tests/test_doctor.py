"""`fused-kopt doctor`: what it says of this install, and of installs in which something is wrong."""

import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from support import after_each
from terminal import Result, Run

import fused_kopt
from fused_kopt import execute
from fused_kopt.commands import doctor, packages
from fused_kopt.kernels import cpp_build, launch

Patch = pytest.MonkeyPatch
CARD = SimpleNamespace(name="a card", major=9, minor=0, total_memory=80 << 30)


@pytest.fixture(autouse=True)
def no_keras(monkeypatch: Patch) -> None:
    """Keras's import takes 4 seconds; the tests of its backend bring a stub."""
    monkeypatch.setattr(packages, "find_spec", lambda name: None)


@pytest.fixture
def examine(run: Run) -> Callable[[], dict[str, tuple[str, str]]]:
    """Runs the doctor: {what: (found, verdict)}; the exit code must be 1 for a problem only, and every fault have its remedy."""

    def call() -> dict[str, tuple[str, str]]:
        result: Result = run("doctor")
        found = {what: (text, verdict) for what, text, verdict in result.rows}
        assert len(found) == len(result.rows)
        faults = {what: verdict for what, (_, verdict) in found.items() if verdict != "ok"}
        assert result.code == ("problem" in faults.values())
        for what, verdict in faults.items():
            assert f"\n{verdict}: {what}: " in result.out
        return found

    return call


Examine = Callable[[], dict[str, tuple[str, str]]]


def test_this_install(examine: Examine) -> None:
    found = examine()
    assert found["fused_kopt"] == (fused_kopt.__version__, "ok")
    assert found["torch"] == (torch.__version__, "ok")
    assert found["numpy"] == (np.__version__, "ok")
    assert f"triton {metadata.version('triton')}" in found["extra triton"][0]
    assert not {"extra test", "extra docs", "extra bench"} & set(found)
    assert found["python"][0] == ".".join(map(str, sys.version_info[:3]))
    assert found["executor compiled on cpu"] == found["executor triton on cpu"] == ("works", "ok")
    assert found["executor auto on cpu"][0].startswith("compiled from 65,536 elements")
    assert found["C++ compiler"] == (cpp_build.compiler(), "ok")
    assert found["float32 denormals"] == ("kept", "ok")
    assert "problem" not in {verdict for _, verdict in found.values()}


def _version(changed: dict[str, str | None]) -> Callable[[str], str]:
    real = metadata.version

    def version(name: str) -> str:
        if changed.get(name, "") is None:
            raise metadata.PackageNotFoundError(name)
        return changed.get(name) or real(name)

    return version


def test_versions_that_do_not_fit(examine: Examine, monkeypatch: Patch) -> None:
    changed = {"torch": "2.5.0", "rich": None, "triton": "3.1.0", "matplotlib": None}
    monkeypatch.setattr(packages.metadata, "version", _version(changed))
    found = examine()
    assert found["torch"] == ("2.5.0, needs >=2.11", "problem")
    assert found["rich"] == ("missing", "problem")
    assert found["triton"] == ("3.1.0, needs >=3.6", "attention")
    assert found["extra demo"][0].endswith("without matplotlib (pip install 'fused-kopt[demo]')")
    assert found["extra demo"][1] == found["numpy"][1] == "ok"


def test_not_installed(examine: Examine, monkeypatch: Patch) -> None:
    monkeypatch.setattr(packages, "PACKAGE", "no-such-package")
    found = examine()
    assert found["fused_kopt"] == (f"{fused_kopt.__version__}, not installed", "attention")
    assert found["torch"] == (metadata.version("torch"), "ok")


def test_two_copies(examine: Examine, monkeypatch: Patch) -> None:
    monkeypatch.setattr(fused_kopt, "__version__", "9.9")
    assert examine()["fused_kopt"] == ("9.9 is imported, 0.1.0 is installed", "attention")


KERAS = {
    "class backend: backend = staticmethod(lambda: 'torch')": ("torch", "ok"),
    "class backend: backend = staticmethod(lambda: 'jax')": ("jax", "attention"),
    "import no_such_backend": ("Keras does not import: ModuleNotFoundError: No module named 'no_such_backend'", "attention"),
}


@pytest.mark.parametrize("text", KERAS)
def test_the_backend_of_keras(text: str, examine: Examine, monkeypatch: Patch, tmp_path: Path) -> None:
    (tmp_path / "keras.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(packages, "find_spec", lambda name: "found")
    assert examine()["keras backend"] == KERAS[text]


def test_keras_that_hangs(examine: Examine, monkeypatch: Patch, tmp_path: Path) -> None:
    (tmp_path / "keras.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(packages, "find_spec", lambda name: "found")
    monkeypatch.setattr(packages, "SECONDS", 0.2)
    assert examine()["keras backend"] == ("unknown: the import took more than 0.2 s", "attention")


def test_no_triton_is_no_fault_without_a_gpu(examine: Examine, monkeypatch: Patch) -> None:
    monkeypatch.setattr(execute, "why_not_triton", lambda: "not here")
    found = examine()
    assert found["triton runs"] == ("no: not here", "ok")
    assert found["executor triton on cpu"][0].startswith("unavailable: executor='triton' is not available: not here.")
    assert found["executor triton on cpu"][1] == "ok"


def test_no_compiler(examine: Examine, monkeypatch: Patch) -> None:
    monkeypatch.setattr(cpp_build, "compiler", lambda: None)
    found = examine()
    assert found["C++ compiler"] == ("none of g++, clang++, c++", "attention")
    assert found["executor compiled on cpu"][0].startswith("unavailable")
    assert found["executor auto on cpu"] == ("reference, because compiled does not work here", "ok")


def test_an_executor_that_computes_something_else(examine: Examine, monkeypatch: Patch) -> None:
    after_each(monkeypatch, lambda update: update.variables[0].add_(1))
    found = examine()
    for executor in ("compiled", "triton"):
        text, verdict = found[f"executor {executor} on cpu"]
        assert (text, verdict) == (f"fails: {executor}: 1 of 9 tensors differ from the reference", "problem")
    assert found["executor auto on cpu"][0].startswith("reference")


def test_an_executor_that_raises(examine: Examine, monkeypatch: Patch) -> None:
    monkeypatch.setattr(launch, "bind", Mock(side_effect=RuntimeError("no kernel [here]")))
    found = examine()
    assert found["executor triton on cpu"] == ("fails: RuntimeError: no kernel [here]", "problem")
    assert found["executor compiled on cpu"] == ("works", "ok")


def test_a_cache_that_others_can_write(examine: Examine, monkeypatch: Patch, tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "fused_kopt"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    monkeypatch.setenv("HOME", str(tmp_path))
    text, verdict = examine()["kernel cache"]
    assert (str(tmp_path) in text, verdict) == (False, "attention")
    folder.chmod(0o700)
    assert examine()["kernel cache"] == (str(folder), "ok")


def test_a_damaged_tuning_cache(examine: Examine, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("{")
    assert examine()["tuning"] == ("ignored", "attention")


@pytest.fixture
def card(monkeypatch: Patch) -> None:
    """A GPU, which takes no tensors here: its trial passes."""
    real = doctor.trial
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: CARD)
    monkeypatch.setattr(doctor, "trial", lambda executor, device: None if device.type == "cuda" else real(executor, device))


@pytest.mark.usefixtures("card")
def test_a_gpu(examine: Examine) -> None:
    found = examine()
    assert found["cuda:0"] == ("a card, sm_90, 80 GiB", "ok")
    assert found["executor triton on cuda:0"] == ("works", "ok")
    assert found["executor auto on cuda:0"] == ("triton", "ok")


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("reason", ["Triton is not installed", "TRITON_INTERPRET=1 runs kernels on CPU tensors only"])
def test_a_gpu_without_triton(reason: str, examine: Examine, monkeypatch: Patch) -> None:
    if "INTERPRET" in reason:
        monkeypatch.setattr(launch, "INTERPRETED", True)
        monkeypatch.setattr(doctor, "trial", lambda executor, device: None)
    else:
        monkeypatch.setattr(execute, "why_not_triton", lambda: reason)
    found = examine()
    assert found["executor triton on cuda:0"] == ("unavailable", "problem")
    assert found["executor auto on cuda:0"] == ("reference, because triton does not work here", "ok")


@pytest.mark.parametrize(("build", "verdict"), [(None, "attention"), ("12.8", "problem")])
def test_a_driver_that_torch_does_not_see(build: Any, verdict: str, examine: Examine, monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "NVIDIA", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    text, found = examine()["gpu"]
    assert (text.startswith("an NVIDIA driver, but torch"), found) == (True, verdict)


def test_more_threads_than_cores(examine: Examine, monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 500)
    text, verdict = examine()["cpu"]
    assert (text.endswith("torch uses 500 threads"), verdict) == (True, "attention")


def test_flushed_denormals(examine: Examine) -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("torch cannot flush denormals on this processor")
    try:
        found = examine()
    finally:
        torch.set_flush_denormal(False)
    assert found["float32 denormals"] == ("flushed to zero", "attention")
