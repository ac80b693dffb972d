"""The arithmetic of a data-parallel step: bytes that a GPU sends, and the least time that it takes. Starts nothing."""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from fused_kopt.commands import division
from fused_kopt.commands.division import Job
from fused_kopt.commands.machines import Machine, Topology

Behind = Literal["nothing", "update", "backward", "forward"]
NOTHING: tuple[Behind, Behind] = ("nothing", "nothing")
PASSES: tuple[Behind, Behind] = ("forward", "backward")
CLAIM_BYTES = 32  # by which ranks agree on a step: `agreement.Agreement`
FORWARD, BACKWARD = 2, 4  # operations per parameter and token, 6 in all: Kaplan et al. 2020, section 2.1


class Sent(NamedTuple):
    """What one GPU sends in a collective, on average over a node."""

    what: str
    behind: Behind
    """What it can hide behind as it is done."""
    best: Behind
    """What it could hide behind: sums behind the backward pass, variables behind the next forward pass."""
    messages: int
    """Into which it is cut."""
    payload: int
    """Bytes of the whole tensor that is reduced or gathered."""
    link: float
    """Bytes to GPUs of the same node."""
    network: float
    """Bytes to other nodes."""
    steps: tuple[int, int]
    """Of the ring, one after the other, for each message: over links, over the network."""


def sent(job: Job) -> list[Sent]:
    """The collectives of a step."""
    if job.topology.ranks == 1:
        return []
    gradients, variables = (division.whole(job) * dtype.itemsize for dtype in (job.gradients, job.variables))
    around = functools.partial(_around, job.topology)
    claims = around("all-gather of claims", NOTHING, 1, CLAIM_BYTES * job.topology.ranks)
    if job.zero == "0":
        messages = len(division.parts(job.counts, job.gradients.itemsize, division.REDUCE_BYTES))
        return [claims, around("all-reduce of gradients", ("nothing", "backward"), messages, gradients, 2)]
    if job.zero == "fsdp":
        messages = len(job.groups)
        found = [around("all-gather of variables", (behind, behind), messages, variables) for behind in PASSES]
        return [*found, around("reduce-scatter of gradients", ("backward", "backward"), messages, gradients)]
    messages = len(division.runs(job))
    reduced: Behind = "backward" if job.zero == "2" else "nothing"
    return [
        claims,
        around("reduce-scatter of gradients", (reduced, "backward"), messages, gradients),
        around("all-gather of variables", ("update", "forward"), messages, variables),
    ]


def _around(topology: Topology, what: str, behind: tuple[Behind, Behind], messages: int, payload: int, times: int = 1) -> Sent:
    """One collective. behind: as it is, and at best. times: 2 for an all-reduce, which is a reduce-scatter and an all-gather."""
    nodes, each, ring = topology
    if ring == "hierarchical":
        link, network = (each - 1) / each, (nodes - 1) / nodes / each
        steps = (each - 1, nodes - 1)
    else:  # as many rings as a node has ranks; each leaves a node once, and passes `each` - 1 links in it
        all_but_one = (nodes * each - 1) / (nodes * each)
        link, network = (all_but_one * (each - 1) / each, all_but_one / each) if nodes > 1 else (all_but_one, 0.0)
        steps = (nodes * each - nodes, nodes - 1)
    bytes_ = times * payload * link, times * payload * network
    return Sent(what, *behind, messages, payload, *bytes_, (times * steps[0], times * steps[1]))


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


def floors(one: Sent, machine: Machine) -> Floors:
    """Of a collective."""
    wait = machine.latency.base + one.steps[0] * machine.latency.link + one.steps[1] * machine.latency.network
    return Floors(one.link / machine.link / 1e9, one.network / machine.network / 1e9, one.messages * wait)


def copied(job: Job) -> int:
    """Bytes that are read and written to bring gradients into flat buffers; FSDP2's own copies, beside the passes, do not count."""
    if job.zero == "fsdp" or (job.zero == "0" and job.topology.ranks == 1):
        return 0
    return 2 * sum(job.counts) * job.gradients.itemsize


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
    copies: float
    """Gradients into flat buffers, at the memory's rate."""
    update: float
    """What it moves, at the memory's rate."""
    collectives: tuple[Floors, ...]
    """In the order of `sent`."""
    exposed: float
    """Of the collectives, what is hidden behind nothing."""
    least_exposed: float
    """The same if sums hid behind the backward pass, and variables behind the next forward pass."""

    @property
    def alone(self) -> float:
        """Passes, copies and update."""
        return self.forward + self.backward + self.copies + self.update

    @property
    def step(self) -> float:
        """All that is one after the other."""
        return self.alone + self.exposed


def times(job: Job, machine: Machine, load: Load) -> Times:
    """A step's floors."""
    unit = job.model.active * load.tokens / (machine.peak * 1e12 * load.mfu)
    rate = machine.bandwidth * 1e9
    update = division.update(job).moved / rate
    lengths: dict[Behind, float] = {"nothing": 0.0, "update": update, "backward": BACKWARD * unit, "forward": FORWARD * unit}
    collectives = sent(job)
    each = tuple(floors(one, machine) for one in collectives)
    exposed, least = (_exposed(collectives, each, lengths, behind) for behind in (lambda one: one.behind, lambda one: one.best))
    return Times(lengths["forward"], lengths["backward"], copied(job) / rate, update, each, exposed, least)


def _exposed(collectives: Sequence[Sent], each: Sequence[Floors], lengths: dict[Behind, float], behind: Callable[[Sent], Behind]) -> float:
    """Seconds of collectives that what they go behind is too short for."""
    total = 0.0
    for name, length in lengths.items():
        mine = [(one.messages, floor.total) for one, floor in zip(collectives, each, strict=True) if behind(one) == name]
        if mine:
            messages, time = mine[0][0], sum(seconds for _, seconds in mine)
            # one message has nothing left to hide behind: the last one's gradients, or the first one's variables
            total += max(time - length * (messages - 1) / messages, time / messages)
    return total
