"""`fused-kopt explain`: what the compiled kernels are made of, and how long they must take. Needs no GPU."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from fused_kopt import prepare
from fused_kopt.commands import variants
from fused_kopt.commands.architectures import ARCHITECTURES, Occupancy, floor_seconds, occupancy
from fused_kopt.commands.common import RefusedError, why_not
from fused_kopt.commands.variants import Kernel

# ptxas puts up to so many long-lived values (an address) aside in float64 and in powers, never a whole block's data.
PUT_ASIDE = 8
ABOUT = """Compile kernels offline, without a GPU, and print what their machine code says.

regs, spills: registers per thread, accesses to local memory; shared: bytes of shared memory per program;
loads, stores: one thread's accesses in a full block, number x bits; bytes/elem: what a step must move per element;
instr/elem: instructions per element on the shortest way through a full block (subnormal numbers take a longer one);
warps: how many share a multiprocessor, of how many it holds, and what keeps more away;
floor: the time that moving the bytes takes, at the bandwidth below the table.
Exit code 1: a full block takes more than one access per thread and tensor, or a kernel spills more than 8 times.
2: Triton is missing or cannot compile for the architecture.
Example: fused-kopt explain --optimizer Adam --arch sm_90,gfx942 --dtype float32,bfloat16 --clipped"""


@dataclass(frozen=True)
class Settings:
    """What `fused-kopt explain` was asked for."""

    architectures: tuple[str, ...] = ("sm_90",)
    optimizer: str | None = None
    """None: all."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    """Of variables and gradients."""
    clipped: bool = False
    """Also the kernels that scale and clip."""
    elements: int = variants.ELEMENTS
    bandwidth: float | None = None
    """GB/s; None: the architecture's."""


class Row(NamedTuple):
    """One kernel on one architecture."""

    kernel: Kernel
    dtype: torch.dtype
    clipped: bool
    registers: int
    spilled: int
    shared: int
    loads: tuple[int, ...]
    stores: tuple[int, ...]
    instructions: float
    occupancy: Occupancy

    @property
    def bytes_per_element(self) -> int:
        """What a step must move."""
        return self.kernel.bytes_per_element(self.dtype, self.dtype)

    @property
    def problems(self) -> list[str]:
        """What is worse than it must be."""
        tensors = self.kernel.slots + 2
        found = [f"{self.spilled} accesses to local memory, more than {PUT_ASIDE}"] * (self.spilled > PUT_ASIDE)
        if (len(self.loads), len(self.stores)) != (tensors, tensors - 1):
            accesses = f"{len(self.loads)} loads and {len(self.stores)} stores"
            found.append(f"a thread's part of a full block takes {accesses}, not {tensors} and {tensors - 1}")
        return found


def rows(settings: Settings, architecture: str) -> Iterator[Row]:
    """Compile every kernel that was asked for, one after the other. Raises RefusedError where one does not compile."""
    kernels = variants.kernels(settings.optimizer)
    for kernel, dtype, clipped in itertools.product(kernels, settings.dtypes, (False, True) if settings.clipped else (False,)):
        yield _row(kernel, dtype, clipped, architecture)


def _row(kernel: Kernel, dtype: torch.dtype, clipped: bool, architecture: str) -> Row:
    from fused_kopt.kernels import machine_code, offline

    limits = ARCHITECTURES[architecture]
    config = offline.default(dtype, limits.warp)
    spec = offline.Spec(kernel.rule, prepare.scale_and_clip if clipped else prepare.keep, kernel.scalars, kernel.slots, dtype, dtype)
    try:
        code = offline.build(spec, architecture, config)
        block = machine_code.full_block(code.text, amd=limits.warp == 64)
    except Exception as error:  # whatever the compiler or its tools raise
        raise RefusedError(f"the kernel of {kernel.name} for {architecture} cannot be compiled and read: {error!r}") from error
    instructions = block.instructions * config.warps * limits.warp / config.block
    fit = occupancy(limits, code.registers, code.shared, config.warps)
    resources = (code.registers, code.spilled, code.shared)
    return Row(kernel, dtype, clipped, *resources, block.loads, block.stores, instructions, fit)


def explain(settings: Settings, console: Console) -> int:
    """Print a table per architecture; see `fused-kopt explain --help`. Returns the exit code.

    Raises RefusedError where Triton is missing or cannot compile for an architecture.
    """
    if (reason := why_not("triton")) is not None:
        raise RefusedError(f"kernels cannot be compiled: {reason}")
    from fused_kopt.kernels import offline

    problems = []
    for name in settings.architectures:
        if (reason := offline.why_not(name)) is not None:
            raise RefusedError(f"--arch {name}: {reason}")
        count = len(variants.kernels(settings.optimizer)) * len(settings.dtypes) * (1 + settings.clipped)
        found = list(track(rows(settings, name), f"compiling for {name}", count, console=Console(stderr=True), transient=True))
        console.print(_table(settings, name, found))
        problems += [f"{name} {row.kernel.name} {_dtype(row)}: {problem}" for row in found for problem in row.problems]
    for problem in problems:
        console.print(f"[red]{problem}[/]", soft_wrap=True)
    return 1 if problems else 0


def _table(settings: Settings, name: str, found: list[Row]) -> Table:
    a = ARCHITECTURES[name]
    bandwidth = settings.bandwidth or a.bandwidth
    source = "as asked" if settings.bandwidth else a.source
    caption = f"floor: {settings.elements:,} elements at {bandwidth:,.0f} GB/s ({source})"
    numbers = ("regs", "spills", "shared", "loads", "stores", "instr/\nelem", "bytes/\nelem", "warps", "floor")
    columns = (Column(heading, justify="right") for heading in numbers)
    table = Table(Column("rule", overflow="fold"), "dtype", *columns, title=f"{name} ({a.gpu})", caption=caption)
    for row in found:
        seconds = floor_seconds(settings.elements, row.bytes_per_element, bandwidth)
        colour = "red" if row.problems else "green"
        accesses = (f"[{colour}]{_widths(sizes)}[/]" for sizes in (row.loads, row.stores))
        fit = f"{row.occupancy.warps}/{a.warps} {row.occupancy.limit}"
        counts = (row.registers, row.spilled, row.shared, *accesses, f"{row.instructions:.1f}", row.bytes_per_element, fit)
        rule = f"{type(row.kernel.optimizer).__name__} {row.kernel.name}"
        table.add_row(rule, _dtype(row), *map(str, counts), f"{seconds * 1e6:,.0f} us")
    return table


def _dtype(row: Row) -> str:
    return str(row.dtype).removeprefix("torch.") + (" clipped" if row.clipped else "")


def _widths(sizes: tuple[int, ...]) -> str:
    return " ".join(f"{count}x{size * 8}" for size, count in sorted(Counter(sizes).items(), reverse=True))
