"""Launching the kernel: tables, block sizes, counters, and the choice between the compiler and the interpreter."""

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import driver, interpreter

from fused_kopt.kernels import rules, tuning
from fused_kopt.kernels.norms import fold, square_blocks
from fused_kopt.kernels.op import GROUP
from fused_kopt.kernels.tuning import Config
from fused_kopt.kernels.update import advance as next_row
from fused_kopt.kernels.update import update_bucket

# At most so many elements per program in the interpreter, where a program costs about 1 ms and 0.15 us per element.
INTERPRETER_BLOCK = 65_536
# 256 threads of 4 elements, 2 in float64: one 128-bit access per float32 or float64 tensor and thread, and few enough
# registers (72) for three programs, 24 warps, to share a multiprocessor. More elements in flight shuffle layouts where widths mix.
THREADS, BLOCK, WIDE_BLOCK = 256, 1024, 512

TRITON_DTYPE = {
    **{torch.float32: tl.float32, torch.float64: tl.float64, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16},
    **{torch.uint8: tl.uint8, torch.int8: tl.int8, torch.int16: tl.int16, torch.int32: tl.int32},
}

# TRITON_INTERPRET=1: there is no compiled kernel in this process, and addresses on a device would be read on the host.
INTERPRETED = isinstance(update_bucket, interpreter.InterpretedFunction)

# Triton's interpreter keeps the program index and its patches of triton.language in globals: one launch at a time.
_INTERPRETER_LOCK = threading.Lock()
_counter_lock = threading.Lock()
_launches = 0


def counters() -> tuple[int, int]:
    """Launches and compilations in this process so far."""
    kernels = () if INTERPRETED else (update_bucket, square_blocks, fold, next_row)
    return _launches, sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


def interprets(device: torch.device) -> bool:
    """Whether kernels on a device run in Triton's interpreter."""
    return device.type == "cpu"


def block_size(variable: torch.dtype) -> int:
    """Elements per program in a compiled kernel."""
    return WIDE_BLOCK if variable == torch.float64 else BLOCK


