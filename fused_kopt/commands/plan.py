"""`fused-kopt plan`: memory, bytes on the wire and the least step time of data-parallel training. Needs no GPU."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.console import Console
from rich.filesize import decimal
from rich.table import Column, Table

from fused_kopt.commands import division, machines, models, scale
from fused_kopt.commands.common import RefusedError
from fused_kopt.commands.division import Held, Job, Zero
from fused_kopt.commands.machines import MACHINES, Machine, Ring
from fused_kopt.commands.scale import Load, Sent, Times
from fused_kopt.commands.variants import DTYPES
from fused_kopt.optimizers import registry

ZERO: tuple[Zero, ...] = ("0", "1", "2", "fsdp")
RINGS: tuple[Ring, ...] = ("hierarchical", "flat")
TOKENS = 8192
MFU = 0.4  # Llama 3 405B reached 0.38 to 0.43 (Grattafiori et al. 2024, table 4)
ABOUT = """Work out, before anything is started, what data-parallel training costs each GPU: memory, bytes on the wire, and time.

Times are floors: bytes over bandwidth, operations over peak and MFU. "step" is of what fused_kopt does, "step at best" of what could hide.
Activations, and what the parts of one copy of the model send each other (--model-parallel), are not included.
Formulas and sources: docs/plan.md. Exit code 1: the memory of the GPU is too small.
Example: fused-kopt plan --model llama-3-70b --gpus 1024 --zero 1 --precision bf16_split --model-parallel 8"""


@dataclass(frozen=True)
class Settings:
    """What `fused-kopt plan` was asked for."""

    model: str
    gpus: int = 8
    gpus_per_node: int = 8
    gpu: str = "h100"
    zero: Zero = "1"
    precision: str = "bf16_split"
    variables: str | None = None
    """Dtype; None: float32 under the policy float32, else bfloat16."""
    gradients: str | None = None
    """Dtype; None: the variables'."""
    optimizer: str = "adam"
    model_parallel: int = 1
    tokens: int = TOKENS
    mfu: float = MFU
    ring: Ring = "hierarchical"
    link: float | None = None
    """GB/s; None: the GPU's. So is the network's."""
    network: float | None = None
    as_json: bool = False


class Plan(NamedTuple):
    """What was worked out."""

    job: Job
    machine: Machine
    load: Load
    held: Held
    sent: list[Sent]
    times: Times

    @property
    def fits(self) -> bool:
        """Whether the GPU's memory holds it, activations aside."""
        return self.held.total <= self.machine.memory * 1e9


def work_out(settings: Settings) -> Plan:
    """Answer a request. Raises RefusedError for one without meaning."""
    s = settings
    topology = machines.topology(s.gpus, s.gpus_per_node, s.model_parallel)._replace(ring=s.ring)
    machine = MACHINES[s.gpu]
    machine = machine._replace(link=s.link or machine.link, network=s.network or machine.network)
    variables = DTYPES[s.variables or ("float32" if s.precision == "float32" else "bfloat16")]
    gradients = DTYPES[s.gradients] if s.gradients else variables
    optimizer = registry.deserialize({"class_name": s.optimizer, "config": {"precision": s.precision}})
    job = Job(models.model(s.model), topology, optimizer, s.zero, variables, gradients, s.model_parallel)
    load = Load(s.tokens, s.mfu)
    try:
        return Plan(job, machine, load, division.held(job), scale.sent(job), scale.times(job, machine, load))
    except ValueError as refusal:  # of the precision policy
        raise RefusedError(str(refusal)) from refusal


def plan(settings: Settings, console: Console) -> int:
    """Print a plan; see `fused-kopt plan --help`. Returns the exit code. Raises RefusedError for a request without meaning."""
    found = work_out(settings)
    if settings.as_json:
        console.print(json.dumps(_values(found), indent=2), highlight=False, soft_wrap=True)
        return 0 if found.fits else 1
    for line in _head(found):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    for title, rows in (("memory of a GPU", _memory(found)), ("sent by a GPU in a step", _wire(found)), ("time of a step", _time(found))):
        table = Table(title, Column(justify="right"), Column("how", overflow="fold"))
        for row in rows:
            table.add_row(*row)
        console.print(table)
    return 0 if found.fits else 1


def _head(found: Plan) -> Iterator[str]:
    job, machine = found.job, found.machine
    model, (nodes, each, ring) = job.model, job.topology
    active = "" if model.active == model.parameters else f", {model.active:,} of them for each token"
    yield f"{model.name}: {model.parameters:,} parameters in {len(model.shapes):,} variables{active} ({model.source})"
    parts = f", each holding 1/{job.model_parallel} of the model" if job.model_parallel > 1 else ""
    yield f"{nodes * each:,} data-parallel ranks: {nodes:,} nodes x {each}{parts}; {ring} rings"
    memory = f"{machine.memory:,.0f} GB at {machine.bandwidth:,.0f} GB/s"
    yield (
        f"{machine.gpu}: {memory}, {machine.peak:,.0f} TFLOP/s, links {machine.link:,.0f} GB/s, network {machine.network:,.0f} GB/s "
        f"({machine.source})"
    )


