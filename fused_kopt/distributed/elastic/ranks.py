"""What ranks tell each other about a checkpoint: an error on one is an error on all."""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from fused_kopt import collectives
from fused_kopt.collectives import Group
from fused_kopt.errors import CheckpointError, PeerError

T = TypeVar("T")


def gathered(work: Callable[[], T], group: Group) -> list[T]:
    """What `work` returns on every rank. Where it raises on one, all raise: a CheckpointError if it is one, else the others a PeerError."""
    value, failure = None, None
    try:
        value = work()
    except Exception as error:  # raised again below, once the others know
        failure = error
    text = "" if failure is None else f"{type(failure).__name__}: {failure}"
    mine = (value, text, CheckpointError if isinstance(failure, CheckpointError) else PeerError)
    told: list[Any] = [mine] if collectives.size(group) == 1 else collectives.objects(mine, group)
    if failure is not None:
        raise failure
    for rank, (_, text, kind) in enumerate(told):
        if text:
            raise kind(f"Rank {rank} failed. {text}")
    return [value for value, *_ in told]


def on_all(work: Callable[[], T], group: Group) -> T:
    """What `work` returns here, once it has returned on every rank. Where it raises on one, all raise."""
    found: list[T] = []
    gathered(lambda: found.append(work()), group)
    return found[0]


def on_first(work: Callable[[], T], group: Group) -> T:
    """What `work` returns on the first rank, where alone it is called. Where it raises, all raise."""
    return gathered(lambda: [work()] if collectives.rank(group) == 0 else [], group)[0][0]


_groups: "weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup]" = weakref.WeakKeyDictionary()


def beside(group: Group, given: Group) -> Group:
    """A group of the same ranks for a thread's messages. Of all ranks it is made here, once. Raises ValueError where `given` is needed."""
    if collectives.size(group) == 1 or given is not None:
        return given or group
    world = dist.group.WORLD
    assert world is not None
    if group not in (None, world):
        # new_group() needs all processes; with use_local_synchronization, torch 2.13 hangs if ranks are in different numbers of groups
        raise ValueError("`beside` must be given with `group`: new_group(ranks, backend='gloo'), made by all processes, for this alone.")
    if world not in _groups:
        _groups[world] = dist.new_group(backend="gloo")
    return _groups[world]
