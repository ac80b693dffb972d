"""Host time of a step on FSDP2's DTensors: Adam here and torch's fused one, in turns in the same processes. `python -m perf.dtensors`.

The ranks are processes on this machine, with one thread each, over gloo; they share the 33 rows of each parameter unevenly. Timed is
`step()` alone, after a backward pass that left gradients at new addresses. The arithmetic is on the CPU and counts, but is little.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_kopt import torch_optim
from perf import rows, tables
from perf.clocks import CpuClock
from perf.rows import Provenance

FOLDER = rows.RESULTS / "dtensors"
COUNTS = (200, 500)
WARM = 3
INPUTS, OUTPUTS = 16, 33
processes: Any = torch.multiprocessing  # untyped in parts
OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "fused_kopt": lambda parameters: torch_optim.Adam(parameters, lr=1e-3),
    "torch-fused": lambda parameters: torch.optim.Adam(parameters, lr=1e-3, fused=True),
}


@dataclass(frozen=True)
class Row(Provenance):
    """An optimizer on so many DTensors; rank 0's times, in seconds."""

    optimizer: str
    ranks: int
    tensors: int
    elements: int
    """Of the whole parameters."""
    seconds: float
    seconds_p10: float
    seconds_p90: float
    repetitions: int


class Layers(nn.Module):
    """Linear layers side by side: half of the parameters are [33, 16], half [33]."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(INPUTS, OUTPUTS) for _ in range(tensors // 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers]).square().mean()


def measure(tensors: int, repetitions: int) -> dict[str, list[float]]:
    """Seconds of every repetition by optimizer, on this rank of a process group."""
    from torch.distributed.fsdp import fully_shard

    running = {}
    for name, make in OPTIMIZERS.items():
        model = Layers(tensors)
        fully_shard(model)
        running[name] = model, make(model.parameters())
    taken: dict[str, list[float]] = {name: [] for name in running}
    gc.collect()
    gc.freeze()
    for _ in range(WARM + repetitions):
        for name, (model, optimizer) in running.items():
            optimizer.zero_grad()
            model(torch.ones(2, INPUTS)).backward()
            start = time.perf_counter()
            optimizer.step()
            taken[name].append(time.perf_counter() - start)
    gc.unfreeze()
    return {name: seconds[WARM:] for name, seconds in taken.items()}


def work(rank: int, ranks: int, counts: Sequence[int], repetitions: int, folder: str) -> None:
    """One rank: measures, and rank 0 leaves its times in the folder."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timeout)
    found = {count: measure(count, repetitions) for count in counts}
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def row(optimizer: str, ranks: int, tensors: int, seconds: Sequence[float], provenance: Provenance) -> Row:
    """The times with their statistics."""
    ordered, count = sorted(seconds), len(seconds)
    return Row(
        **asdict(provenance),
        optimizer=optimizer,
        ranks=ranks,
        tensors=tensors,
        elements=tensors // 2 * (INPUTS + 1) * OUTPUTS,
        seconds=rows.rounded(statistics.median(ordered)),
        seconds_p10=rows.rounded(ordered[count // 10]),
        seconds_p90=rows.rounded(ordered[count * 9 // 10]),
        repetitions=count,
    )


def run(ranks: int, counts: Sequence[int], repetitions: int, commit: str | None = None) -> list[Row]:
    """Measure in new processes."""
    provenance = replace(rows.provenance(torch.device("cpu"), commit, CpuClock().bandwidth()), threads=1)
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(work, (ranks, tuple(counts), repetitions, folder), nprocs=ranks)
        found = json.loads(Path(folder, "times.json").read_text(encoding="utf-8"))
    return [row(name, ranks, int(count), times, provenance) for count, mine in found.items() for name, times in mine.items()]


def table(found: Sequence[Row]) -> str:
    """The last run of a device, below a line that says what it was."""
    if not found:
        return "No rows yet."
    last = [item for item in found if item.date == found[-1].date]
    lines = []
    for tensors in dict.fromkeys(item.tensors for item in last):
        ours, fused = (next(i for i in last if (i.tensors, i.optimizer) == (tensors, name)) for name in OPTIMIZERS)
        times = [tables.seconds(ours.seconds), tables.seconds(fused.seconds), f"{fused.seconds / ours.seconds:.1f}x"]
        lines.append([f"{tensors}", f"{ours.ranks}", *times])
    some = last[0]
    facts = f"{some.device}, torch {some.torch}, medians of {some.repetitions}, {some.date[:10]}, commit {some.commit}"
    return f"{facts}\n\n{tables.markdown(['DTensors', 'ranks', 'fused_kopt', 'torch fused', 'takes'], lines)}"


def build(folder: Path = FOLDER) -> dict[str, str]:
    """The table by the name in its marker."""
    files = sorted(folder.glob("*.csv"))
    return {"dtensors": "\n\n".join(table(rows.read_as(Row, path)) for path in files) if files else table([])}


def main(arguments: Sequence[str]) -> int:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser("python -m perf.dtensors", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--counts", default=",".join(map(str, COUNTS)), help="comma-separated numbers of DTensors (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=101)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the CSV files (default: %(default)s)")
    parser.add_argument("--commit", help="the commit measured, where this is no git checkout")
    options = parser.parse_args(arguments)
    found = run(options.ranks, [int(count) for count in options.counts.split(",")], options.repetitions, options.commit)
    options.out.mkdir(parents=True, exist_ok=True)
    rows.append(options.out, found)
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
