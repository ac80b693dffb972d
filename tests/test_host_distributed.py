"""DDP, FSDP1, FSDP2, DCP, ZeRO and accelerate over two and four ranks: the checks of distributed_checks.py, each number of ranks in
processes of its own."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from distributed_checks import CHECKS

Reports = list[dict[str, str]]


def run(folder: Path, ranks: int) -> Reports:
    """{check: traceback or ""} of each rank."""
    script = Path(__file__).with_name("distributed_checks.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    files = [folder / f"{rank}.json" for rank in range(ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(ranks), folder / "store", file],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, file in enumerate(files)
    ]
    try:
        printed = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(printed)[-5000:]
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Reports]:
    """What so many ranks found, run once."""
    return functools.cache(lambda ranks: run(tmp_path_factory.mktemp("ranks"), ranks))


def passed(found: Reports, check: str) -> None:
    for rank, report in enumerate(found):
        problem = report.get(check, f"not run, since {list(report)[-1]} failed")
        assert not problem, f"rank {rank}:\n{problem}"


@pytest.mark.parametrize("check", CHECKS[2])
def test_two_ranks(reports: Callable[[int], Reports], check: str) -> None:
    passed(reports(2), check)


@pytest.mark.slow  # four processes that import torch take 10 s on two cores
@pytest.mark.parametrize("check", CHECKS[4])
def test_four_ranks(reports: Callable[[int], Reports], check: str) -> None:
    passed(reports(4), check)
