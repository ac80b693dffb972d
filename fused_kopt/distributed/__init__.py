"""Beyond one device: sums over ranks, sharded state, offloaded state, elastic checkpoints. The transport is torch.distributed's."""

from fused_kopt.aggregate import AllReduce
from fused_kopt.distributed.hosting import OffloadStats
from fused_kopt.distributed.offload import offload, offload_stats, variables_changed
from fused_kopt.distributed.sharded import full_slot, reduce_in_backward, shard
from fused_kopt.distributed.tree import TreeSum

__all__ = [
    "AllReduce",
    "OffloadStats",
    "TreeSum",
    "full_slot",
    "offload",
    "offload_stats",
    "reduce_in_backward",
    "shard",
    "variables_changed",
]
