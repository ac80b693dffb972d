"""The programs in clients/: they run, pass a strict type checker, and it reports each line marked `# wrong: code`, and no other."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CLIENTS = sorted((TESTS / "clients").glob("*.py"))

each_client = pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.stem)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What mypy says of all clients, from a folder in which the package is another's."""
    # kept between runs: torch's modules take 15 s
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={TESTS.parent / '.mypy_cache/clients'}"]
    done = subprocess.run([*command, *CLIENTS], cwd=tmp_path_factory.mktemp("elsewhere"), capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


@each_client
def test_a_client_is_typed(report: str, client: Path) -> None:
    found = re.findall(rf"{client.name}:(\d+): error: .*\[([a-z-]+)\]$", report, re.MULTILINE)
    marked = [(str(i), m[1]) for i, line in enumerate(client.read_text().splitlines(), 1) if (m := re.search(r"# wrong: (\S+)$", line))]
    assert marked
    assert found == marked, report


@each_client
def test_a_client_runs(client: Path) -> None:
    runpy.run_path(str(client))
