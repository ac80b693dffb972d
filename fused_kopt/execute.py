"""Executors: the same rule on torch (`reference`), in one fused launch (`triton`), or in compiled C++ (`compiled`)."""

import functools
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fused_kopt import layout, prepare, reference
from fused_kopt.buffers import Bucket

Executor = Literal["auto", "reference", "triton", "compiled"]
Chosen = Literal["reference", "triton", "compiled"]
EXECUTORS: tuple[Executor, ...] = ("auto", "reference", "triton", "compiled")

# From so much work `auto` compiles on CPU: building takes 0.3 s once per machine, rule and dtypes. An element of Adam
# costs the reference 10 ns, a tensor 60 us.
WORTH_COMPILING, PER_TENSOR = 1 << 16, 1 << 12

# (p, g, slots, s) -> (p, slots); p, g and slots have one shape and dtype, s holds the step's scalars
Rule = Callable[[Any, Any, tuple[Any, ...], Any], tuple[Any, tuple[Any, ...]]]


@dataclass
class Update:
    """One launch: a bucket, the tensors present in this step, and what to do with them."""

    bucket: Bucket
    variables: list[Tensor | None]
    """Per segment: the borrowed variable in the segment's layout, or None where it has no gradient in this step."""
    gradients: list[Tensor | None]
    """Per segment, in the segment's layout; float16, bfloat16, float32 or float64."""
    names: tuple[str, ...]
    """Slot names in rule order."""
    rule: Rule
    scalars: Sequence[float]
    """A NamedTuple of Python floats, rounded to the bucket's compute dtype."""
    exact: bool = True
    """Whether executors owe each other equal bits; False for rules with a general power."""
    factors: Tensor | None = None
    """Compute dtype [segments, 5]: see fused_kopt.prepare. None: all neutral."""
    rows: Any = None
    """Per segment its scalars, where they differ: a sequence of rows, or an array [segments, scalars] of the compute dtype."""
    current: Tensor | None = None
    """Compute dtype, 1-D: where launches read `scalars` (or all `rows`) on the device, in place of these."""
    tables: dict[torch.dtype, Any] | None = None
    """What `segment_tables` returns, where the addresses are known without the tensors."""
    sums: Tensor | None = None
    """float64 [3] on the bucket's device, to which the launch adds the squares of the gradients (`prepare.scale`), of the steps and
    of the new variables, both as stored. None: no sums."""
    gate: Tensor | None = None
    """int64, 0-d, on the bucket's device: 0 where the launch must leave everything as it is. None: 1."""

    def blocks(self, block: int) -> Any:
        """The block table of the bucket."""
        return layout.blocks([segment.numel for segment in self.bucket.segments], block)

    def segment_tables(self) -> dict[torch.dtype, Any]:
        """A segment table by gradient dtype, one launch each.

        int64 [segments, 3 + slots]: address of the variable, of the gradient, elements (0: absent in this launch), addresses
        of the slots.
        """
        if self.tables is not None:
            return self.tables
        tables = {}
        slots = np.array([self.bucket.addresses(name) for name in self.names]).T if self.names else 0
        for dtype in dict.fromkeys(g.dtype for g in self.gradients if g is not None):
            tables[dtype] = np.zeros((len(self.gradients), 3 + len(self.names)), dtype=np.int64)
            tables[dtype][:, 3:] = slots
            for row, segment, v, g in zip(tables[dtype], self.bucket.segments, self.variables, self.gradients, strict=True):
                if v is not None and g is not None and g.dtype == dtype:
                    row[:3] = v.data_ptr(), g.data_ptr(), segment.numel
        return tables

    def copy(self) -> "Update":
        """The same update on copies of the variables and slots. Gradients are shared: nothing writes them."""
        bucket = Bucket(self.bucket.device, self.bucket.dtype, self.bucket.stored, self.bucket.policy)
        bucket.kinds = self.bucket.kinds
        variables = [v if v is None else layout.clone(v, v.stride()) for v in self.variables]
        flat = {name: self.bucket.flat[name].clone() for name in self.names if name in self.bucket.flat}
        bucket.adopt(list(self.bucket.variables), list(self.bucket.segments), flat)
        if not flat:
            borrowed = {name: self.bucket.views[name] for name in self.names if self.bucket.kind(name)[1]}
            bucket.borrow({name: [layout.clone(v, v.stride()) for v in views if v is not None] for name, views in borrowed.items()})
        return replace(self, bucket=bucket, variables=variables, sums=None if self.sums is None else torch.zeros_like(self.sums))