Row = tuple[str, str, str]


def _memory(found: Plan) -> Iterator[Row]:
    job, held, state = found.job, found.held, division.update(found.job)
    v, g, parameters = job.variables.itemsize, job.gradients.itemsize, sum(job.counts)
    divided = f"1/{job.topology.ranks:,} of {parameters:,} x"
    kept = " + ".join(f"{p.per_element:.4g} {p.name}" for p in state.buckets[0].planes) or "no slots"
    yield "variables", decimal(held.variables), f"{divided} {v}" if job.zero == "fsdp" else f"{parameters:,} x {v}"
    yield "gradients", decimal(held.gradients), f"{divided} {g}" if job.zero in ("2", "fsdp") else f"{parameters:,} x {g}"
    yield "slots and masters", decimal(held.state), f"{state.elements:,} x ({kept})" if job.zero == "0" else f"{divided} ({kept})"
    yield "temporaries", decimal(held.temporaries), TEMPORARIES[job.zero]
    colour, verdict = ("green", "fits") if found.fits else ("red", "does not fit")
    free = found.machine.memory * 1e9 - held.total
    yield f"[{colour}]in all[/]", f"[{colour}]{decimal(held.total)}[/]", f"[{colour}]{verdict}[/]: {free / 1e9:+,.1f} GB for activations"


TEMPORARIES = {
    "0": "a copy of the gradients, in which they are summed",
    "1": "this rank's sums; two buffers of each part's size, through which gradients go",
    "2": "two buffers of each part's size, through which gradients go; the largest gradient",
    "fsdp": "variables and gradients of the largest layer, twice: one in use, one on its way",
}


def _wire(found: Plan) -> Iterator[Row]:
    for one in found.sent:
        how = f"of {decimal(one.payload)}: links {decimal(int(one.link))}, network {decimal(int(one.network))}"
        yield one.what, decimal(int(one.link + one.network)), f"{how}; {_messages(one)}, each {sum(one.steps):,} steps of the ring"
    if not found.sent:
        yield "nothing", decimal(0), "one rank"


def _messages(one: Sent) -> str:
    return f"{one.messages:,} message{'s' * (one.messages > 1)}"


def _time(found: Plan) -> Iterator[Row]:
    job, machine, times, load = found.job, found.machine, found.times, found.load
    passes = {"forward": (times.forward, scale.FORWARD), "backward": (times.backward, scale.BACKWARD)}
    for name, (length, operations) in passes.items():
        how = f"{operations} x {job.model.active:,} x {load.tokens:,} tokens / ({machine.peak:,.0f} TFLOP/s x {load.mfu:g})"
        yield f"{name} pass", _seconds(length), how
    memory = f"at {machine.bandwidth:,.0f} GB/s"
    if times.copies:
        yield "copies of gradients", _seconds(times.copies), f"read and written once {memory}"
    yield "update", _seconds(times.update), f"{decimal(division.update(job).moved)} {memory}"
    for one, floor in zip(found.sent, times.collectives, strict=True):
        links = f"links {_seconds(floor.link)} at {machine.link:,.0f} GB/s"
        network = f"network {_seconds(floor.network)} at {machine.network:,.0f} GB/s"
        yield one.what, _seconds(floor.total), f"the longer of {links}, {network}; latency {_seconds(floor.latency)}; behind {one.behind}"
    yield "exposed", _seconds(times.exposed), "all of these but what hides behind what they are behind"
    yield "[bold]step[/]", f"[bold]{_seconds(times.step)}[/]", "passes, copies, update, and what is exposed"
    best = f"{_seconds(times.least_exposed)} exposed, if sums hid behind backward and variables behind forward"
    yield "step at best", _seconds(times.alone + times.least_exposed), best


def _seconds(value: float) -> str:
    factor, unit = (1e6, "us") if value < 0.9995e-3 else (1e3, "ms") if value < 0.9995 else (1, "s")
    return f"{value * factor:.3g} {unit}" if value * factor < 999.5 else f"{value * factor:,.0f} {unit}"


def _values(found: Plan) -> dict[str, Any]:
    """As JSON: bytes and seconds."""
    job, times = found.job, found.times
    return {
        "model": {"name": job.model.name, "parameters": job.model.parameters, "active": job.model.active, "source": job.model.source},
        "ranks": job.topology._asdict(),
        "machine": found.machine._asdict() | {"latency": found.machine.latency._asdict()},
        "memory": found.held._asdict() | {"total": found.held.total, "fits": found.fits},
        "sent": [
            one._asdict() | {"seconds": floor._asdict() | {"total": floor.total}}
            for one, floor in zip(found.sent, times.collectives, strict=True)
        ],
        "seconds": {name: value for name, value in times._asdict().items() if name != "collectives"}
        | {"step": times.step, "best_step": times.alone + times.least_exposed},
    }
