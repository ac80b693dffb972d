"""What the site adds to the pages: navigation from index.md, a reference from docstrings, and the files that pages link to."""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"(?<=\]\()((?:\.\./)+[^()\s#]+)")  # as tests/test_docs.py finds them, of those that go up
SECTIONS = {"hosts": "Where you train", "migrate": "Migrate", "optimizers": "Optimizers"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation: every page that index.md links, in its order and under its words, by folder."""
    contents = (Path(config.docs_dir) / "index.md").read_text(encoding="utf-8")
    sections: dict[str, list[dict[str, str]]] = {}
    for title, page in dict.fromkeys(re.findall(r"\[([^]]+)\]\(([\w./-]+\.md)\)", contents)):
        folder = page.rpartition("/")[0]
        sections.setdefault(SECTIONS.get(folder, folder), []).append({title: page})
    reference = [{module: f"reference/{module}.md"} for module in config.extra["reference"]]
    nav: list[Any] = [{"Contents": "index.md"}, *sections.pop("", [])]
    config.nav = [*nav, *({name: pages} for name, pages in sections.items()), {"Reference": reference}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Generated pages: one per public module, one per file outside docs/ that a page links to."""
    root, docs = Path(config.config_file_path).parent, Path(config.docs_dir)
    seen: dict[str, str] = {}
    for module in config.extra["reference"]:
        text = _reference(griffe.load(module, search_paths=[root]), seen, config.extra["whole"])
        files.append(File.generated(config, f"reference/{module}.md", content=text))
    for page in list(files.documentation_pages()):
        for target in LINK.findall(page.content_string):
            path = _outside(docs, page.src_uri, target)
            if path and f"source/{path}.md" not in files.src_uris:
                files.append(File.generated(config, f"source/{path}.md", content=_source(root / path, path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links out of docs/ lead to the generated pages."""
    up = "../" * page.file.src_uri.count("/")

    def inside(found: re.Match[str]) -> str:
        path = _outside(Path(config.docs_dir), page.file.src_uri, found[1])
        return f"{up}source/{path}.md" if path else found[1]

    return LINK.sub(inside, markdown)


def _outside(docs: Path, page: str, target: str) -> str | None:
    """The path of a link's target from the repository's root; None for a page of the site."""
    file = (docs / page).parent.joinpath(target).resolve()
    return None if file.is_relative_to(docs) else file.relative_to(docs.parent).as_posix()


def _source(file: Path, path: str) -> str:
    """A file as a page, or a folder's names."""
    if file.is_dir():
        return "\n".join([f"# {path}/", "", *(f"- `{entry.name}`" for entry in sorted(file.iterdir()))])
    return f"---\nsearch: {{exclude: true}}\n---\n# {path}\n\n````{file.suffix[1:]}\n{file.read_text(encoding='utf-8')}\n````\n"


def _reference(module: Any, seen: dict[str, str], whole: list[str]) -> str:
    """A page of a module's public names. seen: canonical path to the name under which it is described already."""
    names = module.exports or [n for n, m in module.members.items() if m.is_public and (m.is_class or m.is_function) and not m.is_alias]
    parts = [f"# {module.path}", module.docstring.value if module.docstring else ""]
    for name in names:
        path, member = f"{module.path}.{name}", module[name]
        first = seen.setdefault(member.canonical_path, path)
        options = "\n    options:\n      inherited_members: true" if path in whole else ""
        if member.is_module:
            parts.append(f"## `{name}` {{#{path}}}\n\nA module: [{member.canonical_path}]({member.canonical_path}.md).")
        else:
            parts.append(f"::: {path}{options}" if first == path else f"## `{name}` {{#{path}}}\n\nThe same as [`{first}`][{first}].")
    return "\n\n".join(parts) + "\n"
