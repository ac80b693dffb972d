"""The loop: providers take turns on the same tensors, after warm-up."""

import functools
import gc
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch

from perf.cases import Case, Runner, Tensors
from perf.clocks import Clock, Sample
from perf.providers import Provider

WARM = 3
LEAST, MOST = 5, 101  # repetitions
Log = Callable[[str], None]
T = TypeVar("T")


class Result(NamedTuple):
    """What a provider did on a case."""

    provider: Provider
    samples: list[Sample]
    peak_bytes: int


class Outcome(NamedTuple):
    """The results of a case, and the keys of the providers that raised."""

    results: list[Result]
    failed: list[str]


def take_turns(runners: Mapping[str, tuple[Runner, int]], clock: Clock, seconds: float) -> dict[str, list[Sample]]:
    """Repetitions per key, interleaved: each runner has an equal share of the time, and LEAST to MOST repetitions.

    Every round starts with another runner, so that none always follows the same one. `runners` holds each with the
    bytes that its step moves.
    """
    taken: dict[str, list[Sample]] = {key: [] for key in runners}
    share = seconds / max(1, len(runners))
    active, turn = list(runners), 0
    while active:
        first = turn % len(active)
        for key in active[first:] + active[:first]:
            taken[key].append(clock.measure(*runners[key]))
        turn += 1
        active = [key for key in active if len(taken[key]) < LEAST or (len(taken[key]) < MOST and spent(taken[key]) < share)]
    return taken


def spent(samples: Sequence[Sample]) -> float:
    """Seconds that repetitions took, about."""
    return sum(max(sample) for sample in samples)


def measure(case: Case, providers: Sequence[Provider], clock: Clock, seconds: float, log: Log) -> Outcome:
    """Run a case with the providers that can run it; one that raises is left out, and logged."""
    tensors = Tensors(case)
    attempt = functools.partial(attempted, log=log)
    # all are made before any is warmed up: making torch.compile'd ones resets what was compiled
    runners = attempt({provider.key: functools.partial(provider.make, case, tensors) for provider in providers})
    peaks = attempt({key: functools.partial(warm, runner, clock) for key, runner in runners.items()})
    running = [provider for provider in providers if provider.key in peaks]
    gc.collect()
    gc.freeze()  # a collection would scan every peer's objects during ours
    try:
        taken = take_turns({p.key: (runners[p.key], case.bytes(p.slot_bytes(case))) for p in running}, clock, seconds)
    finally:
        gc.unfreeze()
    results = [Result(p, taken[p.key], peaks[p.key]) for p in running]
    return Outcome(results, [p.key for p in providers if p not in running])


def attempted(jobs: Mapping[str, Callable[[], T]], log: Log) -> dict[str, T]:
    """What the jobs return, without those that raise: one peer must not end the run of the others."""
    done = {}
    for key, job in jobs.items():
        try:
            done[key] = job()
        except Exception:
            log(f"  failed: {key}\n{traceback.format_exc()}")
    return done


def warm(runner: Runner, clock: Clock) -> int:
    """Steps that compile and create slots; then one for its peak memory."""
    for _ in range(WARM):
        runner.prepare()
        runner.step()
    return clock.peak(runner)


def release(device: torch.device) -> None:
    """Give a case's memory back before the next one."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
