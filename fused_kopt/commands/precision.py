"""`fused-kopt precision`: the same training under every precision policy, beside float64: curves, bytes, bias and error."""

import csv
import platform
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean, stdev

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import fused_kopt
from fused_kopt.commands import demo, experiment
from fused_kopt.commands.common import RefusedError, one_thread, require, writable
from fused_kopt.commands.experiment import CONTROL, OPTIMIZERS, ORACLE, POLICIES, Experiment, Run
from fused_kopt.commands.tasks import TASKS

STEPS, SEEDS, PICTURE = 400, 3, Path("fused_kopt_precision.png")
_EXTRA = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
ABOUT = f"""Train the same small task under every precision policy, and in float64 as the oracle: same first weights, same batches.

Draws loss curves and how far the weights are from the oracle's; prints bytes, bias and error. {CONTROL} is the control: bfloat16
variables and slots, rounded to nearest, without a master. It must lag behind. Runs on the CPU; needs pip install 'fused-kopt[demo]'.
Tasks: digits (scikit-learn's, a small convolutional network), language (Python's own reference, a small transformer).
Example: fused-kopt precision --task language --seeds 5 --output language.svg"""


@dataclass(frozen=True)
class Settings:
    """What `fused-kopt precision` was asked for."""

    task: str = "digits"
    optimizer: str = "adam"
    policies: tuple[str, ...] = tuple(POLICIES)
    steps: int = STEPS
    seeds: int = SEEDS
    output: Path = PICTURE
    """PNG or SVG, by its suffix."""
    rows: Path | None = None
    """A CSV file that a line for each run is added to."""


@dataclass(frozen=True)
class Row:
    """One run in numbers, as `--rows` writes it."""

    date: str
    machine: str
    python: str
    torch: str
    fused_kopt: str
    task: str
    optimizer: str
    steps: int
    policy: str
    seed: int
    elements: int
    rest_bytes: float
    """Of an element: variable, gradient, slots and master."""
    moved_bytes: float
    """Of an element and step."""
    allocated_bytes: float
    """Of an element, as found in memory."""
    bias: float
    error: float
    loss: float
    accuracy: float


def row(run: Run, settings: Settings, date: str) -> Row:
    """A run's numbers, six digits of what was measured."""
    rest, moved = experiment.per_element(run.memory)
    return Row(
        date=date,
        machine=platform.machine(),
        python=platform.python_version(),
        torch=torch.__version__,
        fused_kopt=fused_kopt.__version__,
        task=settings.task,
        optimizer=settings.optimizer,
        steps=settings.steps,
        policy=run.policy,
        seed=run.seed,
        elements=run.memory.elements,
        rest_bytes=rest,
        moved_bytes=moved,
        allocated_bytes=_rounded(run.allocated / run.memory.elements),
        bias=_rounded(run.points[-1].bias),
        error=_rounded(run.points[-1].error),
        loss=_rounded(run.loss),
        accuracy=_rounded(run.accuracy),
    )


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a CSV file, with a header where it is new."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows(([[field.name for field in fields(Row)]] if new else []) + [list(astuple(item)) for item in rows])


def over_seeds(values: Sequence[float], form: str) -> str:
    """A mean, and the standard deviation where there are several."""
    spread = f" ± {format(stdev(values), form.lstrip('+'))}" if len(values) > 1 else ""
    return f"{format(fmean(values), form)}{spread}"


def cells(rows: Sequence[Row], baseline: Sequence[Row]) -> list[str]:
    """A line of the table: what one policy's rows come to. baseline: float32's, by the same seeds; empty where it did not run."""
    some, losses = rows[0], {item.seed: item.loss for item in baseline}
    paired = [item.loss - losses[item.seed] for item in rows if item.seed in losses]
    return [
        some.policy,
        f"{some.rest_bytes:.4g}",
        f"{some.allocated_bytes:.4g}",
        f"{some.moved_bytes:.4g}",
        over_seeds([100 * item.bias for item in rows], "+.2f"),
        over_seeds([100 * item.error for item in rows], ".2g"),
        over_seeds([item.loss for item in rows], ".4f"),
        over_seeds(paired, "+.4f") if paired and some.policy != "float32" else "",
        over_seeds([100 * item.accuracy for item in rows], ".1f"),
    ]


