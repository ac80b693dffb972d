"""torch.distributed's collectives on flat buffers: they are started, do their work beside other things, and fail in one way."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_kopt.errors import PeerError

Group = dist.ProcessGroup | None
Wait = Callable[[], None]

# torch 2.13 renames both and deprecates the old names; 2.11 has only these
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def size(group: Group = None) -> int:
    """How many ranks there are; 1 where nothing is distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: Group = None) -> int:
    """This process's rank in the group; 0 where nothing is distributed, -1 for a process that is not a member."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def device(group: Group = None) -> torch.device:
    """Where small messages lie: on the CPU if the group has a backend for it, so that reading one waits for no kernel."""
    config = dist.get_backend_config(group) if size(group) > 1 else "cpu:"
    return torch.device("cpu") if "cpu:" in config else torch.device("cuda", torch.cuda.current_device())


def reduce(flat: Tensor, group: Group = None) -> Wait:
    """Sum a flat tensor over the ranks, in place. Returns what waits for the end. One rank sends nothing."""
    if _alone(group, flat, flat):
        return _nothing
    return _started("all-reduce", group, lambda: dist.all_reduce(flat, group=group, async_op=True))


def reduce_scatter(shard: Tensor, flat: Tensor, group: Group = None) -> Wait:
    """Sum `flat` over the ranks, each of which gets its part in `shard`: size / ranks elements, which may lie in `flat`."""
    if _alone(group, shard, flat):
        return _nothing
    if f"{flat.device.type}:gloo" in dist.get_backend_config(group):
        return _summed(shard, flat, group)
    return _started("reduce-scatter", group, lambda: _reduce_scatter(shard, flat, group=group, async_op=True))


def _summed(shard: Tensor, flat: Tensor, group: Group) -> Wait:
    """gloo's reduce-scatter is an all-reduce, of twice the bytes: this sends each rank its part, which it adds up in order of ranks."""
    parts, sizes = torch.empty_like(flat), [len(shard)] * size(group)
    held = [(parts, exchange(parts, flat, (sizes, sizes), group))]
    del parts  # memory of a whole part, which must not outlive the first wait

    def wait() -> None:
        while held:
            parts, received = held.pop()
            received()
            first, *others = torch.split(parts, len(shard))
            for other in others:
                first.add_(other)
            shard.copy_(first)

    return wait


def gather(flat: Tensor, shard: Tensor, group: Group = None) -> Wait:
    """Fill `flat` with every rank's `shard`, in order of ranks; the rank's own may lie in its place already."""
    if _alone(group, flat, shard):
        return _nothing
    return _started("all-gather", group, lambda: _all_gather(flat, shard, group=group, async_op=True))


def exchange(received: Tensor, sent: Tensor, sizes: tuple[list[int], list[int]], group: Group = None) -> Wait:
    """Send a part of `sent` to every rank, and receive one of each. sizes: how many elements come, and go, by rank."""
    if _alone(group, received, sent):
        return _nothing
    return _started("all-to-all", group, lambda: dist.all_to_all_single(received, sent, *sizes, group=group, async_op=True))


def objects(value: Any, group: Group = None) -> list[Any]:
    """What every rank passed, pickled on its way: for messages, not for steps."""
    found: list[Any] = [None] * size(group)
    if len(found) == 1:
        return [value]
    try:
        dist.all_gather_object(found, value, group=group)
    except RuntimeError as error:
        raise PeerError(_text(f"an exchange of messages among {size(group)} ranks", error)) from error
    return found


def _alone(group: Group, target: Tensor, source: Tensor) -> bool:
    """Whether there is one rank; then `target` has got what lies in `source`."""
    if size(group) > 1:
        return False
    if target.data_ptr() != source.data_ptr():
        target.copy_(source)
    return True


def _nothing() -> None:
    pass


def _started(what: str, group: Group, start: Callable[[], Any]) -> Wait:
    name = f"{what} among {size(group)} ranks (this is rank {rank(group)})"
    try:
        work = start()
    except RuntimeError as error:
        raise PeerError(_text(name, error)) from error

    def wait() -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise PeerError(_text(name, error)) from error

    return wait


def _text(what: str, error: Exception) -> str:
    return (
        f"{what} failed: {error} A rank is gone, stopped, or slower than the group's timeout (init_process_group(timeout=...), "
        "30 minutes by default on gloo). Leave this group; start again from the last checkpoint."
    )
