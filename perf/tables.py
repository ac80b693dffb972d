"""Markdown tables from rows."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from perf.cases import DTYPES, OPTIMIZERS, VARIANTS
from perf.keras3 import STOCK, SUBCLASS
from perf.plan import HEADLINE, PROVIDERS
from perf.rows import Row, on_cpu
from perf.workloads import KERAS3, MODELS, REPLICAS, WORKLOADS, elements

ASSUMED_COPY = 3.0e12  # an H100's, bytes per second, until a run has measured a GPU
REACHED = 0.92  # of the copy's bandwidth: what a prediction expects of one launch
LAUNCH_SECONDS = 5e-6
# bytes per float32 element
MOVED = {12: "SGD", 20: "momentum, RMSprop, Adagrad, Lion", 28: "Adam, Nadam, Adamax, Adadelta, Ftrl"}
SIDE_BY_SIDE = ("10x64", "1000x1024", "5000x64", "25x1M", *HEADLINE.values())
COMPARED = ("fused_kopt", "flattened", "GB/s", "of the stream", "best peer", "takes", "Keras 3 takes")


class Key(NamedTuple):
    """What rows are compared within."""

    device: str
    optimizer: str
    workload: str
    dtype: str
    variant: str

    @property
    def plain(self) -> bool:
        """Whether dtype and variant are the usual ones."""
        return (self.dtype, self.variant) == ("float32", "plain")


class Found(NamedTuple):
    """The rows of one case in one run, by provider key."""

    rows: dict[str, Row]

    @property
    def any(self) -> Row:
        """For what all of them share."""
        return next(iter(self.rows.values()))

    @property
    def ours(self) -> Row:
        """Our best."""
        return min((row for row in self.rows.values() if row.ours), key=lambda row: row.step_seconds)

    @property
    def peer(self) -> Row:
        """The best peer."""
        return min((row for row in self.rows.values() if not row.ours), key=lambda row: row.step_seconds)

    def best(self, provider: str) -> Row | None:
        """A provider's fastest executor, or None."""
        return min((row for row in self.rows.values() if row.provider == provider), key=lambda row: row.step_seconds, default=None)


Cases = dict[Key, Found]


def newest(rows: Sequence[Row], keras3: bool = False) -> Cases:
    """Per case the last run that compares ours with a peer: ratios across runs would compare days, not providers.

    keras3: of Keras 3's classes with ours in their place; otherwise of everything else.
    """
    runs: dict[tuple[Key, str], dict[str, Row]] = {}
    for row in rows:
        if row.keras3 != keras3 and not (keras3 and row.provider == STOCK.name):
            continue
        key = Key(row.device, row.optimizer, row.workload, row.dtype, row.variant)
        runs.setdefault((key, row.date), {})[f"{row.provider}-{row.executor}"] = row
    complete = [(key, date, run) for (key, date), run in runs.items() if {row.ours for row in run.values()} == {True, False}]
    return {key: Found(run) for key, _, run in sorted(complete, key=lambda item: item[1])}


def seconds(value: float) -> str:
    """A time with three digits."""
    scale, unit = (1e6, "us") if value < 0.9995e-3 else (1e3, "ms") if value < 0.9995 else (1, "s")
    return f"{float(f'{value * scale:.3g}'):g} {unit}"


def step(row: Row | None) -> str:
    """A step's time; where the host returns earlier or later than the device is done, its time too."""
    if row is None:
        return ""
    return seconds(row.seconds) + ("" if row.host_seconds == row.seconds else f", host {seconds(row.host_seconds)}")


def size(count: int) -> str:
    """Bytes with three digits."""
    return f"{float(f'{count / 2**20:.3g}'):g} MiB" if count >= 2**20 else f"{count / 1024:.0f} KiB"


def named(name: str, found: Found) -> str:
    """A line's name, with what was left out of its workload."""
    return name if found.any.sample == "all" else f"{name} ({found.any.sample})"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))


def compared(found: Found) -> list[str]:
    """The cells below COMPARED."""
    ours, peer, keras = found.ours, found.peer, found.best("keras")
    own = [step(found.best("fused_kopt")), step(found.best("fused_kopt-flat"))]
    times = [f"{row.step_seconds / ours.step_seconds:.2f}x" if row else "" for row in (peer, keras)]
    return [*own, f"{ours.gb_per_s:.3g}", f"{ours.share_of_copy:.0%}", f"{peer.provider} {peer.executor}: {step(peer)}", *times]


def per_device(cases: Cases, build: Callable[[Cases, str], str]) -> str:
    """A table for each device, below a line that says what ran there. `build` takes a device's cases and headline workload."""
    parts = []
    for device in sorted({key.device for key in cases}):
        own = {key: found for key, found in cases.items() if key.device == device}
        headline = max(HEADLINE.values(), key=lambda name: sum(key.workload == name for key in own))
        some = max((found.any for found in own.values()), key=lambda row: row.date)
        facts = f"{some.threads} threads, torch {some.torch}, stream {some.copy_gb_per_s:.3g} GB/s, {some.date[:10]}, {some.commit}"
        parts.append(f"{device} ({facts})\n\n{build(own, headline)}")
    return "\n\n".join(parts) or "No rows yet."