def default(variable: torch.dtype, warp: int, planes: Sequence[tuple[torch.dtype, int]] = ()) -> Config:
    """The configuration of a launch that was not tuned. warp: threads per warp; planes: of each slot its dtype, and how many
    elements share a value. 8 elements per thread make 64 bits of one byte each: half as many threads take a block then, because
    twice as large a block takes 128 registers where this takes 82 (sm_90, Adam with an int8 remainder)."""
    narrow = any(dtype.itemsize == 1 for dtype, _ in planes)
    return Config(block_size(variable), THREADS // warp // (2 if narrow else 1))


def _interpreter_block(segments: Any) -> int:
    """Elements per program in the interpreter: the largest segment's, rounded up to the power of two that a block must be."""
    largest: int = max(GROUP.value, *(segment.numel for segment in segments))
    return min(INTERPRETER_BLOCK, 1 << max(largest - 1, 0).bit_length())


class Tables:
    """A bucket's device tables. The block table depends on shapes alone; the segment table is uploaded when it changes."""

    def __init__(self, blocks: Any, device: torch.device) -> None:
        self.grid = len(blocks)
        self.device = device
        self.blocks = upload(blocks, device)
        self._segments: dict[torch.dtype, tuple[Any, Any, Tensor]] = {}
        self._factors: Tensor | None = None

    def segments(self, table: Any, dtype: torch.dtype) -> Tensor:
        """A segment table of the gradients of one dtype, on the device. A read-only array is known by identity."""
        if dtype in self._segments:
            given, copy, uploaded = self._segments[dtype]
            if (table is given and not table.flags.writeable) or np.array_equal(table, copy):
                return uploaded
        # a new tensor each time: a launch in flight may still read the old one
        copy = table.copy()
        self._segments[dtype] = table, copy, upload(copy, self.device)
        return self._segments[dtype][2]

    def unread(self, update: Any) -> Tensor:
        """A table of factors for a launch that leaves gradients as they are."""
        if self._factors is None:
            self._factors = torch.zeros((len(update.bucket.segments), 5), dtype=update.bucket.compute, device=self.device)
        return self._factors


def upload(array: Any, device: torch.device) -> Tensor:
    """A numpy array on a device: through pinned memory, which neither waits for the device nor makes it wait."""
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def gated(segments: Tensor, gate: Tensor) -> Tensor:
    """A segment table in which every variable is absent where the gate, int64, is 0."""
    table = segments.clone()
    table[:, 2] *= gate
    return table


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


def scalar_row(scalars: Any, bucket: Any) -> Tensor:
    """Scalars, or a row of them for every segment, on the bucket's device in its compute dtype; 1-D."""
    return upload(np.array(scalars, dtype=np.float64 if bucket.compute == torch.float64 else np.float32).reshape(-1), bucket.device)


def advance(table: Tensor, counter: Tensor, row: Tensor) -> None:
    """Launch `kernels.update.advance`: the next row of float[steps, n] into float[n]."""
    count = row.numel()
    _run(next_row, 1, (table, counter, row), (count, 1 << (count - 1).bit_length()))


@functools.cache
def configuration(
    rule: Any, device: torch.device, dtypes: tuple[torch.dtype, torch.dtype], planes: tuple[tuple[torch.dtype, int], ...] = ()
) -> Config:
    """Block size and warps of a compiled kernel: what `fused-kopt tune` stored for this device, or the defaults."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    tuned = tuning.lookup(tuning.kernel_hash(update_bucket, rules.compiled(rule)), name, dtypes) if name else None
    return tuned or default(dtypes[0], driver.active.get_current_target().warp_size, planes)


def stored(kinds: Sequence[tuple[torch.dtype, int]]) -> tuple[tuple[Any, ...], tuple[int, ...], bool]:
    """The kernel's STORED, GROUPS and GROUPED."""
    groups = tuple(group for _, group in kinds)
    return tuple(TRITON_DTYPE[dtype] for dtype, _ in kinds), groups, max(groups, default=1) > 1


def bind(update: Any, prepare: Any, measured: Any = None) -> Callable[[Sequence[float], Tensor | None], None]:
    """A function of the scalars and factors that launches an update (`fused_kopt.execute.Update`): once per gradient dtype.

    measured: for an update with sums, what of a gradient they are of.
    """
    bucket = update.bucket
    interpret = interprets(bucket.device)
    by_pointer = interpret or bucket.compute == torch.float64 or update.rows is not None or update.current is not None
    stride = 0 if update.rows is None else len(update.scalars)
    wrap, build = rules.interpreted if interpret else rules.compiled, Build(type(update.scalars)) if by_pointer else None
    calls: list[Any] = []
    planes, compute = bucket.planes(update.names), TRITON_DTYPE[bucket.compute]
    for dtype, table in update.segment_tables().items():
        block, warps = _interpreter_block(bucket.segments), 0
        if not interpret:
            block, warps = configuration(update.rule, bucket.device, (bucket.dtype, dtype), planes)
        tables, kinds = _tables(update, block), (TRITON_DTYPE[bucket.dtype], TRITON_DTYPE[dtype], *stored(planes))
        if tables.grid:
            constants = (wrap(update.rule), wrap(prepare), measured and wrap(measured), build, stride, *kinds, compute, block)
            calls.append((tables, tables.segments(table, dtype), constants, warps, []))

    def launch(scalars: Sequence[float], factors: Tensor | None) -> None:
        numbers = scalars
        if by_pointer:
            row = scalar_row(scalars if update.rows is None else update.rows, bucket) if update.current is None else update.current
            numbers = type(scalars)(*(row[i:] for i in range(len(scalars))))
        for tables, segments, constants, warps, known in calls:
            sums = None if measured is None else torch.empty((tables.grid, 3), dtype=torch.float64, device=bucket.device)
            here = segments if update.gate is None else gated(segments, update.gate)
            arguments = (here, tables.blocks, tables.unread(update) if factors is None else factors, numbers, sums)
            _run(update_bucket, tables.grid, arguments, constants, warps, known)
            if sums is not None:
                update.sums.add_(sums.sum(dim=0))

    return launch


def _run(kernel: Any, grid: int, arguments: tuple[Any, ...], constants: tuple[Any, ...], warps: int = 0, known: Any = None) -> None:
    """Launch a kernel. Arguments are tensors, tuples of tensors or floats, or None; the first is a tensor. warps: 0 for the default.

    known: a list that keeps the compiled kernel for the next launch of the same constants and kinds of arguments.
    """
    global _launches
    with _counter_lock:
        _launches += 1
    first: Tensor = arguments[0]
    if interprets(first.device):
        interpreted = interpreter.InterpretedFunction(rules.interpreted(kernel.fn))
        with _INTERPRETER_LOCK, np.errstate(all="ignore"):
            interpreted[(grid,)](*arguments, *constants)
        return
    with torch.cuda.device_of(first):  # Triton launches on the current device, whatever its arguments lie on
        if first.is_cuda:  # its memory may have been made on another stream
            stream = torch.cuda.current_stream()
            for tensor in arguments:
                if isinstance(tensor, Tensor):
                    tensor.record_stream(stream)
        compiled = known[0] if known else _compiled(kernel, arguments, constants, warps)
        if known is not None and not known:
            known.append(compiled)
        compiled[(grid, 1, 1)](*arguments, *constants)


# Compiled kernels by device, constants and kinds of tuples: Triton's own way to them costs a launch three times as much.
_kernels: dict[Any, Any] = {}


def _compiled(kernel: Any, arguments: tuple[Any, ...], constants: tuple[Any, ...], warps: int) -> Any:
    key = (kernel, arguments[0].device, *((type(a), len(a)) for a in arguments if isinstance(a, tuple)), *constants)
    if key not in _kernels:
        warps = warps or THREADS // driver.active.get_current_target().warp_size
        # explicit: the default of enable_fp_fusion flips between Triton releases, and with it the bits
        _kernels[key] = kernel.warmup(*arguments, *constants, grid=(1,), num_warps=warps, enable_fp_fusion=False)
    return _kernels[key]


def square_norms(norms: Any, table: Any, prepare: Any, row: Tensor) -> Tensor:
    """The square norms (`fused_kopt.norms.Norms`) of a segment table's gradients: one launch that reads them, one that folds."""
    if norms.tables is None:
        norms.tables = Tables(norms.blocks, norms.device), upload(norms.starts, norms.device)
    tables, starts = norms.tables
    partial = torch.empty(tables.grid, dtype=torch.float64, device=norms.device)
    sums = torch.empty(len(norms.starts) - 1, dtype=torch.float64, device=norms.device)
    wrap = rules.interpreted if interprets(norms.device) else rules.compiled
    constants = (wrap(prepare), TRITON_DTYPE[norms.dtypes[1]], TRITON_DTYPE[row.dtype], norms.BLOCK // 8)
    if tables.grid:
        _run(square_blocks, tables.grid, (tables.segments(table, norms.dtypes[1]), tables.blocks, row, partial), constants)
    _run(fold, len(sums), (partial, starts, sums), (norms.LANES,))
    return sums
