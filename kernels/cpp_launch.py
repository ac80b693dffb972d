"""Launching the C++ kernel: build once per rule and dtypes, then one call per bucket."""

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fused_kopt.kernels import cpp, cpp_build

# Up to so many elements a second thread costs more (5 us to start, more on a busy machine) than it saves.
ONE_THREAD = 65_536

_counter_lock = threading.Lock()
_launches = 0


_process = os.getpid()


def _call(function: Any, *arguments: Any) -> None:
    """Call a compiled function whose last argument is its number of threads.

    In a forked child the threads that OpenMP keeps for the forking thread are gone, and it would wait for them for ever. A new
    thread gets new ones.
    """
    if arguments[-1] > 1 and os.getpid() != _process:
        thread = threading.Thread(target=function, args=arguments)
        thread.start()
        thread.join()
    else:
        function(*arguments)


def counters() -> tuple[int, int]:
    """Launches in this process so far, and kernels built or read from the cache."""
    return _launches, kernel.cache_info().misses + norm_kernels.cache_info().misses


@functools.cache
def kernel(rule: Any, prepare: Any, scalars: Any, planes: cpp.Planes, dtypes: tuple[torch.dtype, torch.dtype], measured: Any = None) -> Any:
    """The compiled function, see `cpp.update_source`. Shapes, addresses, learning rates and steps are its arguments."""
    library = cpp_build.load(cpp.update_source(rule, prepare, scalars, planes, dtypes, measured))
    return _function(library.update, "ppippii" if measured is None else "ppippipi")


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


class Fixed:
    """What a bucket's launches share."""

    def __init__(self, update: Any) -> None:
        self.blocks = update.blocks(cpp.BLOCK)
        self.address = self.blocks.ctypes.data
        self.threads = update.bucket.segments[-1].end > ONE_THREAD


def _fixed(update: Any) -> Fixed:
    bucket = update.bucket
    if bucket.tables is None:
        bucket.tables = {}
    if "cpp" not in bucket.tables:
        bucket.tables["cpp"] = Fixed(update)
    fixed: Fixed = bucket.tables["cpp"]
    return fixed


def bind(update: Any, prepare: Any, measured: Any = None) -> Callable[[Sequence[float], torch.Tensor | None], None]:
    """A function of the scalars and factors that executes an update (`fused_kopt.execute.Update`): a call per gradient dtype.

    measured: for an update with sums, what of a gradient they are of.
    """
    bucket, fixed = update.bucket, _fixed(update)
    kind: Any = type(update.scalars)
    wide = bucket.compute == torch.float64
    row = (ctypes.c_double if wide else ctypes.c_float) * len(update.scalars)
    planes = bucket.planes(update.names)
    calls = [
        (kernel(update.rule, prepare, kind, planes, (bucket.dtype, dtype), measured), table, table.ctypes.data)
        for dtype, table in update.segment_tables().items()
        if len(fixed.blocks)
    ]

    def launch(scalars: Sequence[float], factors: torch.Tensor | None) -> None:
        global _launches
        if update.gate is not None and not update.gate:
            return
        table = None if update.rows is None else np.ascontiguousarray(update.rows, dtype=np.float64 if wide else np.float32)
        numbers: Any = row(*scalars) if table is None else table.ctypes.data
        if update.current is not None:
            numbers = update.current.data_ptr()
        stride = 0 if update.rows is None else len(scalars)
        threads = torch.get_num_threads() if fixed.threads else 1
        clips = None if factors is None else factors.contiguous()
        clip = None if clips is None else clips.data_ptr()
        for step, _, address in calls:
            with _counter_lock:
                _launches += 1
            sums = None if measured is None else torch.zeros((len(fixed.blocks), 3), dtype=torch.float64, device="cpu")
            more = () if sums is None else (sums.data_ptr(),)
            _call(step, address, fixed.address, len(fixed.blocks), clip, numbers, stride, *more, threads)
            if sums is not None:
                update.sums.add_(sums.sum(dim=0))

    return launch


def square_norms(norms: Any, table: Any, prepare: Any, row: torch.Tensor) -> torch.Tensor:
    """The square norms (`fused_kopt.norms.Norms`) of a segment table's gradients."""
    global _launches
    partial, sums = np.zeros(len(norms.blocks)), torch.empty(len(norms.starts) - 1, dtype=torch.float64, device="cpu")
    square, fold = norm_kernels(prepare, norms.dtypes, norms.BLOCK)
    threads = torch.get_num_threads() if table[:, 2].sum() > ONE_THREAD else 1
    with _counter_lock:
        _launches += 1
    _call(square, table.ctypes.data, norms.blocks.ctypes.data, len(norms.blocks), row.data_ptr(), partial.ctypes.data, threads)
    fold(partial.ctypes.data, norms.starts.ctypes.data, len(sums), sums.data_ptr())
    return sums


def advance(table: torch.Tensor, counter: torch.Tensor, row: torch.Tensor) -> None:
    """`kernels.update.advance` on CPU, where nothing captures: the next row of float[steps, n] into float[n]."""
    row.copy_(table[min(int(counter[0]), int(counter[1]) - 1)])
    counter[0] += 1
