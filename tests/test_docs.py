"""README and docs: their Python runs, their links resolve, and they name what the package has."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_kopt
from fused_kopt import optimizers
from fused_kopt.optimizers import Optimizer, registry, schedules

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SKIPPED = re.compile(r"<!-- skip: \S[^>]*-->\n$")
LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
CLASSES = [cls for name in optimizers.__all__ if inspect.isclass(cls := getattr(optimizers, name)) and cls is not Optimizer]
SCHEDULES = [
    name for name, value in vars(schedules).items() if inspect.isclass(value) and issubclass(value, schedules.LearningRateSchedule)
]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(page: Path, language: str) -> list[tuple[int, str, bool]]:
    """(line before the first, text, whether a comment says to skip it) of every block in a language."""
    text = page.read_text(encoding="utf-8")
    found = [m for m in FENCE.finditer(text) if m[1] == language]
    return [(text.count("\n", 0, m.start(2)), m[2], bool(SKIPPED.search(text[: m.start()]))) for m in found]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What headings can be linked as: lower case, punctuation dropped, spaces as hyphens."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def arguments(page: Path) -> list[tuple[str, str]]:
    """(argument, default) of the rows in the table under "Arguments"."""
    section = prose(page).split("\n## Arguments\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", section, re.MULTILINE)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore:.*many workers", "ignore:'pin_memory'")  # the hosts' own
@pytest.mark.usefixtures("one_thread")
@each_page
def test_python_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))  # a page may register a class
    namespace: dict[str, Any] = {"__name__": page.stem}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for line, code, skipped in blocks(page, "python"):
            if not skipped:  # compiled at its place in the page, so that a traceback points there
                exec(compile("\n" * line + code, page, "exec"), namespace)


@each_page
def test_links_and_anchors_resolve(page: Path) -> None:
    broken = []
    for target in LINK.findall(prose(page)):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_every_page_is_in_the_contents() -> None:
    listed = {(DOCS / link.partition("#")[0]).resolve() for link in LINK.findall(prose(DOCS / "index.md"))}
    assert set(PAGES[1:]) - {DOCS / "index.md"} <= listed


@pytest.mark.parametrize("name", sorted({*fused_kopt.__all__, *optimizers.__all__, *SCHEDULES} - {"_Decay"}))
def test_every_public_name_is_in_the_docs(name: str) -> None:
    assert any(re.search(rf"\b{name}\b", page.read_text(encoding="utf-8")) for page in PAGES[1:])


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_the_table_of_arguments_is_the_signature(cls: type[Optimizer]) -> None:
    parameters = list(inspect.signature(cls).parameters.values())
    expected = [(p.name, repr(p.default)) for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    assert arguments(DOCS / "optimizers" / f"{cls.__name__.lower()}.md") == expected


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_the_slots_of_a_page_are_those_of_the_class(cls: type[Optimizer]) -> None:
    page = prose(DOCS / "optimizers" / f"{cls.__name__.lower()}.md")
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| (?:always|with momentum|if \w+) \|$", page, re.MULTILINE)
    switches = {"momentum": 0.9, "amsgrad": True, "centered": True}
    options = {key: value for key, value in switches.items() if key in inspect.signature(cls).parameters}
    assert rows == [slot.name for group in cls(**options).slot_groups() for slot in group]


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in ("_Decay", "LearningRateSchedule")])
def test_the_signatures_of_schedules(name: str) -> None:
    (shown,) = re.findall(rf"^\| `{name}(\(.*?\))` \|", prose(DOCS / "keras.md"), re.MULTILINE)
    parameters = inspect.signature(getattr(schedules, name)).parameters.values()
    assert shown == f"({', '.join(p.name if p.default is p.empty else f'{p.name}={p.default!r}' for p in parameters)})"


def test_the_readme_starts_with_two_commands_of_one_line() -> None:
    demo, tests = (text for _, text, _ in blocks(ROOT / "README.md", "bash")[:2])  # .ci/run executes the second
    assert demo.count("\n") == tests.count("\n") == 1
    assert "fused-kopt demo" in demo
    assert "pytest" in tests
