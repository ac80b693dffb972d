"""A rank dies (SIGKILL) or stops (SIGSTOP) at a random moment: the others raise in time, with a state of whole steps."""

import json
import subprocess
import sys
from pathlib import Path

import failing_ranks
import pytest


@pytest.mark.parametrize("how", ["replicated", "sharded"])
@pytest.mark.parametrize(("trials", "seed"), [(2, 1000), pytest.param(100, 0, marks=pytest.mark.slow)])
def test_F5_F6_F13_survivors_raise_and_have_whole_steps(tmp_path: Path, trials: int, seed: int, how: str) -> None:
    script = Path(__file__).with_name("failing_ranks.py")
    arguments = [sys.executable, script, str(trials), str(seed), how, tmp_path / "history"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=30 * trials + 120)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == trials
    assert [trial for trial in found if trial["wrong"]] == []
    # the timeout, and a second for each of two ranks that hear of it from each other
    assert max(trial["seconds"] for trial in found) < failing_ranks.TIMEOUT + 2
    assert sum(min(trial["steps"]) < failing_ranks.STEPS for trial in found) >= trials / 2  # most were hit in the middle
