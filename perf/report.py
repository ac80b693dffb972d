"""The report: figures, and the tables between `<!-- perf:NAME -->` and `<!-- /perf -->`."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from perf import dtensors, precision, rows, shares, tables
from perf.rows import ROOT, Row

DOCS = ("performance.md", "mixed-precision.md", "plan.md", "hosts/torch.md")
PAGES = (ROOT / "README.md", *(ROOT / "docs" / page for page in DOCS))
FIGURES = ROOT / "docs/figures"
MARKED = re.compile(r"(<!-- perf:([\w-]+) -->\n).*?(<!-- /perf -->)", re.DOTALL)


def build(found: Sequence[Row]) -> dict[str, str]:
    """Every table by the name in its marker."""
    cases = tables.newest(found)
    return {
        "optimizers": tables.per_device(cases, tables.optimizers),
        "small": tables.per_device(cases, lambda own, _: tables.optimizers(own, "5000x64")),
        "workloads": tables.per_device(cases, tables.workloads),
        "variants": tables.per_device(cases, tables.variants),
        "providers": tables.per_device(cases, tables.providers),
        "keras3": tables.per_device(tables.newest(found, keras3=True), tables.keras3),
        "predictions": tables.predictions(cases),
        **precision.build(),
        **dtensors.build(),
        **shares.build(shares.FOLDER),
    }


def filled(text: str, built: dict[str, str]) -> str:
    """A page with its tables replaced. Raises ValueError for a marker without table."""
    unknown = [name for _, name, _ in MARKED.findall(text) if name not in built]
    if unknown:
        raise ValueError(f"Unknown marker. Received: perf:{unknown[0]}. Tables: {', '.join(built)}.")
    return MARKED.sub(lambda match: f"{match[1]}{built[match[2]]}\n{match[3]}", text)


def main(arguments: Sequence[str]) -> None:
    """Draw and fill from the committed rows."""
    from perf import figures  # so that tables need no matplotlib

    parser = argparse.ArgumentParser("python -m perf report", description=__doc__)
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="folder of the CSV files (default: %(default)s)")
    found = rows.read_all(parser.parse_args(arguments).results)
    built = build(found)
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8"), built), encoding="utf-8")
    for path in (*PAGES, *figures.draw(tables.newest(found), FIGURES)):
        print(path.relative_to(ROOT))
