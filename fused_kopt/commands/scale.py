"""The arithmetic of data-parallel training: bytes that a GPU holds and sends, and the least time that these take. Starts nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

import torch

from fused_kopt.commands.machines import Machine, Topology
from fused_kopt.commands.models import Model, Shape
from fused_kopt.layout import ALIGNMENT
from fused_kopt.memory import MemoryEstimate, estimate_memory
from fused_kopt.optimizer import Optimizer

Zero = Literal["0", "1", "2", "fsdp"]
FORWARD, BACKWARD = 2, 4  # operations per parameter and token, 6 in all: Kaplan et al. 2020, section 2.1


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


class Held(NamedTuple):
    """Bytes on the first rank's GPU. Activations are not among them."""

    variables: int
    gradients: int
    state: int
    """Slots and masters."""
    temporaries: int
    """What is gathered or reduced at a time, besides."""
    padding: int
    """So much of the above belongs to no parameter."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.variables + self.gradients + self.state + self.temporaries


class Sent(NamedTuple):
    """What one GPU sends in a collective, on average over a node."""

    what: str
    during: Literal["forward", "backward"]
    payload: int
    """Bytes of the whole tensor that is reduced or gathered."""
    link: float
    """Bytes to GPUs of the same node."""
    network: float
    """Bytes to other nodes."""
    steps: tuple[int, int]
    """Of the ring, one after the other: over links, over the network."""


def shard_elements(counts: Sequence[int], ranks: int) -> int:
    """Elements of a flat buffer that each rank owns: variables of so many elements, laid out and padded as `distributed.shard` does."""
    total = sum(-(-count // ALIGNMENT) * ALIGNMENT for count in counts)
    return -(-total // (ALIGNMENT * ranks)) * ALIGNMENT


def pieces(counts: Sequence[int], size: int, rank: int) -> list[int]:
    """The elements of every variable that lie in a rank's shard of `size` elements, where there are any."""
    found, start = [], 0
    for count in counts:
        length = min(start + count, (rank + 1) * size) - max(start, rank * size)
        found += [length] * (length > 0)
        start += -(-count // ALIGNMENT) * ALIGNMENT
    return found


def rows(shapes: Sequence[Shape], ranks: int) -> list[Shape]:
    """The first rank's part of each variable under FSDP2, which divides first dimensions into equal parts, the last ones shorter."""
    return [(-(-shape[0] // ranks), *shape[1:]) for shape in shapes]


def own(job: Job) -> list[Shape]:
    """What the first rank updates. Under fsdp none has more; of a flat buffer others have the same but for padding."""
    ranks, counts = job.topology.ranks, [prod(shape) for shape in job.shapes]
    if job.zero == "fsdp":
        return rows(job.shapes, ranks)
    return job.shapes if job.zero == "0" else [(n,) for n in pieces(counts, shard_elements(counts, ranks), 0)]


def update(job: Job) -> MemoryEstimate:
    """The state that this needs, and the bytes that its step moves."""
    return estimate_memory([(shape, job.variables) for shape in own(job)], job.optimizer, job.gradients)


def elements(job: Job) -> tuple[int, int]:
    """Of all ranks' parts together, padding included; and of one part."""
    ranks, counts = job.topology.ranks, [prod(shape) for shape in job.shapes]
    if job.zero == "0":
        return sum(counts), sum(counts)
    part = sum(map(prod, own(job))) if job.zero == "fsdp" else shard_elements(counts, ranks)
    return part * ranks, part


def held(job: Job) -> Held:
    """A GPU's memory."""
    whole, part = elements(job)
    largest = max(sum(map(prod, group)) for group in job.groups)
    v, g, state = job.variables.itemsize, job.gradients.itemsize, update(job)
    variables = part if job.zero == "fsdp" else whole
    gradients = part if job.zero in ("2", "fsdp") else whole
    # fsdp: one group in use and the next one on its way, as variables and then as gradients; 2: a group's gradients before they are reduced
    temporaries = {"0": 0, "1": 0, "2": largest * g, "fsdp": 2 * largest * (v + g)}[job.zero]
    parameters = sum(prod(shape) for shape in job.shapes)
    padding = sum((full - parameters * full // whole) * size for full, size in ((variables, v), (gradients, g)))
    return Held(variables * v, gradients * g, state.slots, temporaries, padding + state.padding)


def sent(job: Job) -> list[Sent]:
    """The collectives of a step."""
    if job.topology.ranks == 1:
        return []
    whole, _ = elements(job)
    gradients, variables = whole * job.gradients.itemsize, whole * job.variables.itemsize
    if job.zero == "0":
        return [_sent("all-reduce of gradients", "backward", gradients, job.topology, 2)]
    found = [
        _sent("reduce-scatter of gradients", "backward", gradients, job.topology),
        _sent("all-gather of variables", "forward", variables, job.topology),
    ]
    if job.zero == "fsdp":
        found.append(_sent("all-gather of variables", "backward", variables, job.topology))
    return found


def _sent(what: str, during: Literal["forward", "backward"], payload: int, topology: Topology, times: int = 1) -> Sent:
    """One collective. times: 2 for an all-reduce, which is a reduce-scatter and an all-gather."""
    nodes, each, ring = topology
    if ring == "hierarchical":
        link, network = (each - 1) / each, (nodes - 1) / nodes / each
        steps = (each - 1, nodes - 1)
    else:  # as many rings as a node has ranks; each leaves a node once, and passes `each` - 1 links in it
        around = (nodes * each - 1) / (nodes * each)
        link, network = (around * (each - 1) / each, around / each) if nodes > 1 else (around, 0.0)
        steps = (nodes * each - nodes, nodes - 1)
    return Sent(what, during, payload, times * payload * link, times * payload * network, (times * steps[0], times * steps[1]))


class Floors(NamedTuple):
    """Seconds that a collective takes at least."""

    link: float
    network: float
    latency: float
    """Of all messages."""

    @property
    def total(self) -> float:
        """Links and network work at once, on parts that follow each other."""
        return max(self.link, self.network) + self.latency


def floors(one: Sent, machine: Machine, messages: int) -> Floors:
    """Of a collective that is cut into so many messages."""
    wait = machine.latency.base + one.steps[0] * machine.latency.link + one.steps[1] * machine.latency.network
    return Floors(one.link / machine.link / 1e9, one.network / machine.network / 1e9, messages * wait)


class Load(NamedTuple):
    """What a step computes besides the update."""

    tokens: int
    """For each GPU: the batch's, divided by all GPUs."""
    mfu: float
    """The share of the peak that forward and backward pass reach."""


class Times(NamedTuple):
    """Seconds of a step."""

    forward: float
    backward: float
    update: float
    """Memory's floor: what the update moves."""
    collectives: tuple[Floors, ...]
    """In the order of `sent`."""
    exposed: dict[str, float]
    """Behind neither pass: of what belongs to it, all beyond the layers' share of its time."""

    @property
    def step(self) -> float:
        """All that is one after the other."""
        return self.forward + self.backward + self.update + sum(self.exposed.values())


def times(job: Job, machine: Machine, load: Load) -> Times:
    """A step's floors."""
    unit = job.model.active * load.tokens / (machine.peak * 1e12 * load.mfu)
    passes = {"forward": FORWARD * unit, "backward": BACKWARD * unit}
    messages, collectives = len(job.groups), sent(job)
    each = tuple(floors(one, machine, messages) for one in collectives)
    exposed = {}
    for name, length in passes.items():
        total = sum(floor.total for floor, one in zip(each, collectives, strict=True) if one.during == name)
        # the first layer's gradients come last, and its variables are needed first: nothing is left to hide them behind
        exposed[name] = max(total - length * (messages - 1) / messages, total / messages)
    return Times(passes["forward"], passes["backward"], update(job).moved / machine.bandwidth / 1e9, each, exposed)
