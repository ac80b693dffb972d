"""DDP, FSDP1, FSDP2, DCP, ZeRO and accelerate over two ranks: the checks of distributed_checks.py, all in one pair of processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed_checks import CHECKS

Reports = list[dict[str, str]]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """{check: traceback or ""} of each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("distributed_checks.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    files = [folder / f"{rank}.json" for rank in range(2)]
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), folder / "store", file],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, file in enumerate(files)
    ]
    try:
        printed = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(printed)[-5000:]
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks(reports: Reports, check: str) -> None:
    for rank, report in enumerate(reports):
        found = report.get(check, f"not run, since {list(report)[-1]} failed")
        assert not found, f"rank {rank}:\n{found}"
