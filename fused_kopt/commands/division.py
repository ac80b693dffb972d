"""How a model's variables are divided among ranks, and the bytes that each one holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

import torch

from fused_kopt import layout
from fused_kopt.commands.machines import Topology
from fused_kopt.commands.models import Model, Shape
from fused_kopt.layout import ALIGNMENT
from fused_kopt.memory import MemoryEstimate, estimate_memory
from fused_kopt.optimizer import Optimizer

Zero = Literal["0", "1", "2", "fsdp"]
# Variables and gradients go through flat buffers in parts of at least so many bytes: `distributed.shard`'s default, and AllReduce's.
SHARD_BYTES, REDUCE_BYTES = 1 << 28, 1 << 26


@dataclass(frozen=True)
class Job:
    """What is trained, and how it is divided."""

    model: Model
    topology: Topology
    optimizer: Optimizer
    zero: Zero = "1"
    """What each rank keeps only its part of: nothing, slots and masters (1), gradients too (2), variables too (fsdp)."""
    variables: torch.dtype = torch.bfloat16
    gradients: torch.dtype = torch.bfloat16
    model_parallel: int = 1
    """So many GPUs hold one copy of the model together, each the same part of every variable."""

    @property
    def groups(self) -> list[list[Shape]]:
        """One rank's variables if nothing but the model were divided."""
        if self.model_parallel == 1:
            return [list(group) for group in self.model.groups]
        return [[(-(-prod(shape) // self.model_parallel),) for shape in group] for group in self.model.groups]

    @property
    def shapes(self) -> list[Shape]:
        """All of them."""
        return [shape for group in self.groups for shape in group]

    @property
    def counts(self) -> list[int]:
        """Their elements."""
        return [prod(shape) for shape in self.shapes]


class Held(NamedTuple):
    """Bytes on the first rank's GPU. Activations are not among them."""

    variables: int
    gradients: int
    state: int
    """Slots and masters."""
    temporaries: int
    """Through which gradients and variables go."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def parts(counts: Sequence[int], itemsize: int, least: int) -> list[list[int]]:
    """Variables in their order, cut into runs of at least `least` bytes; the last may be smaller."""
    return [[counts[i] for i in run] for run in layout.runs([count * itemsize for count in counts], least)]


def padded(counts: Sequence[int]) -> int:
    """Elements of a flat buffer: every variable begins at a multiple of 64."""
    return sum(-(-count // ALIGNMENT) * ALIGNMENT for count in counts)


def share(counts: Sequence[int], ranks: int) -> int:
    """Elements of a part that each rank owns, a multiple of 64; padding included."""
    return -(-padded(counts) // (ALIGNMENT * ranks)) * ALIGNMENT


def pieces(counts: Sequence[int], size: int, rank: int) -> list[int]:
    """The elements of every variable that lie in a rank's share of `size` elements, where there are any."""
    found, start = [], 0
    for count in counts:
        length = min(start + count, (rank + 1) * size) - max(start, rank * size)
        found += [length] * (length > 0)
        start += -(-count // ALIGNMENT) * ALIGNMENT
    return found


def rows(shapes: Sequence[Shape], ranks: int) -> list[Shape]:
    """The first rank's part of each variable under FSDP2, which divides first dimensions into equal parts, the last ones shorter."""
    return [(-(-shape[0] // ranks), *shape[1:]) for shape in shapes]


def runs(job: Job) -> list[list[int]]:
    """The parts of a sharded job's variables."""
    return parts(job.counts, job.variables.itemsize, SHARD_BYTES)


def own(job: Job) -> list[Shape]:
    """What the first rank updates. Under fsdp none has more; of a flat buffer others have the same but for padding."""
    ranks = job.topology.ranks
    if job.zero == "fsdp":
        return rows(job.shapes, ranks)
    return job.shapes if job.zero == "0" else [(n,) for run in runs(job) for n in pieces(run, share(run, ranks), 0)]


def update(job: Job) -> MemoryEstimate:
    """The state that this needs, and the bytes that its step moves."""
    return estimate_memory([(shape, job.variables) for shape in own(job)], job.optimizer, job.gradients)


def owned(job: Job) -> int:
    """Elements of the first rank's share of variables and gradients, padding included."""
    if job.zero == "0":
        return sum(job.counts)
    ranks = job.topology.ranks
    return sum(map(prod, own(job))) if job.zero == "fsdp" else sum(share(run, ranks) for run in runs(job))


def whole(job: Job) -> int:
    """Elements of what is reduced and gathered: of all shares together, padding included."""
    return padded(job.counts) if job.zero == "0" else owned(job) * job.topology.ranks


def held(job: Job) -> Held:
    """A GPU's memory."""
    v, g, ranks = job.variables.itemsize, job.gradients.itemsize, job.topology.ranks
    parameters, state = sum(job.counts), update(job).slots
    if job.zero == "0":
        return Held(parameters * v, parameters * g, state, padded(job.counts) * g if ranks > 1 else 0)
    if job.zero == "fsdp":
        largest = max(sum(map(prod, group)) for group in job.groups)
        return Held(owned(job) * v, owned(job) * g, state, 2 * largest * (v + g))
    passing = min(2, len(runs(job))) * ranks * max(share(run, ranks) for run in runs(job)) * g
    if job.zero == "1":
        return Held(whole(job) * v, parameters * g, state, owned(job) * g + passing)
    return Held(whole(job) * v, owned(job) * g, state, passing + max(job.counts) * g)
