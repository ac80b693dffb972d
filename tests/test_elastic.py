"""Checkpoints of many ranks: the checks of elastic_checks.py, in processes that it forks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from elastic_checks import CHECKS, SLOW

ALL = [pytest.param(check, marks=pytest.mark.slow) if check in SLOW else check for check in CHECKS]


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """{check: traceback or ""} of the checks that are to run."""
    folder = tmp_path_factory.mktemp("ranks")
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and item.originalname == "test_F9_F14_on_ranks"]
    wanted = [item.callspec.params["check"] for item in items if not item.get_closest_marker("skip")]
    script = Path(__file__).with_name("elastic_checks.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TMPDIR": str(folder)}
    command = [sys.executable, "-W", "error::UserWarning", script, folder / "report.json", *wanted]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, str] = json.loads((folder / "report.json").read_text())
    return found


@pytest.mark.parametrize("check", ALL)
def test_F9_F14_on_ranks(report: dict[str, str], check: str) -> None:
    assert not report[check], report[check]
