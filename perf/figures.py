"""Figures from rows: achieved bandwidth against the stream's, and host time over the number of tensors."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from perf.cases import OPTIMIZERS
from perf.plan import HEADLINE
from perf.rows import slug
from perf.tables import Cases
from perf.workloads import SWEEP, WORKLOADS

COLORS = {
    "fused_kopt": "#d62728",
    "fused_kopt-flat": "#ff7f0e",
    "torch-foreach": "#7fa6c9",
    "torch-fused": "#1f77b4",
    "torch-compile": "#17becf",
    "torch-graph": "#0b3c5d",
    "keras-torch": "#8c564b",
    "optimi-loop": "#98df8a",
    "optimi-triton": "#2ca02c",
    "flashoptim-triton": "#9467bd",
}
LABELS = {"fused_kopt": "fused_kopt", "fused_kopt-flat": "fused_kopt, flattened", "keras-torch": "Keras 3 on torch"}
SWEPT = ("fused_kopt", "fused_kopt-flat", "torch-fused", "torch-foreach", "torch-graph")


def series(found: Any) -> dict[str, Any]:
    """Rows by the name of a line: a peer's executors one by one, of ours the best that borrows and the best that is flat."""
    rows = {key: row for key, row in found.rows.items() if not row.ours}
    own = {name: found.best(name) for name in ("fused_kopt", "fused_kopt-flat")}
    return {name: row for name, row in (own | rows).items() if row is not None and name in COLORS}


def roofline(cases: Cases, device: str) -> Figure:
    """GB/s of each optimizer and provider; the line is what a plain stream reaches."""
    plain = {key: found for key, found in cases.items() if key.device == device and key.plain}
    headline = max(HEADLINE.values(), key=lambda name: sum(key.workload == name for key in plain))
    rows = {key.optimizer: series(found) for key, found in plain.items() if key.workload == headline}
    names = [name for name in OPTIMIZERS if name in rows]
    figure, axes = blank()
    stream = max((row.copy_gb_per_s for found in rows.values() for row in found.values()), default=0.0)
    axes.axhline(stream, color="black", linewidth=1)
    axes.annotate(f"a plain stream: {stream:.3g} GB/s", (0, stream), xytext=(0, 3), textcoords="offset points", fontsize=8)
    for name, color in COLORS.items():
        points = [(at, rows[optimizer][name].gb_per_s) for at, optimizer in enumerate(names) if name in rows[optimizer]]
        if points:
            size = 60 if name.startswith("fused_kopt") else 28
            axes.scatter(*zip(*points, strict=True), color=color, s=size, label=LABELS.get(name, name), zorder=3)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("GB/s that the step must move")
    axes.set_title(f"{WORKLOADS[headline].title}, float32, {device}", fontsize=10)
    axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
    return figure


def host_time(cases: Cases, device: str) -> Figure:
    """Time until the call returns, over the number of tensors of 64 elements."""
    found = {key.workload: series(value) for key, value in cases.items() if key.device == device and key.plain and key.optimizer == "adam"}
    figure, axes = blank()
    for name in SWEPT:
        rows = [found[workload][name] for workload in SWEEP if workload in found and name in found[workload]]
        points = [(row.tensors, row.host_seconds * 1e6) for row in rows]
        if points:
            axes.plot(*zip(*points, strict=True), color=COLORS[name], marker="o", label=LABELS.get(name, name))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("tensors of 64 elements")
    axes.set_ylabel("microseconds until an Adam step returns")
    axes.set_title(device, fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    return figure


def blank() -> tuple[Figure, Any]:
    """An empty figure with one pair of axes."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes: Any = figure.subplots()
    axes.grid(axis="y", color="#dddddd", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw(cases: Cases, folder: Path) -> list[Path]:
    """Both figures of every device, the same bytes for the same rows."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with mpl.rc_context({"svg.hashsalt": "perf", "svg.fonttype": "none", "font.family": "sans-serif"}):
        for device in sorted({key.device for key in cases}):
            for name, build in (("roofline", roofline), ("host-time", host_time)):
                path = folder / f"{name}-{slug(device)}.svg"
                build(cases, device).savefig(path, metadata={"Date": None})
                drawn.append(path)
    return drawn
