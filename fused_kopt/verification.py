"""One step through two executors on copies, and what differed."""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fused_kopt import execute, norms
from fused_kopt.buffers import Bucket
from fused_kopt.errors import FusedMismatchError
from fused_kopt.execute import Chosen, Executor, Rule, Update
from fused_kopt.slots import Slot

if TYPE_CHECKING:
    from fused_kopt.optimizer import Optimizer

# Executors' powers differ by up to 2 ulp, which Ftrl's difference of two roots magnifies; a damaged kernel is far off.
POWER_BOUND = 1e-4

# Sums of squares in another order: in float64 every addition of positive numbers errs by 1.1e-16 of the sum so far, and no
# executor adds more than a few thousand one after the other.
SUMS_BOUND = 1e-12

# Elements of the known-answer test: full blocks of every executor, and a tail.
KNOWN = 20_737

_BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True)
class Comparison:
    """One tensor after the reference and after another executor."""

    variable: int
    """Position of the variable."""
    tensor: str
    """"variable", or the slot's name."""
    equal: bool
    """Bit for bit, where NaN equals NaN and the zeros are equal."""
    max_ulp: int
    """Largest distance in units of the last place; 2**63 - 1 where only one is NaN."""
    max_abs: float
    """Largest absolute difference of finite elements."""
    relative: float
    """`max_abs` over the largest finite magnitude that was expected."""


@dataclass(frozen=True)
class Report:
    """What `verify` found."""

    executor: str
    comparisons: tuple[Comparison, ...]

    @property
    def equal(self) -> bool:
        """Whether every variable and slot agrees bit for bit."""
        return all(c.equal for c in self.comparisons)

    def passes(self, exact: bool) -> bool:
        """Whether an executor may be trusted: equal bits, or for rules with a general power agreement within POWER_BOUND."""
        return self.equal or (not exact and all(c.equal or c.relative <= POWER_BOUND for c in self.comparisons))

    def __str__(self) -> str:
        bad = [c for c in self.comparisons if not c.equal]
        if not bad:
            return f"{self.executor}: {len(self.comparisons)} tensors equal the reference bit for bit"
        rows = "".join(f"\n  variable {c.variable} {c.tensor}: {c.max_ulp} ulp, {c.max_abs:.3g} absolute" for c in bad)
        return f"{self.executor}: {len(bad)} of {len(self.comparisons)} tensors differ from the reference{rows}"


def compare(position: int, name: str, expected: Tensor, actual: Tensor) -> Comparison:
    """Compare two tensors of one shape and dtype."""
    if not expected.is_floating_point():
        expected, actual = expected.double(), actual.double()
    # infinities as they are: nan_to_num's default would make them equal to the largest finite number
    first, second = (torch.nan_to_num(t, posinf=math.inf, neginf=-math.inf) for t in (expected, actual))
    equal = bool(torch.equal(first, second) and torch.equal(expected.isnan(), actual.isnan()))
    if equal or not expected.numel():
        return Comparison(position, name, equal, 0, 0.0, 0.0)
    difference, scale = (_largest(t) for t in (expected.double() - actual.double(), expected.double()))
    return Comparison(position, name, False, _ulps(expected, actual), difference, difference / scale if scale else math.inf)


def _largest(values: Tensor) -> float:
    """The largest finite magnitude, or 0."""
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _ulps(expected: Tensor, actual: Tensor) -> int:
    if bool((expected.isnan() != actual.isnan()).any()):
        return int(np.iinfo(np.int64).max)
    differ = (expected != actual) & ~expected.isnan()
    first, second = (_ordered(t[differ].contiguous()) for t in (expected, actual))
    if expected.dtype != torch.float64:
        return int((first - second).abs().max()) if first.numel() else 0
    # exact Python integers: the distance of two float64 may pass 2**63
    return max((abs(a - b) for a, b in zip(first.tolist(), second.tolist(), strict=True)), default=0)


def _ordered(values: Tensor) -> Tensor:
    """Integers in the order of the numbers, neighbours one apart; both zeros are 0."""
    bits = values.view(_BITS[values.dtype]).to(torch.int64)
    low = torch.iinfo(_BITS[values.dtype]).min
    return torch.where(bits < 0, low - bits, bits)


def compare_updates(update: Update, executor: Chosen) -> list[Comparison]:
    """Run an update on two sets of copies, through the reference and through `executor`."""
    expected, actual = update.copy(), update.copy()
    execute.run(expected, "reference")
    execute.run(actual, executor)
    found = [] if expected.sums is None or actual.sums is None else [_compare_sums(expected.sums, actual.sums)]
    for index, (p, q) in enumerate(zip(expected.variables, actual.variables, strict=True)):
        if p is None or q is None:
            continue
        found.append(compare(index, "variable", p, q))
        names = [name for name in update.names if update.bucket.kind(name)[1]]
        found += [compare(index, name, expected.bucket.view(name, index), actual.bucket.view(name, index)) for name in names]
    return found


def _compare_sums(expected: Tensor, actual: Tensor) -> Comparison:
    found = compare(-1, "sums", expected, actual)
    return replace(found, equal=torch.allclose(expected, actual, rtol=SUMS_BOUND, atol=0.0, equal_nan=True))


