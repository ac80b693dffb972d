"""Launching the C++ kernel: build once per rule and dtypes, then one call per bucket."""

import ctypes
import functools
import threading
from typing import Any

import numpy as np
import torch

from fused_kopt.kernels import cpp, cpp_build

# Up to so many elements a second thread costs more (5 us to start, more on a busy machine) than it saves.
ONE_THREAD = 65_536

_counter_lock = threading.Lock()
_launches = 0


def counters() -> tuple[int, int]:
    """Launches in this process so far, and kernels built or read from the cache."""
    return _launches, kernel.cache_info().misses + norm_kernels.cache_info().misses


@functools.cache
def kernel(rule: Any, prepare: Any, scalars: Any, slots: int, dtypes: tuple[torch.dtype, torch.dtype]) -> Any:
    """The compiled function; dtypes of variable and gradient. Shapes, addresses, learning rates and steps are its arguments."""
    return _function(cpp_build.load(cpp.update_source(rule, prepare, scalars, slots, dtypes)).update, "ppipppi")


@functools.cache
def norm_kernels(prepare: Any, dtypes: tuple[torch.dtype, torch.dtype], block: int) -> tuple[Any, Any]:
    """The compiled functions `square_norms` and `fold`."""
    library = cpp_build.load(cpp.norm_source(prepare, dtypes, block))
    return _function(library.square_norms, "ppippi"), _function(library.fold, "ppip")


def _function(function: Any, arguments: str) -> Any:
    """p: an address or None, i: an int64; the last i of a list is the number of threads, int32."""
    kinds = [ctypes.c_void_p if kind == "p" else ctypes.c_int64 for kind in arguments]
    function.argtypes = [*kinds[:-1], ctypes.c_int32 if arguments[-1] == "i" else kinds[-1]]
    function.restype = None
    return function


def run(update: Any, prepare: Any) -> None:
    """Execute an update (`fused_kopt.execute.Update`) in place: one call per gradient dtype."""
    global _launches
    bucket = update.bucket
    if bucket.tables is None:
        bucket.tables = {}
    if "cpp" not in bucket.tables:
        bucket.tables["cpp"] = update.blocks(cpp.BLOCK)
    blocks = bucket.tables["cpp"]
    if not len(blocks):
        return
    scalars = np.array(update.scalars, dtype=np.float64 if bucket.compute == torch.float64 else np.float32)
    slots = np.array([flat.data_ptr() for flat in update.slots], dtype=np.int64)
    factors = None if update.factors is None else update.factors.contiguous()
    threads = torch.get_num_threads() if bucket.segments[-1].end > ONE_THREAD else 1
    for dtype, table in update.segment_tables().items():
        kind: Any = type(update.scalars)
        step = kernel(update.rule, prepare, kind, len(slots), (bucket.dtype, dtype))
        with _counter_lock:
            _launches += 1
        step(
            table.ctypes.data, blocks.ctypes.data, len(blocks), factors.data_ptr() if factors is not None else None,
            slots.ctypes.data, scalars.ctypes.data, threads,
        )  # fmt: skip


def square_norms(norms: Any, table: Any, prepare: Any, row: torch.Tensor) -> torch.Tensor:
    """The square norms (`fused_kopt.norms.Norms`) of a segment table's gradients."""
    global _launches
    partial, sums = np.zeros(len(norms.blocks)), torch.empty(len(norms.starts) - 1, dtype=torch.float64, device="cpu")
    square, fold = norm_kernels(prepare, norms.dtypes, norms.BLOCK)
    threads = torch.get_num_threads() if table[:, 2].sum() > ONE_THREAD else 1
    with _counter_lock:
        _launches += 1
    square(table.ctypes.data, norms.blocks.ctypes.data, len(norms.blocks), row.data_ptr(), partial.ctypes.data, threads)
    fold(partial.ctypes.data, norms.starts.ctypes.data, len(sums), sums.data_ptr())
    return sums
