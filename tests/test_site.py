"""The documentation site: it builds strictly, shows every page as GitHub does, and describes every public name."""

import importlib
import inspect
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from fused_kopt.optimizers import Optimizer

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
(LISTED,) = re.findall(r"^  reference: \[(.*)\]$", (ROOT / ".mkdocs.yml").read_text(), re.MULTILINE)
MODULES = LISTED.split(", ")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ".mkdocs.yml", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def article(page: Path) -> str:
    """A built page without its navigation."""
    (text,) = re.findall(r"<article.*?</article>", page.read_text(encoding="utf-8"), re.DOTALL)
    return str(text)


def names(module: str) -> list[str]:
    """Its `__all__`; without one its own public classes and functions."""
    found = importlib.import_module(module)
    own = [n for n, v in vars(found).items() if n[0] != "_" and (inspect.isclass(v) or inspect.isfunction(v)) and v.__module__ == module]
    return list(getattr(found, "__all__", own))


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_described(site: Path, module: str) -> None:
    text = article(site / "reference" / f"{module}.html")
    assert [name for name in names(module) if f'id="{module}.{name}"' not in text] == []


def test_every_public_module_is_in_the_reference() -> None:
    packages = [importlib.import_module(module) for module in ("fused_kopt", "fused_kopt.optimizers")]
    modules = {value.__name__ for package in packages for n in package.__all__ if inspect.ismodule(value := getattr(package, n))}
    assert len(modules) > 2
    assert modules <= set(MODULES)


def test_the_methods_of_every_optimizer_are_described_once(site: Path) -> None:
    text = article(site / "reference" / "fused_kopt.optimizers.html")
    methods = [n for n in dir(Optimizer) if (n[0] != "_" and inspect.isroutine(getattr(Optimizer, n))) or n in ("weights", "iterations")]
    assert [name for name in methods if text.count(f'id="fused_kopt.optimizers.Optimizer.{name}"') != 1] == []
    assert len(methods) > 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_a_page_shows_what_github_shows(site: Path, page: Path) -> None:
    """The site's Markdown differs from GitHub's where a list follows a paragraph without a blank line, and in nesting."""
    expected = MarkdownIt("commonmark").enable("table").render(page.read_text(encoding="utf-8"))
    built = article(site / page.relative_to(DOCS).with_suffix(".html"))
    kinds = r"<(h[1-6]|li|ol|ul|p|pre|table|tr|img)\b"
    wanted, shown = (Counter(re.findall(kinds, text)) for text in (expected, built))
    wanted["p"], shown["p"] = 0, 0  # a list whose items are apart has paragraphs in one of the two
    assert +shown == +wanted


def test_every_page_and_picture_is_there(site: Path) -> None:
    contents = (site / "index.html").read_text(encoding="utf-8")
    navigation = contents[: contents.index("<article")]
    assert [p for p in PAGES if f'href="{p.relative_to(DOCS).with_suffix(".html").as_posix()}"' not in navigation] == []
    text = "".join(article(file) for file in site.rglob("*.html") if file.name != "404.html")
    pictures = [picture.name for picture in (DOCS / "figures").iterdir()]
    assert pictures
    assert [name for name in pictures if not re.search(rf'<img[^>]+src="[^"]*figures/{name}"', text)] == []
    assert all((site / "figures" / name).exists() for name in pictures)


def test_links_to_the_source_lead_to_its_text(site: Path) -> None:
    assert 'href="source/perf/workloads.py.html"' in article(site / "performance.html")
    assert "def " in re.sub(r"<[^>]+>", "", article(site / "source" / "perf" / "workloads.py.html"))


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loads = r"<(?:script|img|iframe)[^>]+src=\"(https?:[^\"]+)|<link[^>]+rel=\"(?:stylesheet|preconnect)\"[^>]+href=\"(https?:[^\"]+)"
    assert [(f.name, found) for f in site.rglob("*.html") for found in re.findall(loads, f.read_text(encoding="utf-8"))] == []
