"""Optimizers over ranks: `python -m perf.distributed` measures step time, bytes on the wire and state of each rank."""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
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
Links = Mapping[tuple[str, int], tuple[float, Callable[[], None]]]
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
        found = _measure([made(sample.shapes, device) for made in sharers.SHARERS], _links(device), seconds)
        if rank == 0:
            Path(folder, "found.json").write_text(json.dumps(found), encoding="utf-8")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _links(device: torch.device) -> Links:
    """Collectives by kind and size; none on one rank."""
    sizes = wire.SIZES if dist.get_world_size() > 1 else ()
    return {(kind, size): wire.collective(kind, size, device) for kind in wire.KINDS for size in sizes}


def _measure(made: Sequence[Sharer], links: Links, seconds: float) -> dict[str, Any]:
    """Of each way its time, bytes and state, by name; of each kind of collective the line through its times, taken in the same turns."""
    for sharer in made:
        for _ in range(measure.WARM):
            sharer.prepare()
            sharer.step()
    found = {sharer.name: _bytes(sharer) for sharer in made}
    jobs = {sharer.name: (sharer.prepare, sharer.step) for sharer in made} | {key: (_nothing, run) for key, (_, run) in links.items()}
    taken = _turns(jobs, seconds)
    for sharer in made:
        found[sharer.name]["seconds"] = taken[sharer.name]
    lines = {}
    for kind in {kind: None for kind, _ in links}:
        points = [(sent, statistics.mean(taken[key])) for key, (sent, _) in links.items() if key[0] == kind]
        lines[kind] = wire.fitted(points)
    return {"found": found, "lines": lines}


def _nothing() -> None:
    """What a collective needs before it."""


def _turns(jobs: Mapping[Any, tuple[Callable[[], None], Callable[[], None]]], seconds: float) -> dict[Any, list[float]]:
    """Seconds of repetitions, interleaved: every round starts with another job. jobs: what is not timed, and what is."""
    taken: dict[Any, list[float]] = {key: [] for key in jobs}
    keys, deadline, turn = list(jobs), time.monotonic() + seconds, 0
    # all ranks must agree on when to end, so the first one says it
    while _first(turn < measure.LEAST or (time.monotonic() < deadline and turn < measure.MOST)):
        for key in [*keys[turn % len(keys) :], *keys[: turn % len(keys)]]:
            jobs[key][0]()
            taken[key].append(wire.timed(jobs[key][1]))
        turn += 1
    return {key: wire.slowest(mine) for key, mine in taken.items()}


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
        backend, load = "nccl" if _gpus(ranks) else "gloo", rows.rounded(os.getloadavg()[0])
        earlier[ranks] = found = run(ranks, sample, options.seconds)
        setting = shares.Setting(provenance, ranks, options.workload, sample, backend, load)
        made = shares.rows(found, earlier, setting)
        rows.append(options.out, made)
        for row in made:
            print(shares.summary(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
