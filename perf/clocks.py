"""Time, memory and bandwidth of a device."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from perf.cases import Runner

MIB = 2**20
TRIAD_BYTES = 128 * MIB  # per array; several times any level-3 cache
COPY_BYTES = 1024 * MIB
BEST_OF = 20  # a busy neighbour spoils some of them
FLUSHED = 256 * MIB  # an H100's L2 holds 50 MiB
FLUSH_BELOW = 1024 * MIB  # larger steps flush the cache themselves
CLOCK_HZ = 2e9  # of a GPU at most: cycles of sleep per second
LONGEST_SLEEP = 0.1
cuda: Any = torch.cuda  # untyped in parts


class Sample(NamedTuple):
    """One repetition. On CPU both are the whole step."""

    seconds: float
    """On the device, from the step's first kernel to its last."""
    host_seconds: float
    """Until the call returned, without waiting for the device."""


class Clock(Protocol):
    """What measures runners on one device."""

    def measure(self, runner: Runner, size: int) -> Sample:
        """One repetition of a step that moves `size` bytes."""

    def peak(self, runner: Runner) -> int:
        """Bytes allocated during a step above what is resident before it."""

    def bandwidth(self) -> float:
        """The best bytes per second that a plain stream reaches: triad on CPU, copy on a GPU."""

    def free(self) -> int:
        """Bytes of memory that can be allocated."""


def best(run: Callable[[], float]) -> float:
    """The shortest of several runs, after one that touches the memory."""
    run()
    return min(run() for _ in range(BEST_OF))


class CpuClock:
    """Wall time of the whole step; allocations as torch's profiler sees them."""

    def measure(self, runner: Runner, size: int) -> Sample:
        runner.prepare()
        start = time.perf_counter()
        runner.step()
        seconds = time.perf_counter() - start
        return Sample(seconds, seconds)

    def peak(self, runner: Runner) -> int:
        runner.prepare()
        with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            runner.step()
        profiler: Any = recorded.profiler
        changes = sorted((e.start_ns(), e.nbytes()) for e in profiler.kineto_results.events() if e.name() == "[memory]")
        return highest(change for _, change in changes)

    def bandwidth(self) -> float:
        """STREAM's triad, counted as STREAM counts: two arrays read, one written."""
        a, b, c = (torch.ones(TRIAD_BYTES // 4) for _ in range(3))

        def triad() -> float:
            start = time.perf_counter()
            torch.add(b, c, alpha=3.0, out=a)
            return time.perf_counter() - start

        return 3 * TRIAD_BYTES / best(triad)

    def free(self) -> int:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


class CudaClock:
    """Device time by events, host time by the wall clock, in two steps of one repetition.

    The device first sleeps for as long as the host needs to queue the step, so that what the events enclose is the
    device's work and not its waiting for the host.
    """

    def __init__(self) -> None:
        self._flush: Tensor | None = None

    def measure(self, runner: Runner, size: int) -> Sample:
        host = self._host(runner)
        return Sample(self._device(runner, host, size < FLUSH_BELOW), host)

    def _host(self, runner: Runner) -> float:
        runner.prepare()
        cuda.synchronize()
        start = time.perf_counter()
        runner.step()
        host = time.perf_counter() - start
        cuda.synchronize()
        return host

    def _device(self, runner: Runner, host: float, flush: bool) -> float:
        runner.prepare()
        if flush:
            self._flush = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda") if self._flush is None else self._flush
            self._flush.zero_()
        cuda.synchronize()
        begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
        cuda._sleep(int(CLOCK_HZ * min(LONGEST_SLEEP, 20e-6 + 1.2 * host)))
        begin.record()
        runner.step()
        end.record()
        cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def peak(self, runner: Runner) -> int:
        runner.prepare()
        cuda.synchronize()
        cuda.reset_peak_memory_stats()
        resident = cuda.memory_allocated()
        runner.step()
        cuda.synchronize()
        return int(cuda.max_memory_allocated() - resident)

    def bandwidth(self) -> float:
        """A copy: one array read, one written."""
        source, target = (torch.ones(COPY_BYTES // 4, device="cuda") for _ in range(2))
        begin, end = (cuda.Event(enable_timing=True) for _ in range(2))

        def copy() -> float:
            begin.record()
            target.copy_(source)
            end.record()
            cuda.synchronize()
            return float(begin.elapsed_time(end)) / 1e3

        return 2 * COPY_BYTES / best(copy)

    def free(self) -> int:
        return int(cuda.mem_get_info()[0])


def highest(changes: Iterator[int]) -> int:
    """The largest running sum, at least 0."""
    total = peak = 0
    for change in changes:
        total += change
        peak = max(peak, total)
    return peak


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the lines that torch's profiler prints from C++ at its start and stop."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
