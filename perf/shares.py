"""Rows and tables of `python -m perf.distributed`, beside what `fused-kopt plan` would have said."""

import csv
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fused_kopt
from fused_kopt.commands import division, scale
from fused_kopt.commands.division import Job, Zero
from fused_kopt.commands.machines import Topology
from fused_kopt.commands.models import Model
from perf.rows import RESULTS, Provenance, check_header, rounded
from perf.tables import markdown, seconds, size
from perf.wire import Line
from perf.workloads import Sampled, elements

PLANNED: dict[str, Zero] = {"fused_kopt all-reduce": "0", "fused_kopt sharded": "1"}
FOLDER = RESULTS / "distributed"
ALONE = "fused_kopt alone"
SLOT_BYTES = 8  # Adam's two


@dataclass(frozen=True)
class Row(Provenance):
    """One way on one number of ranks. Bytes are those of a step for each rank, on average; times are the slowest rank's, in seconds."""

    cores: int
    load: float
    """Of the machine in the last minute before: processes that want a core, those of other work among them."""
    backend: str
    ranks: int
    provider: str
    workload: str
    sample: str
    tensors: int
    elements: int
    """float32, as gradients and slots are."""
    seconds: float
    seconds_mean: float
    """Means of parts add up to the whole's, also where other work interrupts: plans are made of them, and compared with this one."""
    seconds_p10: float
    seconds_p90: float
    repetitions: int
    state_bytes: int
    """Slots, on the rank that has most."""
    state_ideal: int
    """Slots of all elements, divided by the ranks that share them."""
    sent_bytes: int
    """By what collectives were given."""
    wire_bytes: int
    """By the loopback device, headers included; 0 where GPUs send."""
    planned_state: int
    """What fused-kopt plan says; 0 where it has no such plan."""
    planned_bytes: int
    planned_seconds: float
    fitted: str
    """Collectives' latency and rate, from which seconds were planned."""


class Setting(NamedTuple):
    """What the rows of a number of ranks share."""

    provenance: Provenance
    ranks: int
    workload: str
    sample: Sampled
    backend: str
    load: float


def job(sample: Sampled, ranks: int, zero: Zero) -> Job:
    """The plan's words for what was measured."""
    model = Model("measured", "perf.workloads", (tuple(sample.shapes),), elements(sample.shapes))
    return Job(model, Topology(1, ranks), fused_kopt.Adam(), zero, torch.float32, torch.float32)


def planned(made: Job, backend: str, alone: float, lines: Mapping[str, Line]) -> tuple[int, float]:
    """Bytes on the wire and seconds of a step. alone: seconds of a step on two ranks that sum nothing."""
    local = division.update(replace(made, zero="0")).moved
    total, time = 0.0, alone * (division.update(made).moved + scale.copied(made)) / local
    for one in scale.sent(made):
        kind = one.what.split()[0]
        # gloo reduces whole tensors everywhere, and then keeps a part: its reduce-scatter sends what an all-reduce does
        total += one.link * (2 if kind == "reduce-scatter" and backend == "gloo" else 1)
        time += one.messages * lines[kind].latency + one.link / lines[kind].rate
    return round(total), time


def _line(fitted: tuple[str, Line]) -> str:
    kind, line = fitted
    return f"{kind} {line.latency * 1e6:.0f} us + {line.rate / 1e9:.2f} GB/s"


