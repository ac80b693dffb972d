"""Runs a function on every rank of a gloo group, in processes of their own, and collects what it returns."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=60)


def run(function: Callable[..., Any], world: int, folder: Path, *arguments: Any) -> list[Any]:
    """What `function(rank, *arguments)` returned on each rank. A module-level function; an exception on a rank is raised here."""
    folder.mkdir(exist_ok=True)
    mp.spawn(_rank, (function, world, str(folder), arguments), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def join(rank: int, world: int, folder: str, timeout: timedelta = TIMEOUT) -> None:
    """Become a rank of the group that meets in a folder."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world, timeout=timeout)
    dist.barrier()  # a rank that is done at once would close the connection on one that still connects


def _rank(rank: int, function: Callable[..., Any], world: int, folder: str, arguments: tuple[Any, ...]) -> None:
    join(rank, world, folder)
    torch.save(function(rank, *arguments), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
