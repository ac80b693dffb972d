"""The default gradient aggregator: the sum over the ranks of torch.distributed, one collective per bucket."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def replicated() -> bool:
    """Whether there is more than one rank to sum over."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduce_sum(pairs: Sequence[tuple[Tensor, Tensor]]) -> Sequence[tuple[Tensor, Tensor]]:
    """The pairs with every gradient summed over the default process group; the very same pairs without a group.

    Gradients of one device and dtype are laid one after another in a flat buffer and reduced by one collective; the
    caller's gradients are not written. Raises RuntimeError where this call cannot aggregate: a sparse gradient, a
    device for which the group has no backend, a process that is not a member.
    """
    if not replicated():
        return pairs
    members: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for position, (gradient, _) in enumerate(pairs):
        _check(gradient, position)
        members.setdefault((gradient.device, gradient.dtype), []).append(position)
    summed: list[tuple[Tensor, Tensor]] = list(pairs)
    for positions in members.values():
        flat = torch.cat([pairs[p][0].reshape(-1) for p in positions])
        dist.all_reduce(flat)
        parts = torch.split(flat, [pairs[p][0].numel() for p in positions])
        for p, part in zip(positions, parts, strict=True):
            summed[p] = (part.view(pairs[p][0].shape), pairs[p][1])
    return summed


def all_reduce_flat(buffers: Sequence[Tensor]) -> None:
    """Sum flat gradients over the ranks in place: one collective per buffer. Raises what `all_reduce_sum` raises."""
    for position, buffer in enumerate(buffers):
        _check(buffer, position)
    for buffer in buffers:
        dist.all_reduce(buffer)


def _check(gradient: Tensor, position: int) -> None:
    mend = "Reduce it yourself and pass experimental_aggregate_gradients=False."
    if dist.get_rank() < 0:
        raise RuntimeError(f"This process is not a member of the default process group and cannot aggregate gradients. {mend}")
    if gradient.layout != torch.strided:
        raise RuntimeError(f"Gradient {position} is sparse ({gradient.layout}), which cannot be aggregated in a flat buffer. {mend}")
    # the config lists a backend per device type, as in 'cpu:gloo,cuda:nccl'
    config = dist.get_backend_config()
    if f"{gradient.device.type}:" not in config:
        raise RuntimeError(f"The process group has no backend for {gradient.device.type} tensors ({config}): gradient {position}. {mend}")
