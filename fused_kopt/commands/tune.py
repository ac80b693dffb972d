"""`fused-kopt tune`: the fastest launch configuration of every kernel on the GPU at hand."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from fused_kopt import prepare
from fused_kopt.commands import variants
from fused_kopt.commands.common import RefusedError, require, why_not, writable
from fused_kopt.commands.variants import Kernel
from fused_kopt.hyperparameters import Step

if TYPE_CHECKING:
    from fused_kopt.kernels.tuning import Config

PICTURE = "fused_kopt_tuning.png"
GAIN = 0.01  # a winner must be so much faster than the default; medians repeat to about half of it
# Bytes of one thread's part of a slot: at least a 64-bit access, at most two of 128 bits, and one where the variable is
# narrower, for more elements per thread would be exchanged through shared memory.
LEAST, MOST, MOST_MIXED = 8, 32, 16
ABOUT = f"""Time every kernel in several block sizes and numbers of warps, and keep the fastest for later processes.

Each configuration runs on buffers made for it, never on your variables: median over 0.1 seconds after a warm-up, caches
flushed between launches. Prints a table per kernel, writes {PICTURE}, and stores each winner that is at least {GAIN:.0%}
faster than the default in ~/.cache/fused_kopt/tuning.json, for this device, Triton version and kernel text; otherwise the
default. Configurations change the time of a step, never a bit of its result. Needs pip install 'fused-kopt[demo]'.
Exit code 2: there is no GPU, or not enough memory on it.
Example: fused-kopt tune --optimizer Adam --dtype float32,bfloat16 --out /tmp"""


@dataclass(frozen=True)
class Settings:
    """What `fused-kopt tune` was asked for."""

    optimizer: str | None = None
    """None: all."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    """Of variables and gradients."""
    elements: int = variants.ELEMENTS
    device: str = "cuda"
    out: Path = Path()
    """Made where it does not exist."""


class Trial(NamedTuple):
    """One configuration's time."""

    config: "Config"
    seconds: float


class Sweep(NamedTuple):
    """All trials of one kernel."""

    kernel: Kernel
    dtype: torch.dtype
    default: "Config"
    trials: list[Trial]

    @property
    def title(self) -> str:
        """The kernel in words."""
        return f"{type(self.kernel.optimizer).__name__} {self.kernel.name}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def winner(self) -> "Config":
        """The fastest; the default, unless another is faster by GAIN."""
        best = min(self.trials, key=lambda trial: trial.seconds)
        default = next((trial.seconds for trial in self.trials if trial.config == self.default), math.inf)
        return best.config if best.seconds <= default * (1 - GAIN) else self.default

    def rate(self, trial: Trial, elements: int) -> float:
        """GB/s of the bytes that a step must move."""
        return elements * self.kernel.bytes_per_element(self.dtype, self.dtype) / trial.seconds / 1e9


class Machine(NamedTuple):
    """Where kernels are timed."""

    name: str
    warp: int
    """Threads per warp."""
    prepare: Callable[[Kernel, torch.dtype], "Callable[[Config], float]"]
    """Makes buffers for a kernel; what it returns gives a configuration's median seconds."""


def candidates(dtype: torch.dtype, warp: int) -> "list[Config]":
    """The configurations that are worth a trial."""
    from fused_kopt.kernels import tuning

    slot = 8 if dtype == torch.float64 else 4
    most = MOST if dtype.itemsize == slot else MOST_MIXED
    every = itertools.starmap(tuning.Config, itertools.product(tuning.BLOCKS, tuning.WARPS))
    return [config for config in every if LEAST <= config.block / (config.warps * warp) * slot <= most]


def tune(settings: Settings, console: Console) -> int:
    """Tune on a GPU; see `fused-kopt tune --help`. Returns the exit code. Raises RefusedError where that is impossible."""
    reason = why_not("triton")
    if reason is None:
        from fused_kopt.kernels import offline

        reason = offline.why_not()
    if reason is None and not torch.cuda.is_available():
        reason = "torch finds no CUDA or ROCm device. Run it where there is one; fused-kopt explain needs none"
    if reason is not None:
        raise RefusedError(f"nothing to tune: {reason}")
    require("tune", {"matplotlib": "matplotlib"})
    device = torch.device(settings.device)
    if (device.index or 0) >= torch.cuda.device_count():
        raise RefusedError(f"--device {device}: there are {torch.cuda.device_count()} devices, numbered from 0")
    with torch.cuda.device(device):
        try:
            return sweep(settings, _gpu(settings.elements, device), console)
        except torch.OutOfMemoryError as error:
            raise RefusedError(f"--elements {settings.elements}: {error} Ask for fewer.") from error