def bind(update: Update, executor: Chosen) -> Callable[[Sequence[float], Tensor | None], None]:
    """A function of scalars and factors that executes an update at its present addresses: what repeated steps call."""
    how, what = (prepare.keep, prepare.keep) if update.factors is None else (prepare.scale_and_clip, prepare.scale)
    measured = None if update.sums is None else what
    if executor == "triton":
        from fused_kopt.kernels import launch

        return launch.bind(update, how, measured)
    from fused_kopt.kernels import cpp_launch

    return cpp_launch.bind(update, how, measured)


@functools.cache
def why_not_triton() -> str | None:
    """Why the triton executor is unavailable in this process, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install 'fused-kopt[triton]'"
    try:
        from fused_kopt.kernels import launch  # noqa: F401
    except Exception as error:  # Triton's import runs its backends' discovery, which fails in its own ways
        return f"Triton does not import: {error!r}"
    return None


def choose(executor: Executor, device: torch.device, elements: int = 0, tensors: int = 0) -> Chosen:
    """The executor for so many variables on `device`, with so many elements in all.

    `auto`: triton on a GPU; on CPU compiled where it pays (WORTH_COMPILING), else the reference. Raises RuntimeError where
    an executor was asked for by name and is unavailable.
    """
    wanted: Chosen = executor if executor != "auto" else _automatic(device, elements + PER_TENSOR * tensors)
    reason = _why_not(wanted, device)
    if reason is None:
        return wanted
    if executor != "auto":
        raise RuntimeError(f"executor={executor!r} is not available: {reason}. Use executor='auto' or 'reference'.")
    warn_fallback(reason)
    return "reference"


def _automatic(device: torch.device, work: int) -> Chosen:
    if device.type != "cpu":
        return "triton"
    return "compiled" if work >= WORTH_COMPILING else "reference"


def _why_not(executor: Chosen, device: torch.device) -> str | None:
    if executor == "triton":
        return why_not_triton() or _why_not_on(device)
    return why_not_compiled(device) if executor == "compiled" else None


def why_not_compiled(device: torch.device) -> str | None:
    """Why the compiled executor is unavailable, or None."""
    if device.type != "cpu":
        return f"it runs on CPU tensors, not on {device.type}"
    from fused_kopt.kernels import cpp_build

    return None if cpp_build.compiler() else f"no C++ compiler found among {cpp_build.COMPILERS}; install one"


def _why_not_on(device: torch.device) -> str | None:
    from fused_kopt.kernels import launch

    if launch.INTERPRETED and not launch.interprets(device):
        return "TRITON_INTERPRET=1 runs kernels on CPU tensors only; unset it before Triton is imported"
    return None


@functools.cache
def warn_fallback(reason: str) -> None:
    """Say once per reason that steps take the slow road."""
    warnings.warn(f"fused_kopt falls back to the reference executor, which is slower: {reason}", RuntimeWarning, stacklevel=2)


def run(update: Update, executor: Chosen) -> None:
    """Execute one update in place."""
    if executor == "reference":
        with torch.no_grad():
            reference.run(update)
    else:
        bind(update, executor)(update.scalars, update.factors)


def advance(table: Tensor, counter: Tensor, row: Tensor, executor: Chosen) -> None:
    """Put the next row of a table of scalars, compute dtype [steps, n], into `row`. counter: int64 [2] = row to come, rows."""
    if executor == "triton":
        from fused_kopt.kernels import launch

        launch.advance(table, counter, row)
    else:
        from fused_kopt.kernels import cpp_launch

        cpp_launch.advance(table, counter, row)


def square_norms(norms: Any, table: Any, row: Tensor, executor: Chosen) -> Tensor:
    """The square norms (`fused_kopt.norms.Norms`) of a segment table's gradients, by an executor that reads addresses."""
    with torch.no_grad():
        if executor == "triton":
            from fused_kopt.kernels import launch

            return launch.square_norms(norms, table, prepare.scale_and_bound, row)
        from fused_kopt.kernels import cpp_launch

        return cpp_launch.square_norms(norms, table, prepare.scale_and_bound, row)


class Stats(NamedTuple):
    """Counters since the process started; all 0 while every step ran on the reference."""

    launches: int = 0
    """Kernel launches, in the interpreter and in C++ too."""
    compilations: int = 0
    """Kernels compiled by Triton or C++, or read from their disk caches; the interpreter compiles none."""


def stats() -> Stats:
    """How many kernels were launched and compiled in this process: one launch per bucket and step is the promise."""
    loaded = [sys.modules.get(f"fused_kopt.kernels.{name}") for name in ("launch", "cpp_launch")]
    counts = [module.counters() for module in loaded if module is not None]
    return Stats(*map(sum, zip(*counts, strict=True))) if counts else Stats()
