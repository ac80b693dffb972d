"""What goes over the wire: collectives counted as they are called, bytes that the loopback device has sent, and a model of their time."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_kopt import collectives

SIZES = tuple(1 << n for n in range(12, 25, 2))  # bytes of the flat tensor: 4 KiB to 16 MiB
KINDS = ("reduce-scatter", "all-gather", "all-reduce")


def _of(given: Any) -> int:
    """Bytes of a tensor, or of tensors in lists."""
    return given.nbytes if isinstance(given, Tensor) else sum(map(_of, given)) if isinstance(given, (list, tuple)) else 0


# By torch's operator: bytes of the whole tensor, of which each rank sends (ranks - 1) / ranks on average in a ring, a tree or pairwise.
PAYLOADS: dict[str, Callable[[Sequence[Any]], int]] = {
    "allreduce_": lambda arguments: 2 * _of(arguments[0]),  # a reduce-scatter and an all-gather
    "broadcast_": lambda arguments: _of(arguments[0]),
    "_allgather_base_": lambda arguments: _of(arguments[0]),
    "allgather_": lambda arguments: _of(arguments[0]),
    "_reduce_scatter_base_": lambda arguments: _of(arguments[1]),
    "alltoall_base_": lambda arguments: _of(arguments[1]),
    "barrier": lambda arguments: 0,
}


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this block, what collectives are given: `calls` by operator, and `sent`, the bytes that a rank sends in them on average."""

    def __init__(self, ranks: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[str, int] = {}
        self._payload, self._ranks = 0, ranks

    @property
    def sent(self) -> int:
        """Bytes, without headers."""
        return self._payload * (self._ranks - 1) // self._ranks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._opname
            if name != "wait_tensor":
                self._payload += PAYLOADS[name](args)
                self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def loopback() -> int:
    """Bytes that this network namespace has sent over its loopback device, headers included."""
    lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    return next(int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:"))


class Line(NamedTuple):
    """A collective's time: seconds of latency, and bytes that a rank sends per second."""

    latency: float
    rate: float


def fitted(points: Sequence[tuple[float, float]]) -> Line:
    """The line through (bytes, seconds) with the least squares of relative errors."""
    rows = torch.tensor([[1 / seconds, sent / seconds] for sent, seconds in points], dtype=torch.float64)
    latency, slope = torch.linalg.lstsq(rows, torch.ones(len(points), 1, dtype=torch.float64)).solution.flatten().tolist()
    return Line(max(latency, 0.0), 1 / max(slope, 1e-15))


def timed(run: Callable[[], object]) -> float:
    """Seconds of a call that all ranks make, on the slowest of them."""
    dist.barrier()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def slowest(seconds: Sequence[float]) -> list[float]:
    """Of each repetition, the time of the rank that took longest."""
    return [max(each) for each in zip(*collectives.objects(list(seconds)), strict=True)]


def collective(kind: str, size: int, device: torch.device) -> tuple[float, Callable[[], None]]:
    """One of KINDS on a flat tensor of about so many bytes: what a rank sends, and a call."""
    ranks = dist.get_world_size()
    each = size // 4 // ranks
    flat, part = torch.zeros(each * ranks, device=device), torch.zeros(each, device=device)
    jobs: dict[str, Callable[[], collectives.Wait]] = {
        "reduce-scatter": lambda: collectives.reduce_scatter(part, flat),
        "all-gather": lambda: collectives.gather(flat, part),
        "all-reduce": lambda: collectives.reduce(flat),
    }
    return flat.nbytes * (ranks - 1) / ranks * (2 if kind == "all-reduce" else 1), lambda: jobs[kind]()()