def rows_for(cases: Cases, keep: Callable[[Key], bool], by: Callable[[Key], str], order: Iterable[str]) -> list[tuple[str, Found]]:
    """The cases that `keep` accepts, named and ordered by a part of their keys."""
    kept = {by(key): found for key, found in cases.items() if keep(key)}
    return [(name, kept[name]) for name in order if name in kept]


def optimizers(cases: Cases, workload: str) -> str:
    """All optimizers on one workload."""
    lines = rows_for(cases, lambda key: key.plain and key.workload == workload, lambda key: key.optimizer, OPTIMIZERS)
    return markdown([f"optimizer on {workload}", *COMPARED], ([named(name, found), *compared(found)] for name, found in lines))


def workloads(cases: Cases, headline: str) -> str:
    """Adam on all workloads."""
    chosen = rows_for(cases, lambda key: key.plain and key.optimizer == "adam", lambda key: key.workload, MODELS + REPLICAS)
    lines = []
    for name, found in chosen:
        some = found.any
        lines.append([name, WORKLOADS[name].title, some.sample, f"{some.tensors:,}", f"{some.elements:,}", *compared(found)])
    return markdown(["", "workload", "sample", "tensors", "elements", *COMPARED], lines)


def variants(cases: Cases, headline: str) -> str:
    """Clipping, gradients at new addresses, and half precision, on Adam."""

    def name(key: Key) -> str:
        return f"{key.workload} {key.dtype} {key.variant}"

    wanted = [f"{w} {d} {v}" for w in WORKLOADS for d in DTYPES for v in VARIANTS]
    repeated = {key.workload for key in cases if not key.plain}
    lines = rows_for(cases, lambda key: key.optimizer == "adam" and key.workload in repeated, name, wanted)
    return markdown(["Adam", *COMPARED], ([named(text, found), *compared(found)] for text, found in lines))


def keras3(cases: Cases, headline: str) -> str:
    """Keras 3's classes and ours in their place."""

    def name(key: Key) -> str:
        return f"{key.workload} {key.optimizer} {key.variant}"

    wanted = [f"{w} {name} {v}" for w in KERAS3 for v in VARIANTS for name in ("adam", *OPTIMIZERS)]
    lines = []
    for text, found in rows_for(cases, lambda key: key.dtype == "float32", name, dict.fromkeys(wanted)):
        ours, peers = found.ours, [found.rows.get(peer.key) for peer in (STOCK, SUBCLASS)]
        times = [cell for peer in peers for cell in (step(peer), f"{peer.step_seconds / ours.step_seconds:.1f}x" if peer else "")]
        lines.append([named(text, found), step(ours), *times])
    return markdown(["`apply`", "fused_kopt.keras", "Keras 3", "takes", "a subclass of it", "takes"], lines)


def providers(cases: Cases, headline: str) -> str:
    """Every provider's step and peak memory on a few workloads, Adam."""
    chosen = rows_for(cases, lambda key: key.plain and key.optimizer == "adam", lambda key: key.workload, dict.fromkeys(SIDE_BY_SIDE))
    lines = []
    for provider in PROVIDERS:
        found = [cells.rows.get(provider.key) for _, cells in chosen]
        if any(found):
            lines.append([provider.key, *(f"{step(row)}, +{size(row.peak_bytes)}" if row else "" for row in found)])
    return markdown(["Adam", *(named(name, found) for name, found in chosen)], lines)


def predicted(moved: float, copy: float) -> float:
    """Seconds that one launch over `moved` bytes should take on a GPU with that copy bandwidth."""
    return moved / (REACHED * copy) + LAUNCH_SECONDS


def predictions(cases: Cases) -> str:
    """Per workload what a GPU should need, and what it needed; before any was measured, for an H100 as others measured it."""
    gpus = sorted({key.device for key in cases if not on_cpu(key.device)})
    if not gpus:
        return _predictions({}, f"H100, copy assumed at {ASSUMED_COPY / 1e12:.3g} TB/s", ASSUMED_COPY)
    parts = []
    for device in gpus:
        own = {key.workload: found for key, found in cases.items() if key.device == device and key.plain and key.optimizer == "adam"}
        copy = max(found.any.copy_gb_per_s for key, found in cases.items() if key.device == device) * 1e9
        parts.append(_predictions(own, f"{device}, copy measured at {copy / 1e12:.3g} TB/s", copy))
    return "\n\n".join(parts)


def _predictions(measured: dict[str, Found], caption: str, copy: float) -> str:
    lines = []
    for name in MODELS:
        size = elements(WORKLOADS[name].shapes)
        whole = measured[name].ours if name in measured and measured[name].any.sample == "all" else None
        times = [seconds(predicted(size * moved, copy)) for moved in MOVED]
        lines.append([name, WORKLOADS[name].title, f"{size:,}", seconds(size * max(MOVED) / copy), *times, step(whole) or "not yet"])
    header = [f"{names} ({moved} bytes)" for moved, names in MOVED.items()]
    return f"{caption}\n\n" + markdown(["", "workload", "elements", "floor at 28 bytes", *header, "Adam, measured"], lines)
