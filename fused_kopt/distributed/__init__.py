"""Beyond one device: sums over ranks, sharded state, offloaded state, elastic checkpoints. The transport is torch.distributed's."""

from fused_kopt.aggregate import AllReduce
from fused_kopt.distributed.sharded import full_slot, reduce_in_backward, shard

__all__ = ["AllReduce", "full_slot", "reduce_in_backward", "shard"]