def rows(found: Mapping[str, Any], earlier: Mapping[int, Mapping[str, Any]], setting: Setting) -> list[Row]:
    """The rows of a number of ranks. earlier: what fewer ranks found, and this one; plans need it of two."""
    made = []
    for name, one in found["found"].items():
        times, ranks = sorted(one["seconds"]), setting.ranks
        zero, plan = PLANNED.get(name), (0, 0, 0.0)
        if zero is not None and ranks > 1 and 2 in earlier:
            mine = job(setting.sample, ranks, zero)
            alone = statistics.mean(earlier[2]["found"][ALONE]["seconds"])
            plan = (division.held(mine).state, *planned(mine, setting.backend, alone, earlier[2]["lines"]))
        shared = 1 if zero == "0" or name == ALONE else ranks
        made.append(
            Row(
                **asdict(setting.provenance) | {"threads": 1},
                cores=len(os.sched_getaffinity(0)),
                load=setting.load,
                backend=setting.backend,
                ranks=ranks,
                provider=name,
                workload=setting.workload,
                sample=setting.sample.sample,
                tensors=len(setting.sample.shapes),
                elements=elements(setting.sample.shapes),
                seconds=rounded(statistics.median(times)),
                seconds_mean=rounded(statistics.mean(times)),
                seconds_p10=rounded(times[len(times) // 10]),
                seconds_p90=rounded(times[len(times) * 9 // 10]),
                repetitions=len(times),
                state_bytes=one["state"],
                state_ideal=-(-SLOT_BYTES * elements(setting.sample.shapes) // shared),
                sent_bytes=one["sent"],
                wire_bytes=round(one["wire"]),
                planned_state=plan[0],
                planned_bytes=plan[1],
                planned_seconds=rounded(plan[2]),
                fitted="; ".join(map(_line, found["lines"].items())),
            )
        )
    return made


def read(path: Path) -> list[Row]:
    """The rows of a file. Raises ValueError where it has other columns."""
    check_header(path, [field.name for field in fields(Row)])
    with path.open(newline="", encoding="utf-8") as file:
        return [Row(**{f.name: f.type(line[f.name]) for f in fields(Row)}) for line in csv.DictReader(file)]  # type: ignore[operator]


def summary(row: Row) -> str:
    """A line for the terminal."""
    plan = f"  planned {row.planned_seconds * 1e3:.1f} ms" if row.planned_seconds else ""
    wire = f"{row.sent_bytes / 2**20:.1f} MiB sent, {row.wire_bytes / 2**20:.1f} on the wire"
    return f"{row.ranks} ranks  {row.provider:24} {row.seconds * 1e3:9.2f} ms  {wire}  state {row.state_bytes / 2**20:.2f} MiB{plan}"


def newest(found: Sequence[Row]) -> list[list[Row]]:
    """The last run of each device and workload."""
    runs: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for row in found:
        runs.setdefault((row.device, row.workload, row.sample), {}).setdefault(row.date, []).append(row)
    return [run[max(run)] for run in runs.values()]


def _caption(run: Sequence[Row]) -> str:
    row = run[0]
    what = f"{row.workload} ({row.sample}): {row.tensors:,} tensors, {row.elements:,} elements"
    machine = f"{row.backend}, {row.cores} cores, {row.threads} thread per rank, load {row.load:.1f} before, torch {row.torch}"
    return f"{row.device} ({what}; {machine}; {row.date[:10]}, {row.commit})"


def compared(run: Sequence[Row]) -> str:
    """Every way over the numbers of ranks: step time, bytes that a rank sends, and its state."""
    counts = sorted({row.ranks for row in run})
    by = {(row.provider, row.ranks): row for row in run}
    lines = [[name, *(_cell(by.get((name, n))) for n in counts)] for name in dict.fromkeys(row.provider for row in run)]
    header = "step: median (fastest tenth); sent by a rank; state of a rank"
    return f"{_caption(run)}\n\n{markdown([header, *(_ranks(n) for n in counts)], lines)}"


def _cell(row: Row | None) -> str:
    return f"{seconds(row.seconds)} ({seconds(row.seconds_p10)}); {size(row.wire_bytes)}; {size(row.state_bytes)}" if row else ""


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count > 1)}"


def _error(plan: str, measured: str, ratio: float) -> str:
    return f"{plan} / {measured}: {ratio - 1:+.1%}"


def against_plan(run: Sequence[Row]) -> str:
    """What was planned, what was measured, and how far the plan was off."""
    lines = []
    for row in run:
        if row.planned_seconds:
            texts = [
                _error(size(row.planned_state), size(row.state_bytes), row.planned_state / row.state_bytes),
                _error(size(row.planned_bytes), size(row.wire_bytes), row.planned_bytes / max(row.wire_bytes, 1)) if row.wire_bytes else "",
                _error(seconds(row.planned_seconds), seconds(row.seconds_mean), row.planned_seconds / row.seconds_mean),
            ]
            lines.append([row.provider, str(row.ranks), *texts])
    fits = {row.fitted for row in run if row.ranks == 2}
    table = markdown(["planned / measured", "ranks", "state of a rank", "sent by a rank", "step, mean"], lines)
    return f"{_caption(run)}. Fitted on 2 ranks: {'; '.join(fits)}\n\n{table}"


def build(folder: Path) -> dict[str, str]:
    """The tables by the names in their markers."""
    runs = newest([row for path in sorted(folder.glob("*.csv")) for row in read(path)])
    tables = {"distributed": compared, "plan": against_plan}
    return {name: "\n\n".join(map(table, runs)) or "No rows yet." for name, table in tables.items()}
