"""Launching the kernel: tables, block sizes, counters, and the choice between the compiler and the interpreter."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import driver, interpreter

from fused_kopt.kernels import rules
from fused_kopt.kernels.update import update_bucket

# At most so many elements per program in the interpreter, where a program costs about 1 ms and 0.15 us per element.
INTERPRETER_BLOCK = 65_536
# 256 threads of 4 elements, 2 in float64: one 128-bit access per float32 or float64 tensor and thread, and few enough
# registers (72) for 28 warps to share a multiprocessor. More elements in flight shuffle layouts where widths mix.
THREADS, BLOCK, WIDE_BLOCK = 256, 1024, 512

TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# TRITON_INTERPRET=1: there is no compiled kernel in this process, and addresses on a device would be read on the host.
INTERPRETED = isinstance(update_bucket, interpreter.InterpretedFunction)

# Triton's interpreter keeps the program index and its patches of triton.language in globals: one launch at a time.
_INTERPRETER_LOCK = threading.Lock()
_counter_lock = threading.Lock()
_launches = 0


def counters() -> tuple[int, int]:
    """Launches and compilations in this process so far."""
    return _launches, 0 if INTERPRETED else sum(len(cache[0]) for cache in update_bucket.device_caches.values())


def interprets(device: torch.device) -> bool:
    """Whether kernels on a device run in Triton's interpreter."""
    return device.type == "cpu"


def block_size(variable: torch.dtype) -> int:
    """Elements per program in a compiled kernel."""
    return WIDE_BLOCK if variable == torch.float64 else BLOCK


def _interpreter_block(segments: Any) -> int:
    """Elements per program in the interpreter: the largest segment's, rounded up to the power of two that a block must be."""
    largest: int = max(segment.numel for segment in segments)
    return min(INTERPRETER_BLOCK, 1 << max(largest - 1, 0).bit_length())


class Tables:
    """A bucket's device tables. The block table depends on shapes alone; the segment table is uploaded when it changes."""

    def __init__(self, blocks: list[tuple[int, int]], device: torch.device) -> None:
        self.grid = len(blocks)
        self.blocks = torch.tensor(blocks, dtype=torch.int32, device=device).reshape(-1, 2)
        self._segments: dict[torch.dtype, tuple[list[tuple[int, ...]], Tensor]] = {}
        self._factors: Tensor | None = None

    def segments(self, rows: list[tuple[int, ...]], dtype: torch.dtype) -> Tensor:
        """The segment table of the gradients of one dtype, int64[n, 4], holding `rows`."""
        if dtype not in self._segments or self._segments[dtype][0] != rows:
            # a new tensor each time: a launch in flight may still read the old one
            self._segments[dtype] = rows, torch.tensor(rows, dtype=torch.int64, device="cpu").to(self.blocks.device)
        return self._segments[dtype][1]

    def unread(self, update: Any) -> Tensor:
        """A table of factors for a launch that leaves gradients as they are."""
        if self._factors is None:
            self._factors = torch.zeros((len(update.variables), 5), dtype=update.bucket.compute, device=self.blocks.device)
        return self._factors


def _rows(update: Any, gradient_dtype: torch.dtype) -> list[tuple[int, ...]]:
    rows: list[tuple[int, ...]] = []
    for segment, variable, gradient in zip(update.bucket.segments, update.variables, update.gradients, strict=True):
        if variable is None or gradient.dtype != gradient_dtype:
            rows.append((0, 0, 0, segment.offset))
        else:
            rows.append((variable.data_ptr(), gradient.data_ptr(), segment.numel, segment.offset))
    return rows


def _tables(update: Any, block: int) -> Tables:
    bucket = update.bucket
    if bucket.tables is None:
        bucket.tables = {}
    if block not in bucket.tables:
        bucket.tables[block] = Tables(update.blocks(block), bucket.device)
    tables: Tables = bucket.tables[block]
    return tables


@dataclass(frozen=True)
class Build:
    """Makes a step's scalars inside the kernel. Triton fails to hash a bare NamedTuple class among a kernel's arguments."""

    scalars: type

    def __call__(self, *values: Any) -> Any:
        return self.scalars(*values)


def _scalar_row(scalars: Sequence[float], dtype: torch.dtype, device: torch.device) -> Any:
    """The scalars as a tuple of the same class that holds pointers to them."""
    row = torch.tensor(scalars, dtype=dtype, device=device)
    return type(scalars)(*row.split(1))


def run(update: Any, prepare: Any) -> None:
    """Launch an update (`fused_kopt.execute.Update`): once, or once per gradient dtype where gradients differ in it."""
    for dtype in dict.fromkeys(g.dtype for g in update.gradients if g is not None):
        _launch(update, prepare, dtype)


def _launch(update: Any, prepare: Any, gradient_dtype: torch.dtype) -> None:
    global _launches
    bucket = update.bucket
    interpret = interprets(bucket.device)
    block = _interpreter_block(bucket.segments) if interpret else block_size(bucket.dtype)
    tables = _tables(update, block)
    if not tables.grid:
        return
    by_pointer = interpret or bucket.compute == torch.float64
    scalars = _scalar_row(update.scalars, bucket.compute, bucket.device) if by_pointer else update.scalars
    factors = tables.unread(update) if update.factors is None else update.factors
    arguments = (tables.segments(_rows(update, gradient_dtype), gradient_dtype), tables.blocks, factors, update.slots, scalars)
    wrap = rules.interpreted if interpret else rules.compiled
    constants = {
        "RULE": wrap(update.rule),
        "PREPARE": wrap(prepare),
        "SCALARS": Build(type(update.scalars)) if by_pointer else None,
        "VARIABLE": TRITON_DTYPE[bucket.dtype],
        "GRADIENT": TRITON_DTYPE[gradient_dtype],
        "COMPUTE": TRITON_DTYPE[bucket.compute],
        "BLOCK": block,
    }
    with _counter_lock:
        _launches += 1
    if interpret:
        _interpret(tables.grid, arguments, constants)
    else:
        with torch.cuda.device_of(factors):  # Triton launches on the current device, whatever its arguments lie on
            for tensor in (t for t in (*arguments[:3], *update.slots) if t.is_cuda):
                tensor.record_stream(torch.cuda.current_stream())  # it may have been made on another stream
            warps = THREADS // driver.active.get_current_target().warp_size
            # explicit: the default of enable_fp_fusion flips between Triton releases, and with it the bits
            update_bucket[(tables.grid,)](*arguments, **constants, num_warps=warps, enable_fp_fusion=False)


def _interpret(grid: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    kernel = interpreter.InterpretedFunction(rules.interpreted(update_bucket.fn))
    with _INTERPRETER_LOCK, np.errstate(all="ignore"):
        kernel[(grid,)](*arguments, **constants)
