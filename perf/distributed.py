"""Optimizers over ranks: `python -m perf.distributed` measures step time, bytes on the wire and state of each rank."""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from fused_kopt import collectives
from perf import measure, rows, sharers, shares, wire
from perf.clocks import CpuClock, CudaClock
from perf.sharers import Sharer
from perf.workloads import WORKLOADS, Sampled, sampled

BUDGET = 60.0
COUNTED_STEPS = 3
EPILOG = """On a GPU machine a rank has a GPU, and collectives are NCCL's. Otherwise a rank is a process with one thread, and
collectives are gloo's over the loopback device. Ranks share the machine's cores and memory: more of them than cores measure contention.
Bytes on the wire are the loopback device's own count. Run where nothing else uses it:
  unshare -rn sh -c 'ip link set lo up && python -m perf.distributed'
`python -m perf report` fills the tables."""


def worker(rank: int, ranks: int, folder: str, sample: Sampled, seconds: float) -> None:
    """One rank: measures every way in turns; the first writes what was found."""
    device = torch.device("cuda", rank) if _gpus(ranks) else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = f"file://{folder}/store"
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    try:
        found = _measure([made(sample.shapes, device) for made in sharers.SHARERS], seconds)
        lines = wire.lines(device) if ranks > 1 else {}
        if rank == 0:
            text = json.dumps({"found": found, "lines": lines})
            Path(folder, "found.json").write_text(text, encoding="utf-8")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _measure(made: Sequence[Sharer], seconds: float) -> dict[str, dict[str, Any]]:
    """Time, bytes and state of each, by name."""
    for sharer in made:
        for _ in range(measure.WARM):
            sharer.prepare()
            sharer.step()
    found = {sharer.name: _bytes(sharer) for sharer in made}
    taken: dict[str, list[float]] = {sharer.name: [] for sharer in made}
    deadline = time.monotonic() + seconds
    # all ranks must agree on when to end, so that the first one says it
    while _first(len(taken[made[0].name]) < measure.LEAST or (time.monotonic() < deadline and len(taken[made[0].name]) < measure.MOST)):
        turn = len(taken[made[0].name]) % len(made)
        for sharer in [*made[turn:], *made[:turn]]:
            sharer.prepare()
            taken[sharer.name].append(wire.timed(sharer.step))
    for name, mine in taken.items():
        found[name]["seconds"] = wire.slowest(mine)
    return found


def _first(value: bool) -> bool:
    """What the first rank says."""
    return bool(collectives.objects(value)[0])


def _bytes(sharer: Sharer) -> dict[str, Any]:
    """What a rank sends in a step, as counted and as the loopback device says; and the most state that a rank has."""
    ranks = dist.get_world_size()
    with wire.Counted(ranks) as counted:
        sharer.prepare()
        sharer.step()
    sharer.prepare()
    counts = []
    for steps in (0, COUNTED_STEPS):  # barriers send bytes too
        collectives.objects(None)
        before = wire.loopback()
        dist.barrier()
        for _ in range(steps):
            sharer.step()
        dist.barrier()
        time.sleep(0.1)  # for the last acknowledgements
        counts.append(wire.loopback() - before)
    on_wire = max(0, counts[1] - counts[0]) / COUNTED_STEPS / ranks
    return {"sent": counted.sent, "wire": on_wire, "state": max(collectives.objects(sharer.state_bytes())), "calls": counted.calls}


def _gpus(ranks: int) -> bool:
    return torch.cuda.device_count() >= ranks


def run(ranks: int, sample: Sampled, seconds: float) -> dict[str, Any]:
    """Start so many ranks, and return what they found."""
    os.environ["OMP_NUM_THREADS"] = "1"  # children read it when they import torch
    with tempfile.TemporaryDirectory() as folder:
        spawn(worker, (ranks, folder, sample, seconds), ranks)  # type: ignore[no-untyped-call]
        found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text(encoding="utf-8"))
    return {**found, "lines": {kind: wire.Line(*line) for kind, line in found["lines"].items()}}


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        "python -m perf.distributed", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="(%(default)s)")
    made.add_argument("--workload", choices=WORKLOADS, default="W5", help="(%(default)s)")
    made.add_argument("--sample", type=int, default=8, help="about one element in so many, a power of two (%(default)s)")
    made.add_argument("--seconds", type=float, default=BUDGET, help="for each number of ranks (%(default)s)")
    made.add_argument("--out", type=Path, default=shares.FOLDER, help="folder of the CSV files (%(default)s)")
    made.add_argument("--commit", help="the commit measured, where this is no git checkout")
    return made


def main(arguments: Sequence[str]) -> int:
    """Measure; returns the exit code."""
    options = parser().parse_args(arguments)
    sample = sampled(WORKLOADS[options.workload].shapes, options.sample)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = CudaClock() if device.type == "cuda" else CpuClock()
    provenance = rows.provenance(device, options.commit, clock.bandwidth())
    options.out.mkdir(parents=True, exist_ok=True)
    earlier: dict[int, dict[str, Any]] = {}
    for ranks in sorted(options.ranks):
        earlier[ranks] = found = run(ranks, sample, options.seconds)
        made = shares.rows(found, earlier, shares.Setting(provenance, ranks, options.workload, sample, "nccl" if _gpus(ranks) else "gloo"))
        rows.append(options.out, made)
        for row in made:
            print(shares.summary(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
