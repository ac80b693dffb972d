"""What `fused-kopt doctor` says of installed packages: versions against requirements, extras, Keras's backend."""

import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from typing import Literal, NamedTuple

from packaging.requirements import Requirement

import fused_kopt

PACKAGE = "fused-kopt"
DEVELOPERS = ("bench", "docs", "test")  # extras that no user misses
SECONDS = 120  # to import Keras and its backend, which takes 4


class Finding(NamedTuple):
    """One line of the report."""

    what: str
    found: str
    verdict: Literal["ok", "attention", "problem"] = "ok"
    mend: str = ""


def packages() -> Iterator[Finding]:
    """This package, Python, what is required, the extras, Keras's backend."""
    try:
        installed = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        mend = "run pip install . in its folder; only then are the versions of other packages checked"
        yield Finding("fused_kopt", f"{fused_kopt.__version__}, not installed", "attention", mend)
        yield from (Finding(name, _version(name) or "missing") for name in ("torch", "numpy", "triton"))
        return
    yield _self(installed)
    wanted = [Requirement(text) for text in installed.requires or ()]
    for requirement in (r for r in wanted if _applies(r, "")):
        version = _version(requirement.name)
        yield _required(requirement, version, "problem")
    for extra in installed.metadata.get_all("Provides-Extra") or ():
        if extra not in DEVELOPERS:
            yield from _extra(extra, [r for r in wanted if not _applies(r, "") and _applies(r, extra) and r.name != PACKAGE])
    if find_spec("keras") is not None:
        yield _keras()


def _self(installed: metadata.Distribution) -> Finding:
    if installed.version != fused_kopt.__version__:
        found = f"{fused_kopt.__version__} is imported, {installed.version} is installed"
        return Finding("fused_kopt", found, "attention", "reinstall it, or remove the other copy from PYTHONPATH and this folder")
    return Finding("fused_kopt", fused_kopt.__version__)


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _required(requirement: Requirement, version: str | None, otherwise: Literal["attention", "problem"]) -> Finding:
    install = f"pip install '{requirement.name}{requirement.specifier}'"
    if version is None:
        return Finding(requirement.name, "missing", otherwise, install)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(requirement.name, f"{version}, needs {requirement.specifier}", otherwise, install)
    return Finding(requirement.name, version)


def _extra(extra: str, wanted: list[Requirement]) -> Iterator[Finding]:
    """One line for an extra, and one for each of its packages that is too old. What is absent is no fault."""
    versions = {requirement.name: _version(requirement.name) for requirement in wanted}
    missing = [name for name, version in versions.items() if version is None]
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    if missing:
        found = f"{found + '; ' if found else ''}without {', '.join(missing)} (pip install '{PACKAGE}[{extra}]')"
    yield Finding(f"extra {extra}", found or "nothing to install here")
    checked = (_required(r, versions[r.name], "attention") for r in wanted if versions[r.name] is not None)
    yield from (finding for finding in checked if finding.verdict != "ok")


def _keras() -> Finding:
    """The backend that `import keras` takes, found out in a process of its own: an import cannot be undone."""
    command = [sys.executable, "-c", "import keras; print(keras.backend.backend())"]
    mend = 'KERAS_BACKEND=torch before Keras is imported, or "backend": "torch" in ~/.keras/keras.json'
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return Finding("keras backend", f"unknown: the import took more than {SECONDS} s", "attention", mend)
    backend, errors = done.stdout.strip(), done.stderr.strip().splitlines()
    if done.returncode:
        return Finding("keras backend", f"Keras does not import: {errors[-1] if errors else done.returncode}", "attention", mend)
    verdict: Literal["ok", "attention"] = "ok" if backend == "torch" else "attention"
    return Finding("keras backend", backend, verdict, "" if verdict == "ok" else f"for PyTorch tensors: {mend}")
