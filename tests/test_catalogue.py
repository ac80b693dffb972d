"""Every entry of the failure catalogue (A to D, F) has a test named after it, or a reason why it has none yet."""

import ast
import re
from pathlib import Path

LATER = {
    "A14": "issue 5, float8: slots in 8 bits",
    "A15": "issue 5, float8: devices without it",
    "A16": "issue 5, stochastic rounding",
    "A24": "issue 5, decoupled weight decay",
    "D5": "a GPU in continuous integration: errors that surface in a later operation",
    "D6": "a GPU in continuous integration: gradients from another stream",
    "D8": "a GPU in continuous integration: temporaries on a side stream",
    "D27": "a GPU in continuous integration: one subprocess per fault",
}
ENTRIES = [
    f"{letter}{number}" for letter, count in (("A", 28), ("B", 33), ("C", 18), ("D", 27), ("F", 17)) for number in range(1, count + 1)
]
NAME = re.compile(r"test((?:_[A-DF]\d+)+)_")


def named_by_tests() -> set[str]:
    """The entries that test functions name: test_B15_B16_... is named after two."""
    found: set[str] = set()
    for file in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and (match := NAME.match(node.name)):
                found |= set(match[1].strip("_").split("_"))
    return found


def test_every_entry_is_tested_or_planned_and_not_both() -> None:
    assert len(ENTRIES) == 123
    assert named_by_tests() - set(ENTRIES) == set()
    assert set(ENTRIES) - named_by_tests() - LATER.keys() == set(), "neither tested nor planned"
    assert named_by_tests() & LATER.keys() == set(), "tested: no longer planned"
