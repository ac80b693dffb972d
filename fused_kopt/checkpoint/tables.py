"""What matched and what did not, as tables: in messages, and on the command line."""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from torch import Tensor

from fused_kopt.errors import CheckpointError

LONGEST = 30  # rows of a table in a message


class Row(NamedTuple):
    """One weight: what was found for it, and what was expected; "-" for nothing."""

    weight: str
    found: str
    expected: str

    @property
    def fits(self) -> bool:
        """Whether both are the same."""
        return self.found == self.expected


def shown(value: Any) -> str:
    """A tensor, array or shape as "float32 (3, 4)"; anything else as it is."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype} {tuple(value.shape)}"
    return "-" if value is None else str(value)


def rows(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[Row]:
    """One row per name of either, in order of appearance."""
    return [Row(name, shown(found.get(name)), shown(expected.get(name))) for name in dict.fromkeys([*expected, *found])]


def table(lines: Iterable[Row]) -> Table:
    """A table of rows; those that do not fit are red."""
    made = Table("weight", "found", "expected", "")
    for row in lines:
        made.add_row(row.weight, row.found, row.expected, "" if row.fits else "differs", style=None if row.fits else "red")
    return made


def text(rendered: Table) -> str:
    """A table as plain text, 120 columns."""
    stream = io.StringIO()
    Console(file=stream, width=120).print(rendered)
    return stream.getvalue().rstrip()


def refuse_unless(lines: Sequence[Row], message: str) -> None:
    """Raises CheckpointError with the message and a table of the rows that do not fit, if there are any."""
    wrong = [row for row in lines if not row.fits]
    if wrong:
        rest = f"\n... and {len(wrong) - LONGEST} more" if len(wrong) > LONGEST else ""
        raise CheckpointError(f"{message}\n{text(table(wrong[:LONGEST]))}{rest}")
