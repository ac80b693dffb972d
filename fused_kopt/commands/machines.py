"""GPUs and what joins them: memory, arithmetic, and the rates of links and networks."""

from typing import Literal, NamedTuple

from fused_kopt.commands.architectures import ARCHITECTURES
from fused_kopt.commands.common import RefusedError

Ring = Literal["hierarchical", "flat"]


class Latency(NamedTuple):
    """Seconds before a ring's first byte is through: once, and for each step over a link or a network."""

    base: float
    link: float
    network: float


# NCCL's own model of its rings, src/graph/tuning.cc at 01afd20a77, protocol Simple: 8.4 us, 3.4 us over NVLink, 9.6 us over a network.
NCCL = Latency(8.4e-6, 3.4e-6, 9.6e-6)


class Machine(NamedTuple):
    """A GPU, the links to others of its node, and its share of the node's network. Rates are in GB/s and for one direction."""

    gpu: str
    memory: float
    """GB."""
    peak: float
    """Dense bfloat16 multiplications and additions: 1e12 per second."""
    bandwidth: float
    """Of the memory."""
    link: float
    network: float
    source: str
    latency: Latency = NCCL


_H100 = ARCHITECTURES["sm_90"]
# Peaks, sizes and links are the data sheets': NVIDIA's of A100 80GB SXM, H100 SXM, H200 SXM and HGX B200, AMD's of MI300X.
# A data sheet adds both directions of NVLink (600, 900, 900, 1,800); an MI300X has seven links of 64 one way.
# Networks: one adapter per GPU, as in DGX A100 (200 Gb/s), DGX H100, H200 and B200, and AMD's eight-GPU reference (400 Gb/s).
_SHEET = "data sheets; memory bandwidth as fused-kopt explain has it"
MACHINES = {
    "a100": Machine("A100 80GB SXM", 80, 312, ARCHITECTURES["sm_80"].bandwidth, 300, 25, _SHEET),
    "h100": Machine("H100 SXM", 80, 989, _H100.bandwidth, 450, 50, _SHEET),
    # its chip is the H100's; nobody measured its copy here, so nine tenths of 4,800
    "h200": Machine("H200 SXM", 141, 989, 4320, 450, 50, _SHEET),
    "b200": Machine("B200 (HGX)", 180, 2250, ARCHITECTURES["sm_100"].bandwidth, 900, 50, _SHEET),
    "mi300x": Machine("MI300X", 192, 1307, ARCHITECTURES["gfx942"].bandwidth, 448, 50, _SHEET),
}


class Topology(NamedTuple):
    """The ranks that share the work on one copy of the model."""

    nodes: int
    each: int
    """Of these ranks in each node."""
    ring: Ring = "hierarchical"
    """How they pass data on: within nodes and between those of the same place in each, or around through all of them."""

    @property
    def ranks(self) -> int:
        """In all."""
        return self.nodes * self.each


def topology(gpus: int, per_node: int, model_parallel: int) -> Topology:
    """Of one data-parallel group. model_parallel: so many neighbouring GPUs hold one copy of the model together.

    Raises RefusedError where nodes would be filled unevenly.
    """
    per_node = min(per_node, gpus)
    if gpus % per_node:
        raise RefusedError(f"--gpus must be a multiple of --gpus-per-node ({per_node}), or fewer. Received: {gpus}.")
    if gpus % model_parallel or max(per_node, model_parallel) % min(per_node, model_parallel):
        raise RefusedError(
            f"--model-parallel must divide --gpus ({gpus}), and divide --gpus-per-node ({per_node}) or be a multiple of it. "
            f"Received: {model_parallel}."
        )
    each = max(1, per_node // model_parallel)
    return Topology(gpus // model_parallel // each, each)
