"""The mutation run: every wrong version of the source must fail a test. `python tests/mutants.py [--jobs 2] [--only NAME]`."""

import argparse
import ast
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from mutations import RULES, Mutation
from mutations_cpp import CPP
from mutations_engine import ENGINE
from mutations_kernel import KERNEL
from mutations_offload import OFFLOAD
from mutations_paths import PATHS
from mutations_ranks import RANKS
from mutations_reports import REPORTS
from mutations_scale import SCALE
from mutations_stats import STATS
from mutations_torch import TORCH
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
MUTATIONS = (*RULES, *KERNEL, *ENGINE, *PATHS, *CPP, *REPORTS, *STATS, *SCALE, *TORCH, *RANKS, *OFFLOAD)
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "demo-out")
# Style and this list itself fail on any edit; packages and documents do not run the code; machine code where it is named.
NOT_ASKED = {"test_style.py", "test_mutants.py", "test_docs.py", "test_packaging.py", "test_site.py", "test_machine_code.py"}
SECONDS = 900  # a mutant that hangs is noticed


class Outcome(NamedTuple):
    """A mutation with the test that noticed it, or None."""

    mutation: Mutation
    killer: str | None
    seconds: float


def spans(mutation: Mutation, text: str) -> list[tuple[int, int]]:
    """Where in a file's text the functions or classes begin and end that a mutation may edit."""
    if not mutation.where:
        return [(0, len(text))]
    starts = [0, *itertools.accumulate(len(line) for line in text.splitlines(keepends=True))]
    named = [node for node in ast.walk(ast.parse(text)) if getattr(node, "name", None) == mutation.where and hasattr(node, "body")]
    return [(starts[node.lineno - 1], starts[node.end_lineno]) for node in named]  # type: ignore[attr-defined]


def mutated(mutation: Mutation, root: Path = ROOT) -> str:
    """The file's text with the edit; LookupError unless the old text occurs exactly once."""
    text = (root / mutation.file).read_text()
    places = [at for start, end in spans(mutation, text) for at in range(start, end) if text.startswith(mutation.old, at)]
    if len(places) != 1:
        raise LookupError(f"{mutation.name}: {mutation.old!r} occurs {len(places)} times in {mutation.file} {mutation.where}")
    return text[: places[0]] + mutation.new + text[places[0] + len(mutation.old) :]


@contextmanager
def workshop(source: Path = ROOT) -> Iterator[Path]:
    """A copy of the repository."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "repository"
        shutil.copytree(source, root, symlinks=True, ignore=NOT_COPIED)
        yield root


def pytest(root: Path, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run pytest on a copy, which is imported before the editable install."""
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    try:
        return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, -1, "FAILED timeout\n", "")


def failures(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The tests that failed; RuntimeError where pytest could not run any."""
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode < 0:  # an access out of bounds ends the process
        return [f"signal {-done.returncode}"]
    if done.returncode and not failed:
        raise RuntimeError(f"{shlex.join(done.args)}: {done.stdout[-2000:]}{done.stderr[-1000:]}")
    return failed


def rest(root: Path) -> list[str]:
    """The test files that run against every mutation."""
    return sorted(f"tests/{path.name}" for path in (root / "tests").glob("test_*.py") if path.name not in NOT_ASKED)


def asked(mutation: Mutation) -> Iterator[list[str]]:
    """The pytest arguments of the runs that a mutation names."""
    for run in mutation.tests.split(";"):
        yield [f"tests/{part}" if part.startswith("test_") else part for part in shlex.split(run)]


def attempt(mutation: Mutation, source: Path = ROOT, thorough: bool = True, known: Sequence[str] = ()) -> Outcome:
    """Run the tests that are likely to notice, then (if thorough) all others. `known` fail without any mutation."""
    start = time.monotonic()
    with workshop(source) as root:
        (root / mutation.file).write_text(mutated(mutation, root))
        runs = [*asked(mutation), *([rest(root)] if thorough else [])]
        found = (failures(pytest(root, ["-x", *(f"--deselect={name}" for name in known), *run])) for run in runs)
        killers = next(filter(None, found), None)
    return Outcome(mutation, killers[0].removeprefix("tests/") if killers else None, time.monotonic() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="part of a mutation's name or file")
    parser.add_argument("--quick", action="store_true", help="only the tests named with each mutation")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if options.only in f"{m.name} {m.file}"]
    console, table = Console(), Table("mutation", "file", "noticed by", "s")
    survivors = 0
    with workshop() as source, ThreadPoolExecutor(options.jobs) as pool:
        files = {part for m in chosen for run in asked(m) for part in run if part.startswith("tests/")}
        known = failures(pytest(source, sorted(files if options.quick else files | set(rest(source)))))
        console.print(f"{len(known)} tests fail without mutations: {known}", highlight=False)
        for mutation, killer, seconds in pool.map(lambda m: attempt(m, source, not options.quick, known), chosen):
            survivors += killer is None
            table.add_row(mutation.name, mutation.file, killer or "[red]survived[/red]", f"{seconds:.0f}")
            console.print(mutation.name, killer or "SURVIVED", f"{seconds:.0f} s", sep=" | ", highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    console.print(f"{len(chosen) - survivors} of {len(chosen)} noticed")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
