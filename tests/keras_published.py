"""A pytest plugin for runs of Keras's published tests: `fused_kopt.keras` takes the place of Keras's classes, outcomes go to a file."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fused_kopt
from fused_kopt import execute

REPLACED: dict[str, tuple[type, type]] = {}  # name: Keras's class, ours
OUTCOMES: dict[str, tuple[str, int]] = {}  # test: outcome, fused launches


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--classes", choices=("stock", "ours"), required=True)
    parser.addoption("--outcomes", type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    """Before test modules are imported, every module and table of Keras that names one of its classes gets ours."""
    keras: Any = importlib.import_module("keras")
    assert keras.backend.backend() == "torch"
    if config.getoption("--classes") == "stock":
        return
    execute.WORTH_COMPILING = 0  # launches for the smallest steps too
    package: Any = importlib.import_module("fused_kopt.keras")
    ours = {name: value for name, value in vars(package).items() if isinstance(value, type) and hasattr(keras.optimizers, name)}
    REPLACED.update({name: (getattr(keras.optimizers, name), value) for name, value in ours.items()})
    # Keras's own looks a class up by these names, and would make one of its backend's in place of ours
    base: Any = next(cls for cls in keras.optimizers.Optimizer.__mro__ if "__new__" in vars(cls))
    base.__new__ = staticmethod(lambda cls, *_, **__: super(base, cls).__new__(cls))
    spaces = [vars(module) for name, module in sys.modules.items() if name.partition(".")[0] == "keras"]
    tables = [value for space in spaces for value in space.values() if isinstance(value, dict)]  # such as class by lower-case name
    for space in (*spaces, *tables):
        space.update({key: own for key, value in space.items() for stock, own in REPLACED.values() if value is stock})


def pytest_collection_finish(session: pytest.Session) -> None:
    """No test module may have got hold of a class that was to be replaced."""
    for module in {item.getparent(pytest.Module) for item in session.items}:
        assert module is not None
        kept = [name for name, (stock, _) in REPLACED.items() if vars(module.obj).get(name) is stock]
        assert not kept, (module.name, kept)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    before = fused_kopt.stats().launches
    try:
        yield
    finally:
        item.user_properties.append(("launches", fused_kopt.stats().launches - before))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        OUTCOMES[report.nodeid] = report.outcome, dict(report.user_properties).get("launches", 0)  # type: ignore[arg-type]


def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.getoption("--outcomes").write_text(json.dumps(OUTCOMES))