def _gpu(elements: int, device: torch.device) -> Machine:
    from triton.testing import do_bench

    from fused_kopt.kernels import offline, scratch

    def prepared(kernel: Kernel, dtype: torch.dtype) -> "Callable[[Config], float]":
        spec = offline.Spec(kernel.rule, prepare.keep, kernel.scalars, kernel.slots, dtype, dtype)
        scalars = [float(x) for x in kernel.optimizer.scalars(Step(0, spec.compute))]
        buffers = scratch.Scratch(spec, scalars, elements, device)
        return lambda config: float(do_bench(buffers.launcher(config), return_mode="median")) / 1e3

    return Machine(torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).warp_size, prepared)


def sweep(settings: Settings, machine: Machine, console: Console) -> int:
    """Time, show, store and draw. Returns the exit code. Raises RefusedError where a file cannot be written."""
    writable(settings.out)
    sweeps: list[Sweep] = []
    cases = list(itertools.product(variants.kernels(settings.optimizer), settings.dtypes))
    for kernel, dtype in track(cases, f"tuning on {machine.name}", console=Console(stderr=True), transient=True):
        done = _time(kernel, dtype, machine)
        console.print(_table(done, settings.elements))
        file = _store(done, machine)  # now: an interruption loses nothing
        sweeps.append(done)
    path = settings.out / PICTURE
    plot(sweeps, settings.elements, path, machine.name)
    console.print(f"plot: {path}\nwinners, for processes that start from now on: {file}", soft_wrap=True)
    return 0


def _time(kernel: Kernel, dtype: torch.dtype, machine: Machine) -> Sweep:
    from fused_kopt.kernels import offline

    seconds = machine.prepare(kernel, dtype)
    trials = [Trial(config, seconds(config)) for config in candidates(dtype, machine.warp)]
    return Sweep(kernel, dtype, offline.default(dtype, machine.warp), trials)


def _store(done: Sweep, machine: Machine) -> Path:
    from fused_kopt.kernels import offline, tuning

    try:
        return tuning.store(offline.hash_of(done.kernel.rule), machine.name, (done.dtype, done.dtype), done.winner)
    except (OSError, RuntimeError) as error:
        raise RefusedError(f"the winner cannot be stored: {error}. Make the directory writable.") from error


def _table(done: Sweep, elements: int) -> Table:
    columns = (Column(heading, justify="right") for heading in ("block", "warps", "median", "GB/s"))
    table = Table(*columns, "", title=done.title)
    for trial in done.trials:
        won = trial.config == done.winner
        marks = ["winner"] * won + ["default"] * (trial.config == done.default)
        numbers = (str(trial.config.block), str(trial.config.warps), f"{trial.seconds * 1e6:,.1f} us", f"{done.rate(trial, elements):,.0f}")
        table.add_row(*numbers, ", ".join(marks), style="green" if won else None)
    return table


def plot(sweeps: Sequence[Sweep], elements: int, path: Path, device: str) -> None:
    """Write GB/s over configurations as a PNG, a line per kernel, its winner marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    for index, done in enumerate(sweeps):
        names, rates = ([f"{t.config.block}/{t.config.warps}" for t in done.trials], [done.rate(t, elements) for t in done.trials])
        axes.plot(names, rates, label=done.title, color=f"C{index}", marker=".", linestyle="-" if index // 10 % 2 == 0 else "--")
        winner = [i for i, trial in enumerate(done.trials) if trial.config == done.winner]
        axes.plot([names[i] for i in winner], [rates[i] for i in winner], color=f"C{index}", marker="o", markersize=9)
    axes.set(xlabel="elements per program / warps", ylabel="GB/s", title=f"{device}, {elements:,} elements; large dots: winners")
    axes.set_ylim(bottom=0)
    axes.grid(True, linewidth=0.3, alpha=0.6)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path)
