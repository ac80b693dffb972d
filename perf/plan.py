"""What a run measures, and how much of each workload fits the machine and the time."""

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from perf import keras3
from perf.cases import OPTIMIZERS, SLOTS, Case
from perf.measure import LEAST, WARM
from perf.peers import PEERS
from perf.providers import Borrowed, Cost, Flat, Provider
from perf.workloads import KERAS3, MODELS, REPLICAS, SWEEP, WORKLOADS, elements, sampled

PROVIDERS: tuple[Provider, ...] = (
    Borrowed("reference", Cost(25, 200, 30)),
    Borrowed("triton", Cost(1.3, 1)),
    Borrowed("compiled", Cost(1.3, 10)),
    Flat("triton", Cost(1.3, 0.1)),
    Flat("compiled", Cost(1.3, 0.1)),
    keras3.OURS,
    *PEERS,
)
HEADLINE = {"cpu": "1x25M", "cuda": "W4"}  # where all optimizers and dtypes are compared
FEW_ELEMENTS = 1_000_000  # up to so many a workload is about its tensors' number, and never sampled for time
LARGE = ("W6", "W8", "W9", "W12", "W13", "W15")  # with few providers, so that more of them fits a GPU
GPU_SPEED = 80  # a GPU's bandwidth over that of the CPU for which Cost is
SETUP_NS = 20  # drawing one element on CPU
MEMORY_SHARE = 0.8


class Entry(NamedTuple):
    """One case of a plan: names, and patterns of provider keys."""

    optimizer: str
    workload: str
    dtype: torch.dtype
    variant: str
    patterns: tuple[str, ...]


EVERY = ("*",)
FAST = ("fused_kopt-[!rk]*", "torch-*", "keras-torch", "optimi-*", "flashoptim-*")  # all but the reference
FEW = ("fused_kopt-[!rk]*", "torch-fused")
HOST = ("fused_kopt-[!k]*", "torch-*", "keras-torch")
KERAS = ("fused_kopt-keras-*", "keras-*")


def default_plan(device: torch.device) -> list[Entry]:
    """The most telling cases first: what the time does not allow, falls off the end."""
    f32, headline = torch.float32, HEADLINE[device.type]
    entries = [Entry(name, headline, f32, "plain", EVERY if name == "adam" else FAST) for name in ("adam", *OPTIMIZERS)]
    entries += [Entry("adam", headline, dtype, "plain", FAST) for dtype in (torch.bfloat16, torch.float16)]
    entries += [Entry("adam", name, f32, "plain", HOST) for name in SWEEP]
    entries += [Entry(name, "5000x64", f32, "plain", HOST) for name in ("adam", *OPTIMIZERS)]
    entries += [Entry("adam", name, f32, "plain", FEW if name in LARGE else FAST) for name in MODELS + REPLICAS]
    entries += [Entry("adam", name, f32, kind, FAST) for kind in ("clip", "fresh") for name in ("25x1M", "5000x64", "W1")]
    entries += [Entry("adam", name, f32, kind, KERAS) for name in KERAS3 for kind in ("plain", "clip", "average")]
    entries += [Entry(name, workload, f32, "plain", KERAS) for workload in KERAS3 for name in OPTIMIZERS]
    merged: dict[Entry, Entry] = {}
    for entry in entries:
        case = entry._replace(patterns=())
        merged[case] = entry._replace(patterns=(*merged.get(case, case).patterns, *entry.patterns))
    return list(merged.values())


def select(patterns: Sequence[str]) -> list[Provider]:
    """The providers whose keys match; ValueError for a pattern that matches none."""
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(provider.key, pattern) for provider in PROVIDERS):
            keys = ", ".join(provider.key for provider in PROVIDERS)
            raise ValueError(f"No provider matches. Received: {pattern!r}. Providers: {keys}.")
    return [provider for provider in PROVIDERS if any(fnmatch.fnmatchcase(provider.key, pattern) for pattern in patterns)]


def needed_bytes(case: Case, providers: Sequence[Provider]) -> float:
    """Memory of a case: shared variables and gradients, slots of every provider, copies of flattened ones, temporaries."""
    sets = 3 if case.variant == "fresh" else 2
    flat = 2 * sum(isinstance(provider, Flat) for provider in providers)
    slots = SLOTS[case.optimizer] * sum(provider.slot_bytes(case) for provider in providers)
    temporary = max((provider.cost.temporary_bytes for provider in providers), default=0)
    return case.elements * ((sets + flat) * case.dtype.itemsize + slots + temporary)


def needed_seconds(case: Case, providers: Sequence[Provider]) -> float:
    """The least time a case takes, roughly."""
    speed = GPU_SPEED if case.device.type == "cuda" else 1
    steps = sum(provider.cost.seconds(case.elements // speed, len(case.shapes)) for provider in providers)
    return case.elements / speed * SETUP_NS * 1e-9 + (WARM + 1 + LEAST) * steps


def halvings(case: Case, first: int) -> Iterator[Case]:
    """The case with every `first`-th element, then with halves of that, down to tensors of one row."""
    shapes, factor = WORKLOADS[case.workload].shapes, first
    rows = 2
    while rows > 1:
        part = sampled(shapes, factor)
        rows = max(shape[0] for shape in part.shapes)
        yield replace(case, sample=part.sample, shapes=part.shapes)
        factor *= 2


def fit(case: Case, able: Callable[[Case], Sequence[Provider]], free: float, seconds: float, sample: int | None) -> Case:
    """The largest sample that fits memory and time, or the smallest.

    One that was asked for, the headline workload and those of few elements are reduced for memory only.
    """
    few = elements(WORKLOADS[case.workload].shapes) <= FEW_ELEMENTS
    patient = sample is not None or few or case.workload == HEADLINE[case.device.type]
    for smaller in halvings(case, sample or 1):
        case = smaller
        providers = able(smaller)
        fits = needed_bytes(smaller, providers) <= MEMORY_SHARE * free
        if fits and (patient or needed_seconds(smaller, providers) <= seconds):
            break
    return case
