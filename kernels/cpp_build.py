"""From C++ to a function in this process: the compiler, a cache on disk, the loader."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

COMPILERS = ("g++", "clang++", "c++")
# IEEE results: no contraction to fma, no reassociation. Without the two `-fno-`, square roots and selects stay scalar; they
# give up errno and the exception flags, which nobody reads.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
# (compile, link). First the OpenMP runtime that torch has loaded: a second one's threads would compete with torch's for the
# cores. Then one of its own, then one thread.
THREADING = (("-fopenmp", ()), ("-fopenmp", ("-fopenmp",)), ("-fopenmp-simd", ()))
SECONDS = 120  # for one compilation of half a second


class BuildError(RuntimeError):
    """The compiler or the loader refused a kernel."""


def compiler() -> str | None:
    """The path of a C++ compiler, or None."""
    return next(filter(None, map(shutil.which, COMPILERS)), None)


@functools.cache
def _machine() -> str:
    """What -march=native depends on: a cache may lie on a disk that machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features", "CPU part"))}))
    except OSError:
        return platform.platform() + platform.processor()


@functools.cache
def _version(path: str) -> str:
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=SECONDS)
    return done.stdout.partition("\n")[0]


def cache_folder() -> Path:
    """Where kernels are kept: a folder that only this user can write, because what lies in it is loaded and run."""
    try:
        folder = Path.home() / ".cache" / "fused_kopt"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # no home, a read-only one
        pass
    return _own_folder()


@functools.cache
def _own_folder() -> Path:
    """A folder of this process."""
    return Path(tempfile.mkdtemp(prefix="fused_kopt_"))


def load(source: str) -> ctypes.CDLL:
    """The shared library of a source, from the cache or compiled now. Raises BuildError."""
    path = compiler()
    if path is None:
        raise BuildError(f"no C++ compiler found among {COMPILERS}; install one")
    why = ""
    for compile_flag, link_flags in THREADING:
        commands = ((path, *FLAGS, compile_flag, "-c", "-x", "c++"), (path, "-shared", *link_flags))
        key = hashlib.sha256("\0".join((source, str(commands), _version(path), _machine())).encode()).hexdigest()[:32]
        library = cache_folder() / f"{key}.so"
        for cached in (library.exists(), False):
            try:
                if not cached:
                    _build(source, commands, library)
                return ctypes.CDLL(str(library))
            except (OSError, BuildError) as error:  # a damaged file is built again
                why = str(error)
    raise BuildError(why)


def _build(source: str, commands: tuple[tuple[str, ...], tuple[str, ...]], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        compiled, linked = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        _call((*commands[0], "-", "-o", str(compiled)), source)
        _call((*commands[1], str(compiled), "-o", str(linked)), "")
        linked.replace(library)  # in one piece: another process may be loading it


def _call(command: tuple[str, ...], text: str) -> None:
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} does not run: {error!r}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed with status {done.returncode}: {done.stderr[-2000:]}")
