"""Ranks that die or stop in the middle of training, at random moments. test_rank_failure.py runs this file: trials, seed, "sharded" or not.

Every trial forks three ranks from this process, which has imported everything and started no thread. Prints a JSON line for each trial:
the signal, how long the survivors took to notice, and what was wrong with what they had then.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fused_kopt
from fused_kopt import agreement
from fused_kopt.distributed import shard
from fused_kopt.errors import PeerError, TornStepError

RANKS, TIMEOUT, SIZE, STEPS = 3, 4.0, 100_000, 300


def gradients(rank: int, step: int) -> list[Tensor]:
    """Numbers whose sums are exact."""
    return [torch.full((SIZE,), (rank + 1) * (i + 1) * (step % 7 - 3) / 8) for i in range(3)]


def digests(optimizer: Any, variables: list[Tensor]) -> list[int]:
    """Of the variables, then of the slots that are here."""
    flats = [flat for bucket in optimizer._state.buckets.values() for flat in bucket.flat.values()]
    return [int(agreement.digest(t)) for t in (*variables, *flats)]


def history() -> list[list[int]]:
    """What one process has after every number of steps."""
    optimizer, variables = fused_kopt.Adam(0.01, executor="compiled"), [torch.zeros(SIZE) for _ in range(3)]
    found: list[list[int]] = [[]]
    for step in range(STEPS):
        sums = [torch.stack(g).sum(0) for g in zip(*(gradients(rank, step) for rank in range(RANKS)), strict=True)]
        optimizer.apply_gradients(list(zip(sums, variables, strict=True)))
        found.append(digests(optimizer, variables))
    return found


def train(rank: int, folder: str, sharded: bool) -> dict[str, Any]:
    """Steps until a rank is lost; then what is here, and what another step says."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    timeout = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=RANKS, timeout=timeout)
    optimizer, variables = fused_kopt.Adam(0.01, executor="compiled"), [torch.zeros(SIZE) for _ in range(3)]
    if sharded:
        shard(optimizer, part_bytes=4 * SIZE)
    start = time.time()
    try:
        for step in range(STEPS):
            if step == 1:
                Path(folder, f"ready{rank}").touch()
            start = time.time()
            optimizer.apply_gradients(list(zip(gradients(rank, step), variables, strict=True)))
    except PeerError as error:
        found = {
            "at": time.time(),
            "step": start,
            "said": str(error),
            "steps": int(optimizer.iterations),
            "digests": digests(optimizer, variables),
        }
        try:
            optimizer.apply_gradients(list(zip(gradients(rank, 0), variables, strict=True)))
        except (PeerError, TornStepError) as again:
            found["again"] = type(again).__name__
        return found | {"same": digests(optimizer, variables) == found["digests"]}
    return {"said": "", "steps": STEPS}


def rank_process(rank: int, folder: str, sharded: bool) -> None:
    try:
        report = train(rank, folder, sharded)
    except BaseException as error:
        report = {"said": f"UNEXPECTED {error!r}", "steps": -1}
    Path(folder, f"{rank}.part").write_text(json.dumps(report))
    Path(folder, f"{rank}.part").rename(Path(folder, f"{rank}.json"))
    os._exit(0)


def wait_for(paths: list[Path], seconds: float) -> bool:
    end = time.time() + seconds
    while not all(path.exists() for path in paths):
        if time.time() > end:
            return False
        time.sleep(0.002)
    return True


def trial(number: int, kind: signal.Signals, sharded: bool, expected: list[list[int]]) -> dict[str, Any]:
    """One group that loses a rank `number` knows when."""
    random.seed(number)
    folder, victim, delay = tempfile.mkdtemp(), random.randrange(RANKS), random.random() * 0.5
    pids = []
    for rank in range(RANKS):
        pids.append(os.fork())
        if not pids[-1]:
            torch.set_num_threads(1)
            rank_process(rank, folder, sharded)
    assert wait_for([Path(folder, f"ready{rank}") for rank in range(RANKS)], 60), "no first step"
    time.sleep(delay)
    os.kill(pids[victim], kind)
    hit = time.time()
    survivors = [rank for rank in range(RANKS) if rank != victim]
    done = wait_for([Path(folder, f"{rank}.json") for rank in survivors], TIMEOUT + 30)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    reports = {rank: json.loads(Path(folder, f"{rank}.json").read_text()) for rank in survivors} if done else {}
    wrong = [] if done else ["a survivor hangs"]
    for rank, report in reports.items():
        wrong += [f"rank {rank}: {text}" for text in judged(report, sharded, expected)]
    late = [report["at"] - max(hit, report["step"]) for report in reports.values() if "at" in report]
    steps = [report["steps"] for report in reports.values()]
    return {"signal": kind.name, "sharded": sharded, "seconds": max(late, default=0.0), "steps": steps, "wrong": wrong}


def judged(report: dict[str, Any], sharded: bool, expected: list[list[int]]) -> list[str]:
    """What is wrong with a survivor."""
    if report["steps"] == STEPS:
        return []  # it was over before the signal
    if not report["said"] or report["said"].startswith("UNEXPECTED"):
        return [f"no PeerError: {report['said']!r}"]
    wrong = [] if report["same"] else ["a step after the error changed something"]
    torn = report["again"] == "TornStepError"
    if not sharded and (torn or report["digests"] != expected[report["steps"]]):
        wrong.append(f"its state is not that of {report['steps']} whole steps")
    if sharded and not torn and report["digests"][:3] != expected[report["steps"]][:3]:
        wrong.append(f"its variables are not those of {report['steps']} whole steps, and the optimizer does not know")
    return wrong


if __name__ == "__main__":
    trials, seed, sharded = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "sharded"
    child = os.fork()  # torch starts threads in it, and the C++ kernel is built
    if not child:
        Path(sys.argv[4]).write_text(json.dumps(history()))
        os._exit(0)
    os.waitpid(child, 0)
    whole = json.loads(Path(sys.argv[4]).read_text())
    for number in range(trials):
        kind = signal.SIGKILL if number % 2 else signal.SIGSTOP
        print(json.dumps(trial(seed + number, kind, sharded, whole)), flush=True)
