"""DTensors: their memory on this rank, where a shard lies in the whole parameter, and sums over the ranks that have the other shards."""

import math
import sys
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fused_kopt import clipping, collectives, norms

_local, _spec = attrgetter("_local_tensor"), attrgetter("_spec")
Groups = tuple[dist.ProcessGroup, ...]


def sharded() -> Any:
    """The class of sharded tensors, or no class where nobody has imported it, which takes 1 s."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return () if module is None else module.DTensor


def local(tensors: Sequence[Any]) -> list[Any]:
    """The memory of sharded tensors on this rank. `to_local()` takes 11 us for each."""
    try:
        return list(map(_local, tensors))
    except AttributeError:  # plain tensors are among them; looking at each first would take as long again
        kind = sharded()
        return [_local(tensor) if isinstance(tensor, kind) else tensor for tensor in tensors]


def specs(tensors: Sequence[Any]) -> list[Any]:
    """What says where sharded tensors lie; None of plain ones."""
    try:
        return list(map(_spec, tensors))
    except AttributeError:
        kind = sharded()
        return [_spec(tensor) if isinstance(tensor, kind) else None for tensor in tensors]


def placed(gradients: Sequence[Any], params: Sequence[Any]) -> list[Any]:
    """Gradients as their parameters are placed: those of a tensor-parallel norm may still be partial sums."""
    kind = sharded()
    both = zip(gradients, params, strict=True)
    return [g.redistribute(placements=p.placements) if isinstance(g, kind) and g.placements != p.placements else g for g, p in both]


def start(param: Any) -> int:
    """Where this rank's elements begin among the parameter's: in row-major order where they are a range of it, as the rows of
    Shard(0) are; otherwise in an order in which every shard is one."""
    if not isinstance(param, sharded()):
        return 0
    (chunk,) = param.__create_chunk_list__()  # what torch.distributed.checkpoint goes by
    before = 0
    for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
        if size == 0:  # of an empty shard, nobody asks
            return 0
        before += offset * math.prod(chunk.sizes[:dim]) * math.prod(param.shape[dim + 1 :])
    return before


def divides(param: Any, count: int) -> bool:
    """Whether elements can be taken by the `count` in order, so that no shard's boundary cuts them: shards are of equal rows."""
    parts = math.prod(size for size, p in zip(param.device_mesh.shape, param.placements, strict=True) if not p.is_replicate())
    if parts == 1:
        return True
    rows = all(p.is_replicate() or p.is_shard(0) for p in param.placements) and param.stride(0) * param.shape[0] == param.numel()
    return rows and param.shape[0] % parts == 0 and param.numel() // parts % count == 0


def vector(param: Any, numbers: Tensor, length: int) -> Any:
    """A 1-D DTensor of so many numbers, placed as the parameter whose groups of elements they belong to. numbers: this rank's."""
    shape, stride = torch.Size((length,)), (1,)
    return sharded().from_local(numbers, param.device_mesh, param.placements, run_check=False, shape=shape, stride=stride)


def check_norms(params: Sequence[Any]) -> None:
    """Raises ValueError for parameters of which this rank cannot know a norm."""
    for param in params:
        problem = _problem(param)
        if problem:
            raise ValueError(f"Limits on norms cannot be kept: a parameter {tuple(param.shape)} {problem}")


def _problem(param: Any) -> str | None:
    if getattr(param, "_fsdp_flattened", False):  # torch.distributed.fsdp._common_utils.FSDP_FLATTENED
        return "is what FSDP1 made of others. Use its clip_grad_norm_ instead."
    if not isinstance(param, sharded()):
        return None
    if param.device_mesh.get_coordinate() is None:
        return "lies on other ranks only. Leave it out of this rank's optimizer."
    if any(placement.is_partial() for placement in param.placements):
        return f"is placed as {param.placements}, a sum. Use Shard or Replicate."
    return None


class Shards:
    """Which ranks have the other shards of some parameters, and sums over them.

    Nothing here depends on what a rank has: ranks that give the same parameters in the same order call the same collectives.
    """

    def __init__(self, params: Sequence[Any]) -> None:
        groups = [_groups(param) for param in params]
        self.kinds: list[Groups] = list(dict.fromkeys(groups))
        """Of what is replicated and of plain tensors: no groups."""
        self.which = np.array([self.kinds.index(mine) for mine in groups])
        self.groups = list(dict.fromkeys(group for kind in self.kinds for group in kind))

    def total(self, sums: Tensor, each: bool) -> Tensor:
        """Sums over ranks: of every parameter's number if `each`, else of every kind's. One collective per process group."""
        which = self.which if each else np.arange(len(self.kinds))
        for group in self.groups:
            there = np.array([group in kind for kind in self.kinds])
            mine = torch.from_numpy(np.flatnonzero(there[which])).to(sums.device)
            part = sums[mine].to(_home(group, sums.device))
            collectives.reduce(part, group)()
            sums[mine] = part.to(sums.device)
        return sums

    def agree(self, flag: bool) -> bool:
        """Whether any rank says so."""
        said = torch.full((1,), float(flag), device="cpu")
        for group in self.groups:
            part = said.to(_home(group, said.device))
            collectives.reduce(part, group)()
            said = part.cpu()
        return bool(said)


def _groups(param: Any) -> Groups:
    """The process groups over which a parameter is sharded."""
    if not isinstance(param, sharded()) or param.device_mesh.get_coordinate() is None:
        return ()
    mesh = param.device_mesh
    return tuple(mesh.get_group(dim) for dim, p in enumerate(param.placements) if not p.is_replicate() and mesh.size(dim) > 1)


def _home(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Where the group can add up what lies on a device."""
    return device if f"{device.type}:" in dist.get_backend_config(group) else collectives.device(group)


class Across:
    """`clipping.Across` of a step's gradients.

    members: by gradient, which of the parameters of `shards` it belongs to; the others have none in this step.
    """

    def __init__(self, shards: Shards, members: Any, pairs: clipping.Pairs) -> None:
        self._shards, self._members, self._pairs = shards, members, pairs

    def whole(self, squares: list[Tensor], each: bool) -> tuple[list[Tensor], list[Tensor]]:
        home, lengths = squares[0].device, [len(s) for s in squares]
        flat = torch.cat([s.to(home) for s in squares])
        order = self._members
        if len(squares) > 1:
            order = order[[position for group in clipping.groups(self._pairs) for position in group.positions]]
        if each:
            places = torch.from_numpy(order).to(home)
            sums = torch.zeros(len(self._shards.which), dtype=flat.dtype, device=home).index_copy_(0, places, flat)
            parts = torch.split(self._shards.total(sums, each)[places], lengths)
            found = [part.to(s.device) for part, s in zip(parts, squares, strict=True)]
        else:
            which = self._shards.which[order]
            kinds = [torch.from_numpy(np.flatnonzero(which == k)).to(home) for k in range(len(self._shards.kinds))]
            sums = self._shards.total(torch.stack([norms.fold(flat[mine]) for mine in kinds]), each)
            found = [norms.fold(sums).view(1)]
        return found, found
