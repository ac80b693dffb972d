"""`fused-kopt doctor`: what is installed, what runs on this machine, what is wrong and how to mend it."""

import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

import fused_kopt
from fused_kopt import execute
from fused_kopt.commands.packages import Finding, packages
from fused_kopt.execute import Chosen

ABOUT = """Explain this install: versions, devices, compilers, caches, executors, extras, each with a verdict.

Every executor takes a step of Adam on every device it serves, which must equal the reference bit for bit; where Keras is
installed, it is imported in another process to learn its backend. Takes some seconds.
Exit code 1: a problem, below the table with its remedy. "attention" is no failure."""
COLOURS = {"ok": "green", "attention": "yellow", "problem": "red"}
# Shapes of a trial step: a full block of the compiled kernels and a tail, a matrix, one element.
SHAPES = ((1025,), (7, 3), ())
NVIDIA = Path("/proc/driver/nvidia/version")


def _cards() -> list[torch.device]:
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def machine() -> Iterator[Finding]:
    """The platform, the processor, GPUs."""
    yield Finding("python", platform.python_version())
    yield Finding("platform", platform.platform())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads, found = torch.get_num_threads(), f"{usable} cores, torch uses"
    if threads > usable:
        yield Finding("cpu", f"{found} {threads} threads", "attention", f"threads wait for each other: torch.set_num_threads({usable})")
    else:
        yield Finding("cpu", f"{found} {threads} thread{'s' * (threads != 1)}")
    for device in _cards():
        card = torch.cuda.get_device_properties(device)
        yield Finding(str(device), f"{card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2**30:.0f} GiB")
    if not _cards():
        yield _no_card()


def _no_card() -> Finding:
    """Why torch finds no GPU, where the machine seems to have one."""
    build = torch.version.cuda or torch.version.hip
    if not NVIDIA.exists():
        return Finding("gpu", f"no device (torch is built for {f'CUDA or ROCm {build}' if build else 'CPU only'})")
    if build is None:
        mend = "install torch's CUDA build (pytorch.org/get-started) to use the GPU"
        return Finding("gpu", "an NVIDIA driver, but torch is built for CPU only", "attention", mend)
    mend = "check nvidia-smi: a driver too old for that version, or CUDA_VISIBLE_DEVICES hides the device"
    return Finding("gpu", f"an NVIDIA driver, but torch (CUDA {build}) finds no device", "problem", mend)


def compilers() -> Iterator[Finding]:
    """Triton, the C++ compiler, and where kernels are kept."""
    reason = execute.why_not_triton()
    if reason is None:
        from fused_kopt.kernels import launch

        how = "interpreter only (TRITON_INTERPRET=1)" if launch.INTERPRETED else "compiles for GPUs, interprets on CPU"
        yield Finding("triton runs", how)
        yield _tuning()
    else:
        yield Finding("triton runs", f"no: {reason}")  # a problem of the executors on GPUs, below
    from fused_kopt.kernels import cpp_build

    path = cpp_build.compiler()
    if path is None:
        mend = "install g++ or clang++: large steps on CPU run on the slower reference without it"
        yield Finding("C++ compiler", f"none of {', '.join(cpp_build.COMPILERS)}", "attention", mend)
    else:
        yield Finding("C++ compiler", path)
    yield _cache(cpp_build.cache_folder())


def _cache(folder: Path) -> Finding:
    """Kernels are kept in the home directory; in a folder of the process where that is not possible."""
    if folder.parent.name == ".cache":
        return Finding("kernel cache", str(folder))
    mend = "~/.cache/fused_kopt must be a folder of yours that nobody else can write: chmod 700 ~/.cache/fused_kopt"
    return Finding("kernel cache", f"{folder}, for this process only: every process compiles anew", "attention", mend)


def _tuning() -> Finding:
    from fused_kopt.kernels import tuning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tuning.lookup("", "", (torch.float32, torch.float32))  # reads the file
    if caught:
        return Finding("tuning", "ignored", "attention", str(caught[0].message))
    try:
        file = tuning.path()
    except RuntimeError:
        return Finding("tuning", "no home directory, defaults")
    return Finding("tuning", str(file) if file.exists() else "defaults")


def trial(executor: Chosen, device: torch.device) -> str | None:
    """Why an executor cannot be trusted on a device, or None: a step of Adam beside the reference, on copies."""
    generator = torch.Generator("cpu").manual_seed(0)
    gradients, variables = ([torch.randn(s, generator=generator, device="cpu").to(device) for s in SHAPES] for _ in range(2))
    try:
        report = fused_kopt.verify(fused_kopt.Adam(), zip(gradients, variables, strict=True), executor)
    except Exception as error:  # whatever a compiler, its tools or a driver raise
        return f"{type(error).__name__}: {error}"
    return None if report.equal else str(report)


def executors() -> Iterator[Finding]:
    """Each executor on each device it serves, and what `auto` takes."""
    works: dict[torch.device, list[Chosen]] = {}
    for device in (torch.device("cpu"), *_cards()):
        works[device] = []
        for executor in ("compiled", "triton") if device.type == "cpu" else ("triton",):
            finding = _executor(executor, device)
            works[device] += [executor] * (finding.found == "works")
            yield finding
    for device, found in works.items():
        yield _automatic(device, found)


def _executor(executor: Chosen, device: torch.device) -> Finding:
    what = f"executor {executor} on {device}"
    try:
        execute.choose(executor, device)
    except RuntimeError as error:
        if device.type == "cpu":
            return Finding(what, f"unavailable: {error}")
        return Finding(what, "unavailable", "problem", f"steps on this GPU run on the slower reference: {error}")
    reason = trial(executor, device)
    if reason is None:
        return Finding(what, "works")
    mend = "executor='reference' avoids it; clear ~/.cache/fused_kopt and ~/.triton/cache, else report this"
    return Finding(what, f"fails: {reason.partition(chr(10))[0]}", "problem", f"{mend}: {reason}")


def _automatic(device: torch.device, works: list[Chosen]) -> Finding:
    what = f"executor auto on {device}"
    if device.type != "cpu":
        return Finding(what, "triton" if "triton" in works else "reference, because triton does not work here")
    if "compiled" not in works:
        return Finding(what, "reference, because compiled does not work here")
    size = f"{execute.WORTH_COMPILING:,} elements, each variable counting {execute.PER_TENSOR:,} more"
    return Finding(what, f"compiled from {size}; reference below, where C++ does not pay")


def arithmetic() -> Iterator[Finding]:
    """Whether this thread keeps small numbers, which torch.set_flush_denormal and libraries built with -ffast-math change."""
    if np.float32(1e-38) * np.float32(0.1) != 0:
        yield Finding("float32 denormals", "kept")
    else:
        mend = "torch.set_flush_denormal(False): results below 1.2e-38 depend on the thread"
        yield Finding("float32 denormals", "flushed to zero", "attention", mend)


def doctor(console: Console) -> int:
    """Print every finding with its verdict, then the remedies. Returns the exit code."""
    with console.status("examining"):
        findings = [finding for part in (packages, machine, compilers, executors, arithmetic) for finding in part()]
    table = Table("what", Column("found", overflow="fold"), "verdict")
    for what, found, verdict, _ in findings:
        table.add_row(what, escape(found), f"[{COLOURS[verdict]}]{verdict}[/]")
    console.print(table)
    for finding in findings:
        if finding.mend:
            console.print(f"{finding.verdict}: {finding.what}: {finding.mend}", markup=False, soft_wrap=True)
    counts = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in COLOURS}
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return 1 if counts["problem"] else 0
