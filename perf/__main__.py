"""The command line: `python -m perf` measures, `python -m perf report` draws the figures and fills the tables."""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from perf import plan, rows, run
from perf.cases import DTYPES, OPTIMIZERS, VARIANTS
from perf.plan import Entry
from perf.workloads import WORKLOADS

BUDGET = 600.0
EPILOG = f"""Without --optimizers, --workloads, --dtype and --variants a default plan is measured; with one of them, all their combinations.

providers: {", ".join(provider.key for provider in plan.PROVIDERS)}
optimizers: {", ".join(OPTIMIZERS)}
workloads: {", ".join(WORKLOADS)}

examples:
  python -m perf                                              the default plan, about {BUDGET / 60:.0f} minutes on CPU
  python -m perf --optimizers adam,sgd --workloads 1x25M      two optimizers on one tensor
  python -m perf --providers 'fused_kopt-*,torch-fused' --workloads W1,W5 --sample 8
  python -m perf report                                       figures and tables from the rows
exit codes: 0 success, 1 one of fused_kopt's own providers failed, 2 a wrong request"""


def names(text: str, allowed: Sequence[str], what: str) -> list[str]:
    """A comma-separated choice; ValueError for a name that does not exist."""
    chosen = text.split(",")
    wrong = [name for name in chosen if name not in allowed]
    if wrong:
        raise ValueError(f"Unknown {what}. Received: {', '.join(wrong)}. Allowed: {', '.join(allowed)}.")
    return chosen


def parser() -> argparse.ArgumentParser:
    """The options of a measurement."""
    made = argparse.ArgumentParser(
        "python -m perf", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--providers", default="*", help="comma-separated keys, with * and ? (default: all that run here)")
    made.add_argument("--optimizers", help="comma-separated (default: the plan's, else adam)")
    made.add_argument("--workloads", help="comma-separated (default: the plan's, else all)")
    made.add_argument(
        "--dtype", help=f"comma-separated, of {', '.join(DTYPES)}: of variables and gradients (default: the plan's, else float32)"
    )
    made.add_argument("--variants", help=f"comma-separated, of {', '.join(VARIANTS)} (default: the plan's, else plain)")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    made.add_argument(
        "--sample", type=int, help="take about one element in so many, a power of two; reduced further only where memory is short"
    )
    made.add_argument(
        "--budget-seconds", type=float, default=BUDGET, help="samples workloads and drops the last cases (default: %(default)s)"
    )
    made.add_argument("--out", type=Path, default=rows.RESULTS, help="folder of the CSV files (default: %(default)s)")
    made.add_argument("--commit", help="the commit measured, where this is no git checkout")
    return made


def entries(options: argparse.Namespace, device: torch.device) -> list[Entry]:
    """The cases asked for: the default plan, or combinations."""
    asked = (options.optimizers, options.workloads, options.dtype, options.variants)
    if not any(asked):
        return plan.default_plan(device)
    dtypes = [DTYPES[name] for name in names(options.dtype or "float32", list(DTYPES), "dtype")]
    combined = itertools.product(
        names(options.workloads or ",".join(WORKLOADS), list(WORKLOADS), "workload"),
        names(options.optimizers or "adam", OPTIMIZERS, "optimizer"),
        dtypes,
        names(options.variants or "plain", VARIANTS, "variant"),
    )
    return [Entry(optimizer, workload, dtype, variant, plan.EVERY) for workload, optimizer, dtype, variant in combined]


def main(arguments: Sequence[str]) -> int:
    """Measure or report; returns the exit code."""
    if arguments[:1] == ["report"]:
        from perf import report  # matplotlib may be missing where only measurements are made

        report.main(arguments[1:])
        return 0
    made = parser()
    options = made.parse_args(arguments)
    device = torch.device(options.device)
    try:
        if options.sample is not None and (options.sample < 1 or options.sample & (options.sample - 1)):
            raise ValueError(f"--sample must be a power of two. Received: {options.sample}.")
        wanted, providers = entries(options, device), plan.select(options.providers.split(","))
    except ValueError as error:
        made.error(str(error))
    started = run.start(device, options.out, options.sample, options.budget_seconds, options.commit)
    print(f"{started.provenance}\n{len(wanted)} cases, rows to {options.out}", flush=True)
    started.execute(wanted, providers)
    if started.failed:
        print(f"FAILED: {', '.join(sorted(started.failed))}")
    return 1 if started.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
