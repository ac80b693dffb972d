"""Beyond one device: sums over ranks, sharded state, offloaded state, elastic checkpoints. The transport is torch.distributed's."""

from fused_kopt.aggregate import AllReduce
from fused_kopt.distributed.elastic import Saving, async_save, load, save
from fused_kopt.distributed.hosting import OffloadStats
from fused_kopt.distributed.offload import offload, offload_stats, variables_changed
from fused_kopt.distributed.sharded import full_slot, reduce_in_backward, shard
from fused_kopt.distributed.tree import TreeSum

__all__ = [
    "AllReduce",
    "OffloadStats",
    "Saving",
    "TreeSum",
    "async_save",
    "full_slot",
    "load",
    "offload",
    "offload_stats",
    "reduce_in_backward",
    "save",
    "shard",
    "variables_changed",
]
