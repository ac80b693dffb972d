"""Launching the C++ kernel: build once per rule and dtypes, then one call per bucket."""

import ctypes
import functools
import threading
from typing import Any

import numpy as np
import torch

from fused_kopt.kernels import cpp, cpp_build

# Up to so many elements a second thread costs more (about 5 us to start) than it saves.
ONE_THREAD = 16_384

_counter_lock = threading.Lock()
_launches = 0


def counters() -> tuple[int, int]:
    """Launches in this process so far, and kernels built or read from the cache."""
    return _launches, kernel.cache_info().misses


@functools.cache
def kernel(rule: Any, prepare: Any, scalars: Any, slots: int, dtypes: tuple[torch.dtype, torch.dtype]) -> Any:
    """The compiled function; dtypes of variable and gradient. Shapes, addresses, learning rates and steps are its arguments."""
    function = cpp_build.load(cpp.source(rule, prepare, scalars, slots, dtypes)).update
    pointer = ctypes.c_void_p
    function.argtypes = [pointer, pointer, ctypes.c_int64, pointer, pointer, pointer, ctypes.c_int32]
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
        step = kernel(update.rule, prepare, type(update.scalars), len(slots), (bucket.dtype, dtype))
        with _counter_lock:
            _launches += 1
        step(
            table.ctypes.data, blocks.ctypes.data, len(blocks), factors.data_ptr() if factors is not None else None,
            slots.ctypes.data, scalars.ctypes.data, threads,
        )  # fmt: skip
