"""A run: the plan's cases one after the other, their rows appended as soon as they are measured."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from perf import plan, rows
from perf.cases import Case
from perf.clocks import Clock, CpuClock, CudaClock
from perf.measure import Log, measure, release
from perf.plan import Entry
from perf.providers import Provider
from perf.rows import Provenance, Row


@dataclass
class Run:
    """What all cases of a run share."""

    clock: Clock
    device: torch.device
    provenance: Provenance
    out: Path
    sample: int | None
    deadline: float
    log: Log

    def __post_init__(self) -> None:
        self._said: set[tuple[str, str]] = set()
        self.failed: set[str] = set()

    def execute(self, entries: Sequence[Entry], providers: Sequence[Provider]) -> None:
        """Measure every entry until the deadline. What a case does not use of its share is left to the later ones."""
        for position, entry in enumerate(entries):
            left = self.deadline - time.monotonic()
            if left <= 0:
                self.log(f"{len(entries) - position} cases not run: the time is spent")
                return
            wanted = [p for p in plan.select(entry.patterns) if p in providers]
            self._case(entry, wanted, left / (len(entries) - position))

    def _case(self, entry: Entry, wanted: Sequence[Provider], seconds: float) -> None:
        whole = Case(entry.optimizer, entry.workload, "all", [], entry.dtype, entry.variant, self.device)
        case = plan.fit(whole, lambda c: [p for p in wanted if p.why_not(c) is None], self.clock.free(), seconds, self.sample)
        for provider in wanted:
            self._explain(provider, provider.why_not(case))
        able = [p for p in wanted if p.why_not(case) is None]
        self.log(case.name)
        start = time.monotonic()
        try:
            outcome = measure(case, able, self.clock, seconds, self.log)
            self._stream()
        except RuntimeError as error:  # out of memory, or a kernel that fails once queued: the next case is another one
            self.log(f"  failed: {error}")
            self.failed |= {p.key for p in able if p.ours}
            release(self.device)
            return
        self.failed |= {p.key for p in able if p.ours} & set(outcome.failed)
        found = [rows.row(case, result, self.provenance) for result in outcome.results]
        rows.append(self.out, found)
        for line in [*summary(found), f"  {time.monotonic() - start:.1f} s in all"]:
            self.log(line)

    def _stream(self) -> None:
        """Measure the stream again: the run's best so far is what the machine can do."""
        speed = max(self.provenance.copy_gb_per_s, rows.rounded(self.clock.bandwidth() / 1e9))
        self.provenance = replace(self.provenance, copy_gb_per_s=speed)
        release(self.device)

    def _explain(self, provider: Provider, reason: str | None) -> None:
        """Say once why a provider is skipped."""
        if reason and (provider.key, reason) not in self._said:
            self._said.add((provider.key, reason))
            self.log(f"  skipped: {provider.key}: {reason}")


def summary(found: Sequence[Row]) -> list[str]:
    """One line per provider; `speed-up` is the best peer's step time over its own."""
    peer = best_peer(found)
    lines = []
    for row in found:
        ratio = f"{peer.step_seconds / row.step_seconds:7.2f}x" if peer and row.ours else "        "
        lines.append(
            f"  {row.provider + '-' + row.executor:26} {row.seconds * 1e3:10.3f} ms  host {row.host_seconds * 1e3:10.3f} ms "
            f"{row.gb_per_s:8.1f} GB/s {row.share_of_copy:7.1%} of the stream  {ratio}  peak +{row.peak_bytes / 2**20:.1f} MiB"
        )
    return lines


def best_peer(found: Sequence[Row]) -> Row | None:
    """The peer with the shortest step, or None."""
    return min((row for row in found if not row.ours), key=lambda row: row.step_seconds, default=None)


def start(device: torch.device, out: Path, sample: int | None, budget: float, commit: str | None) -> Run:
    """A run on this machine, with its bandwidth measured."""
    deadline = time.monotonic() + budget
    clock: Clock = CudaClock() if device.type == "cuda" else CpuClock()
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > cores / 2:
        print(f"warning: the machine is busy (load {load:.1f} on {cores} cores); a step with several threads waits for the slowest")
    provenance = rows.provenance(device, commit, clock.bandwidth())
    release(device)
    out.mkdir(parents=True, exist_ok=True)
    return Run(clock, device, provenance, out, sample, deadline, lambda line: print(line, flush=True))
