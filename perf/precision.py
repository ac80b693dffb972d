"""Tables of `fused-kopt precision --rows`, and the command that keeps them: `python -m perf report` fills them into the pages."""

import csv
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from fused_kopt.commands import precision
from fused_kopt.commands.precision import HEADINGS, Row
from perf.rows import RESULTS, check_header
from perf.tables import markdown

FOLDER = RESULTS / "precision"
TASKS = ("digits", "language")


def read(path: Path) -> list[Row]:
    """The rows of a file. Raises ValueError where it has other columns."""
    check_header(path, [field.name for field in fields(Row)])
    with path.open(newline="", encoding="utf-8") as file:
        return [Row(**{f.name: f.type(line[f.name]) for f in fields(Row)}) for line in csv.DictReader(file)]  # type: ignore[operator]


def table(rows: Sequence[Row]) -> str:
    """The last run of the command, below a line that says what it was."""
    if not rows:
        return "No rows yet."
    last = [row for row in rows if row.date == rows[-1].date]
    some, policies = last[0], precision.by_policy(last)
    seeds = len(policies[some.policy])
    what = f"{some.task}, {some.optimizer}, {some.steps} steps, {some.elements:,} elements, seeds: {seeds}"
    facts = f"torch {some.torch}, Python {some.python}, {some.machine}, {some.date[:10]}"
    lines = [precision.cells(mine, policies.get("float32", [])) for mine in policies.values()]
    return f"{what} ({facts})\n\n{markdown([heading.replace(chr(10), ' ') for heading in HEADINGS], lines)}"


def build(folder: Path = FOLDER) -> dict[str, str]:
    """Every table by the name in its marker."""
    return {f"precision-{task}": table(read(path) if (path := folder / f"{task}.csv").exists() else []) for task in TASKS}
