"""A command's exit code and what it printed."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Result(NamedTuple):
    code: Any
    out: str
    err: str

    @property
    def rows(self) -> list[list[str]]:
        """The cells of the printed tables' lines."""
        return [[cell.strip() for cell in line.split("│")[1:-1]] for line in self.out.splitlines() if line.startswith("│")]


Run = Callable[..., Result]
