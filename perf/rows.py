"""One row per measurement, appended to a CSV file per device."""

import csv
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, fields
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch

import fused_kopt
from perf import keras3
from perf.cases import Case
from perf.measure import Result

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "perf/results"


@dataclass(frozen=True)
class Provenance:
    """When, of what and on what a run was measured. The date, to the second, is the run's name."""

    date: str
    commit: str
    device: str
    threads: int
    torch: str
    triton: str
    python: str
    fused_kopt: str
    keras: str
    copy_gb_per_s: float
    """The best of a plain stream in this run: triad on CPU, copy on a GPU."""


P = TypeVar("P", bound=Provenance)


@dataclass(frozen=True)
class Row(Provenance):
    """A provider on a case. Times are in seconds; on CPU the host's time is the whole step's."""

    provider: str
    executor: str
    optimizer: str
    workload: str
    sample: str
    dtype: str
    variant: str
    tensors: int
    elements: int
    bytes: int
    """What the step must move: variables and slots read and written once, gradients read once."""
    seconds: float
    seconds_p10: float
    seconds_p90: float
    repetitions: int
    host_seconds: float
    peak_bytes: int
    """Allocated during a step above what is resident before it."""
    gb_per_s: float
    share_of_copy: float

    @property
    def step_seconds(self) -> float:
        """What a training loop waits for: the slower of device and host."""
        return max(self.seconds, self.host_seconds)

    @property
    def ours(self) -> bool:
        """Whether fused_kopt ran it."""
        return self.provider.startswith("fused_kopt")

    @property
    def keras3(self) -> bool:
        """Whether it belongs to the comparison of Keras 3's classes with ours in their place only."""
        return self.provider == keras3.OURS.name or (self.provider, self.executor) == (keras3.SUBCLASS.name, keras3.SUBCLASS.executor)


def row(case: Case, result: Result, provenance: Provenance) -> Row:
    """A measurement with its statistics."""
    seconds = sorted(sample.seconds for sample in result.samples)
    median, moved = statistics.median(seconds), case.bytes(result.provider.slot_bytes(case))
    speed = moved / median / 1e9
    return Row(
        **asdict(provenance),
        provider=result.provider.name,
        executor=result.provider.executor,
        optimizer=case.optimizer,
        workload=case.workload,
        sample=case.sample,
        dtype=str(case.dtype).removeprefix("torch."),
        variant=case.variant,
        tensors=len(case.shapes),
        elements=case.elements,
        bytes=moved,
        seconds=rounded(median),
        seconds_p10=rounded(seconds[len(seconds) // 10]),
        seconds_p90=rounded(seconds[len(seconds) * 9 // 10]),
        repetitions=len(seconds),
        host_seconds=rounded(statistics.median(sample.host_seconds for sample in result.samples)),
        peak_bytes=result.peak_bytes,
        gb_per_s=rounded(speed),
        share_of_copy=rounded(speed / provenance.copy_gb_per_s),
    )


def rounded(value: float) -> float:
    """Four digits: more is noise."""
    return float(f"{value:.4g}")


def slug(device: str) -> str:
    """A device's name as a file's."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def append(folder: Path, rows: Iterable[Provenance]) -> None:
    """Add rows of one kind to their devices' files. Raises ValueError where a file has other columns."""
    for item in rows:
        names = [field.name for field in fields(item)]
        path = folder / f"{slug(item.device)}.csv"
        new = not path.exists()
        if not new:
            check_header(path, names)
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows(([names] if new else []) + [list(astuple(item))])


def read_as(kind: type[P], path: Path) -> list[P]:
    """The rows of a file, in order."""
    types = {field.name: {"int": int, "float": float, "str": str}[getattr(field.type, "__name__", "str")] for field in fields(kind)}
    check_header(path, list(types))
    with path.open(newline="", encoding="utf-8") as file:
        return [kind(**{name: types[name](value) for name, value in line.items()}) for line in csv.DictReader(file)]


def read(path: Path) -> list[Row]:
    """The steps of all providers that a file has, in order."""
    return read_as(Row, path)


def read_all(folder: Path) -> list[Row]:
    """The rows of all devices."""
    return [item for path in sorted(folder.glob("*.csv")) for item in read(path)]


def check_header(path: Path, names: list[str]) -> None:
    """Raises ValueError unless the file's columns are these."""
    with path.open(newline="", encoding="utf-8") as file:
        header = next(csv.reader(file), [])
    if header != names:
        raise ValueError(f"{path} has other columns than this version writes. Received: {header}. Expected: {names}.")


def provenance(device: torch.device, commit: str | None, bytes_per_second: float) -> Provenance:
    """Of a run that starts now; `commit` where the folder is no git checkout."""
    return Provenance(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=commit or git_commit(),
        device=device_name(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        triton=version("triton") if find_spec("triton") else "none",
        python=platform.python_version(),
        fused_kopt=fused_kopt.__version__,
        keras=version("keras") if find_spec("keras") else "none",
        copy_gb_per_s=rounded(bytes_per_second / 1e9),
    )


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with the cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def on_cpu(device: str) -> bool:
    """Whether a device's name is a CPU's."""
    return device.endswith(" cores")


def git_commit() -> str:
    """The commit measured, with -dirty where the code is not it; results and documents do not count."""
    try:
        commit = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":!perf/results", ":!docs", ":!README.md")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
