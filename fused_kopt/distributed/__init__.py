"""Beyond one device: sums over ranks, sharded state, offloaded state, elastic checkpoints. The transport is torch.distributed's."""

from fused_kopt.aggregate import AllReduce
from fused_kopt.distributed.sharded import full_slot, reduce_in_backward, shard
from fused_kopt.distributed.tree import TreeSum

__all__ = ["AllReduce", "TreeSum", "full_slot", "reduce_in_backward", "shard"]
