"""A step of an offloaded Adam, against one without offload and torch's by hand: `python -m perf.offload`."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import fused_kopt
from fused_kopt.distributed import OffloadStats, offload, offload_stats
from perf import rows
from perf.clocks import Clock, CpuClock, CudaClock
from perf.rows import Provenance, rounded

FOLDER = rows.RESULTS / "offload"
POLICIES = {torch.float32: "float32", torch.bfloat16: "bf16_split"}


@dataclass(frozen=True)
class Row(Provenance):
    """A provider's step. Times are medians, in seconds, until the variables are there."""

    provider: str
    dtype: str
    precision: str
    tensors: int
    elements: int
    parts: int
    """Launches; 0 where nothing says so."""
    bytes_down: int
    bytes_up: int
    seconds: float
    seconds_p10: float
    seconds_p90: float
    repetitions: int
    copying: float
    """See OffloadStats."""
    waiting: float
    updating: float
    copies_alone: float
    """The same bytes down and up, and nothing else."""
    overlap: float
    """Of `copies_alone`, the share that the step does not show: 1 - (seconds - updating) / copies_alone, at least 0."""


class Work(NamedTuple):
    """Variables on the device, and their gradients."""

    variables: list[Tensor]
    gradients: list[Tensor]


class Provider(NamedTuple):
    """A step, and what it says of itself."""

    name: str
    precision: str
    step: Callable[[], object]
    stats: Callable[[], OffloadStats]


def work(tensors: int, elements: int, dtype: torch.dtype, device: torch.device) -> Work:
    """Random numbers of one dtype, in tensors of their own."""
    generator = torch.Generator().manual_seed(0)
    made = [[torch.randn(elements, generator=generator).to(device, dtype) for _ in range(tensors)] for _ in range(2)]
    return Work(*made)


def ours(name: str, done: Work, offloaded: bool) -> Provider:
    """Adam of this package."""
    policy = POLICIES[done.variables[0].dtype]
    optimizer = fused_kopt.Adam(precision=policy)
    pairs = list(zip(done.gradients, done.variables, strict=True))
    stats: Callable[[], OffloadStats] = OffloadStats
    if offloaded:
        offload(optimizer)
        stats = lambda: offload_stats(optimizer)  # noqa: E731
    return Provider(name, policy, lambda: optimizer.apply_gradients(pairs), stats)


def by_hand(done: Work) -> Provider:
    """torch.optim.Adam(fused=True) on float32 copies in host memory, as a training loop would write it: down, step, up."""
    masters = [torch.nn.Parameter(v.detach().to("cpu", torch.float32, copy=True)) for v in done.variables]
    for master in masters:
        master.grad = torch.zeros_like(master)
    optimizer = torch.optim.Adam(masters, fused=True)

    @torch.no_grad()
    def step() -> None:
        torch._foreach_copy_([m.grad for m in masters if m.grad is not None], done.gradients)
        optimizer.step()
        torch._foreach_copy_(done.variables, [m.detach() for m in masters])

    size = sum(v.numel() * v.element_size() for v in done.variables)
    return Provider("torch by hand", "float32 masters", step, lambda: OffloadStats(bytes_down=size, bytes_up=size))


def finish(device: torch.device) -> None:
    """Wait until the variables are there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of a step."""
    finish(device)
    start = time.perf_counter()
    step()
    finish(device)
    return time.perf_counter() - start


def copies(done: Work) -> Callable[[], object]:
    """The copies of an offloaded step alone."""
    pinned = done.variables[0].device.type == "cuda"
    hosts = [[torch.zeros(v.shape, dtype=v.dtype, pin_memory=pinned) for v in done.variables] for _ in range(2)]

    def step() -> None:
        torch._foreach_copy_(hosts[0], done.gradients, non_blocking=True)
        torch._foreach_copy_(done.variables, hosts[1], non_blocking=True)

    return step


def measure(dtype: torch.dtype, tensors: int, elements: int, repetitions: int, provenance: Provenance, device: torch.device) -> list[Row]:
    """Every provider in turn in each repetition, so that a busy neighbour disturbs all; the first two do not count."""
    made = [work(tensors, elements, dtype, device) for _ in range(4)]
    providers = [ours("fused_kopt", made[0], False), ours("fused_kopt offloaded", made[1], True), by_hand(made[2])]
    alone, seconds, told = copies(made[3]), [], []
    for _ in range(repetitions + 2):
        seconds.append([timed(step, device) for step in [alone, *(p.step for p in providers)]])
        told.append([p.stats() for p in providers])
    found = []
    for i, provider in enumerate(providers):
        mine = sorted(times[i + 1] for times in seconds[2:])
        median, copied = statistics.median(mine), statistics.median(times[0] for times in seconds[2:])
        stats = [each[i] for each in told[2:]]
        copying, waiting, updating = (statistics.median(getattr(s, name) for s in stats) for name in OffloadStats._fields[3:])
        hidden = max(0.0, 1 - (median - updating) / copied) if updating else 0.0
        found.append(
            Row(
                **asdict(provenance),
                provider=provider.name,
                dtype=str(dtype).removeprefix("torch."),
                precision=provider.precision,
                tensors=tensors,
                elements=tensors * elements,
                parts=stats[-1].parts,
                bytes_down=stats[-1].bytes_down,
                bytes_up=stats[-1].bytes_up,
                seconds=rounded(median),
                seconds_p10=rounded(mine[len(mine) // 10]),
                seconds_p90=rounded(mine[len(mine) * 9 // 10]),
                repetitions=repetitions,
                copying=rounded(copying),
                waiting=rounded(waiting),
                updating=rounded(updating),
                copies_alone=rounded(copied),
                overlap=rounded(hidden),
            )
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure both dtypes, print and append rows."""
    parser = argparse.ArgumentParser(prog="python -m perf.offload", description=__doc__)
    parser.add_argument("--tensors", type=int, default=25)
    parser.add_argument("--elements", type=int, default=1 << 20, help="of each tensor")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--commit", help="where the folder is no git checkout")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    clock: Clock = CudaClock() if device.type == "cuda" else CpuClock()
    provenance = rows.provenance(device, options.commit, clock.bandwidth())
    for dtype in POLICIES:
        found = measure(dtype, options.tensors, options.elements, options.repetitions, provenance, device)
        rows.append(options.out, found)
        for row in found:
            times = {name: f"{1e3 * getattr(row, name):.1f}" for name in ("copying", "waiting", "updating", "copies_alone")}
            print(f"{row.provider:22} {row.dtype:9} {1e3 * row.seconds:7.1f} ms, {times}, {row.overlap:.0%} of the copies hidden")
    return 0


if __name__ == "__main__":
    sys.exit(main())