@functools.cache
def _known_answer(rule: Rule, key: "tuple[Any, ...]", scalars: type, exact: bool, executor: Chosen) -> str | None:
    """Why a freshly compiled kernel cannot be trusted, or None: one launch of full blocks and a tail on made-up numbers.

    Triton's disk cache has no integrity check: a damaged binary would run. Compilation failures show here as well,
    before a step has begun.
    """
    device, dtype, gradient_dtype, stored, planes, clipped, measured = key
    generator = torch.Generator("cpu").manual_seed(0)
    variable, gradient = (torch.rand(KNOWN, generator=generator, device="cpu") + 0.5 for _ in range(2))
    bucket = Bucket(device, dtype, stored)
    variable = variable.to(device, dtype)
    bucket.adopt(*bucket.grown([variable], [Slot(name, 0.25, stored=kept, group=group) for name, (kept, group) in planes]))
    numbers = scalars(*(0.5 + i / 64 for i in range(len(scalars._fields))))  # type: ignore[attr-defined]
    factors = torch.tensor([[1.0, 0.75, 0.5, 1.5, 1.0]], dtype=bucket.compute, device=device) if clipped else None
    update = Update(
        bucket, [variable], [gradient.to(device, gradient_dtype)], tuple(name for name, _ in planes), rule, numbers, exact, factors
    )
    update.sums = torch.zeros(3, dtype=torch.float64, device=device) if measured else None
    try:
        report = Report(executor, tuple(compare_updates(update, executor)))
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernel
    except Exception as error:  # whatever the compiler, its tools or the driver raise
        return f"its kernel does not build or run: {error!r}"
    return None if report.passes(exact) else f"its kernel fails the known-answer test: {report}. Clear the compiler's cache directory."


def proven(update: Update, executor: Chosen, requested: Executor) -> Chosen:
    """The executor, or the reference where `auto` chose another whose kernel does not pass on this device.

    Raises RuntimeError where the executor was asked for by name.
    """
    bucket = update.bucket
    if executor == "reference" or (executor == "triton" and bucket.device.type == "cpu"):
        return executor
    for dtype in update.tables or {g.dtype for g in update.gradients if g is not None}:
        clipped, measured = update.factors is not None, update.sums is not None
        planes = tuple(zip(update.names, bucket.planes(update.names), strict=True))
        key = (bucket.device, bucket.dtype, dtype, bucket.stored, planes, clipped, measured)
        reason = _known_answer(update.rule, key, type(update.scalars), update.exact, executor)
        if _usable(reason, bucket.device, executor, requested) == "reference":
            return "reference"
    return executor


@functools.cache
def _known_norms(dtypes: tuple[torch.dtype, torch.dtype], device: torch.device, executor: Chosen) -> str | None:
    """Why the kernels of square norms cannot be trusted, or None: full blocks, tails, scaled and clipped."""
    generator = torch.Generator("cpu").manual_seed(0)
    gradients = [torch.randn(n, generator=generator, device="cpu").to(device, dtypes[1]) for n in (KNOWN, 1, norms.BLOCK, 5)]
    row = torch.tensor((0.5, 0.75, 1.0, 1.0, 1.0), dtype=dtypes[0], device=device)
    addresses = np.array([g.data_ptr() for g in gradients])
    try:
        found = norms.Norms([g.numel() for g in gradients], dtypes, device).squares(addresses, row, executor)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"its norm kernel does not build or run: {error!r}"
    return None if torch.equal(found, norms.reference(gradients, row)) else "its norm kernel fails the known-answer test."


def proven_norms(dtypes: tuple[torch.dtype, torch.dtype], device: torch.device, executor: Chosen, requested: Executor) -> Chosen:
    """`proven` for the square norms of gradients of `dtypes[1]`, computed in `dtypes[0]`."""
    if executor == "reference" or (executor == "triton" and device.type == "cpu"):
        return executor
    return _usable(_known_norms(dtypes, device, executor), device, executor, requested)


def _usable(reason: str | None, device: torch.device, executor: Chosen, requested: Executor) -> Chosen:
    if reason is not None and requested == executor:
        raise RuntimeError(f"executor={executor!r} is not usable on {device}: {reason} Use executor='auto' or 'reference'.")
    if reason is not None:
        execute.warn_fallback(reason)
        return "reference"
    return executor


def check(updates: Sequence[tuple[Update, Chosen]], written: str) -> None:
    """Raises FusedMismatchError unless every update gives the reference's bits. Writes nothing; `written` says what was."""
    for update, executor in updates:
        report = Report(executor, tuple(compare_updates(update, executor)))
        if not report.passes(update.exact):
            raise FusedMismatchError(f"{report}\n{written} Use executor='reference', and report this.")


def verify(
    optimizer: "Optimizer",
    grads_and_vars: Iterable[tuple[Any, Tensor]],
    executor: Executor = "triton",
    experimental_aggregate_gradients: bool = True,
) -> Report:
    """Run one step on copies through the reference and through `executor`, and compare every variable and slot.

    Neither the optimizer nor the variables change.

    Args:
        optimizer: any optimizer, built or not.
        grads_and_vars: as for `apply_gradients`.
        executor: "triton", "compiled", "reference" or "auto".
        experimental_aggregate_gradients: as for `apply_gradients`; where True, every rank of a process group must call.

    Returns a Report: per variable and slot equal, max_ulp and max_abs; `report.equal` for all of them, `str(report)` to print.
    Raises what `apply_gradients` raises.
    """
    pairs = list(grads_and_vars)
    return Report(executor, tuple(optimizer._compare(pairs, executor, experimental_aggregate_gradients)))