HEADINGS = (
    "policy",
    "at rest,\nB/element",
    "found,\nB/element",
    "a step,\nB/element",
    "bias, %\nof the way",
    "error, %\nof the way",
    "final\nloss",
    "minus\nfloat32's",
    "accuracy,\n%",
)


def by_policy(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows in lists, in order of first appearance."""
    found: dict[str, list[Row]] = {}
    for item in rows:
        found.setdefault(item.policy, []).append(item)
    return found


def report(rows: Sequence[Row], title: str) -> Table:
    """The table of all policies."""
    caption = (
        "bytes of a large variable, gradient included; bias and error of the weights against float64's, in units of the way these went"
    )
    table = Table(title=title, caption=caption)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == HEADINGS[0] else "right")
    found = by_policy(rows)
    for policy, mine in found.items():
        table.add_row(*cells(mine, found.get("float32", [])), style="red" if policy == CONTROL else None)
    return table


def draw(runs: Sequence[Run], title: str, path: Path) -> None:
    """Write loss curves and weight errors, means over the seeds; the same bytes for the same runs."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "fused_kopt", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(11, 4.8), dpi=130, layout="constrained")
        left, right = figure.subplots(1, 2)
        for index, policy in enumerate(dict.fromkeys(run.policy for run in runs)):
            mine = [run for run in runs if run.policy == policy]
            style = {
                "color": "black" if policy == ORACLE else f"C{index}",
                "linestyle": "--" if policy == CONTROL else "-",
                "linewidth": 1.3,
            }
            losses = [demo.smoothed(run.losses, max(1, len(run.losses) // 20)) for run in mine]
            left.plot(range(1, len(losses[0]) + 1), [fmean(each) for each in zip(*losses, strict=True)], label=policy, **style)
            if policy != ORACLE:
                errors = [fmean(point.error for point in each) for each in zip(*(run.points for run in mine), strict=True)]
                right.plot([point.step for point in mine[0].points], errors, label=policy, **style)
        left.set(xlabel="step", ylabel="training loss, mean of the last twentieth", title=title)
        right.set(xlabel="step", ylabel="distance from float64's weights / their way", yscale="log", title="weight error")
        for axes in (left, right):
            axes.grid(True, which="major", linewidth=0.3, alpha=0.6)
        left.legend(fontsize=8, frameon=False)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def measure(settings: Settings, console: Console) -> list[Run]:
    """Every policy and the oracle from every seed."""
    work = Experiment(TASKS[settings.task](), settings.optimizer, settings.steps)
    runs: list[Run] = []
    with one_thread(), Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=settings.seeds * settings.steps * (1 + len(settings.policies)))
        for seed in range(settings.seeds):
            runs += work.run(settings.policies, seed, lambda policy: progress.update(bar, advance=1, description=policy))
    return runs


def main(settings: Settings, console: Console) -> int:
    """Train, print the table, write the picture and the rows. Returns 0.

    Raises RefusedError where a package is missing or the picture cannot be written.
    """
    require("the experiment", _EXTRA)
    if settings.output.suffix not in (".png", ".svg"):
        raise RefusedError(f"--output: must end in .png or .svg. Received: {settings.output}.")
    for path in (settings.output, settings.rows):
        writable((path or settings.output).parent)
    runs = measure(settings, Console(stderr=True))
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    rows = [row(run, settings, date) for run in runs]
    title = f"{settings.task}, {OPTIMIZERS[settings.optimizer][0].__name__}, {settings.steps} steps"
    console.print(report(rows, f"{title}, seeds: {settings.seeds}, elements: {rows[0].elements:,}"))
    draw(runs, title, settings.output)
    console.print(f"curves: {settings.output}", soft_wrap=True)
    if settings.rows is not None:
        append(settings.rows, rows)
    return 0
