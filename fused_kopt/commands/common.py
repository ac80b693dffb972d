"""What several commands need: how to refuse, where to write, which thread count."""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch

from fused_kopt import execute
from fused_kopt.execute import Executor


class RefusedError(Exception):
    """An impossible request; its text says why and how to mend it. The command line prints it and exits with code 2."""


def why_not(executor: Executor) -> str | None:
    """Why an executor is unavailable on this machine, or None."""
    if executor == "compiled":
        return execute.why_not_compiled(torch.device("cpu"))
    return execute.why_not_triton() if executor == "triton" else None


def require(command: str, packages: dict[str, str]) -> None:
    """Refuse where modules (their names, and those of their packages) of the `demo` extra are not installed."""
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise RefusedError(f"{command} needs {' and '.join(missing)}: pip install 'fused-kopt[demo]'")


def writable(out: Path) -> None:
    """Make the output directory now, not after the work."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RefusedError(f"--out: {error}") from error


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch with one CPU thread: on small tensors a second gains nothing, and took 15 times as long on shared cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
