"""The command line: `fused-kopt demo | verify | info`. Exit codes: 0 success, 1 a failed check, 2 a wrong or impossible request."""

import argparse
import functools
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Column, Table
from torch import Tensor

import fused_kopt
from fused_kopt import SGD, Adadelta, Adagrad, Adam, Adamax, Ftrl, Lion, Nadam, RMSprop, demo, execute, verification
from fused_kopt.execute import EXECUTORS, Executor
from fused_kopt.optimizer import Optimizer

# Every rule, and the clipping before it. The first word is what `verify --optimizer` selects.
VARIANTS: dict[str, Callable[[], Optimizer]] = {
    "sgd": lambda: SGD(0.1),
    "sgd momentum": lambda: SGD(0.1, momentum=0.9),
    "sgd nesterov": lambda: SGD(0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda: RMSprop(0.01),
    "rmsprop momentum": lambda: RMSprop(0.01, momentum=0.9),
    "rmsprop centered": lambda: RMSprop(0.01, centered=True),
    "rmsprop centered momentum": lambda: RMSprop(0.01, momentum=0.9, centered=True),
    "adam": lambda: Adam(0.01),
    "adam amsgrad": lambda: Adam(0.01, amsgrad=True),
    "adam clipvalue decay": lambda: Adam(0.01, clipvalue=0.5, decay=0.1),
    "adadelta": lambda: Adadelta(1.0),
    "adagrad": lambda: Adagrad(0.1),
    "adamax": lambda: Adamax(0.01),
    "nadam": lambda: Nadam(0.01),
    "ftrl": lambda: Ftrl(0.1, l1_regularization_strength=0.01, l2_regularization_strength=0.1, beta=0.1),
    "ftrl shrinkage": lambda: Ftrl(0.1, l2_shrinkage_regularization_strength=0.1),
    "ftrl power": lambda: Ftrl(0.1, learning_rate_power=-0.3),
    "ftrl power shrinkage": lambda: Ftrl(0.1, learning_rate_power=-0.3, l2_shrinkage_regularization_strength=0.1),
    "lion": lambda: Lion(0.01),
}
ALLOWED_ULP = {"ftrl power": 2, "ftrl power shrinkage": 2}  # a power that is not a square root; all others are exact
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# 0-d, one element, odd, transposed, a block of a compiled kernel (1,024) and of the interpreter (65,536) and a little more
SHAPES = ((), (1,), (7, 3), (33, 31), (1025,), (65_541,))
_AS_IS = argparse.RawDescriptionHelpFormatter
EXAMPLES = """examples:
  fused-kopt demo                                train with all eight optimizers, write the loss curves
  fused-kopt verify --optimizer adam --steps 20  compare Adam's kernels with the reference
  fused-kopt info                                what runs on this machine
exit codes: 0 success, 1 a check failed, 2 a wrong or impossible request"""
DEMO = f"""Train a small convolutional network on scikit-learn's digits with each optimizer, in a custom training loop.

Every {demo.VERIFY_EVERY}th step also runs on copies through the reference. On a machine without a GPU the kernel runs in
Triton's interpreter, about a minute in all. Needs pip install 'fused-kopt[demo]'.
Exit code 1: a verified step differs from the reference, or a test accuracy is below {demo.MIN_ACCURACY:.0%}.
Example: fused-kopt demo --optimizers adam,ftrl --epochs 5 --out /tmp"""
VERIFY = """Run every optimizer and variant, in float32, float64, bfloat16 and float16, through every executor.

Each runs beside the reference on ragged sizes, with gradients of nine decades, infinities, NaN, denormals and sparse ones,
without ever being re-synchronised; all variables and slots are compared after every step. They must be equal bit for bit;
Ftrl with a power other than -0.5 may differ by 2 ulp (units in the last place). About 20 seconds on a CPU.
Exit code 1: something differs by more. 2: there is no executor besides the reference."""


class Row(NamedTuple):
    """One line of `verify`."""

    variant: str
    dtype: torch.dtype
    executor: str
    tensors: int
    max_ulp: int
    error: str

    @property
    def failed(self) -> bool:
        """Whether the executor raised, or differs by more than the contract allows."""
        return bool(self.error) or self.max_ulp > ALLOWED_ULP.get(self.variant, 0)

    @property
    def result(self) -> str:
        """A few words for the table."""
        if self.failed:
            return "[red]error[/]" if self.error else "[red]DIFFERS[/]"
        return "[yellow]within 2 ulp[/]" if self.max_ulp else "[green]equal[/]"


def _variables(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in SHAPES]
    return [v.t() if v.shape == (33, 31) else v for v in values]


def _decades(like: Tensor, generator: torch.Generator) -> Tensor:
    sign, size = (torch.randn(like.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return (sign * 10 ** (1.5 * size - 2)).to(like.device, like.dtype)


@functools.lru_cache(maxsize=1)
def _gradients(dtype: torch.dtype, device: torch.device, steps: int) -> list[list[Tensor]]:
    """Gradients of every step: nine decades; from the second step on also special values, and sparse ones for a matrix and a vector."""
    generator, limits = torch.Generator().manual_seed(1), torch.finfo(dtype)
    special = [0.0, -0.0, limits.tiny, limits.tiny * limits.eps, limits.max, -limits.max, float("inf"), -float("inf"), float("nan")]
    every = [[_decades(v, generator) for v in _variables(dtype, device)] for _ in range(steps)]
    for found in every[1:]:
        found[2].view(-1)[: len(special)] = torch.tensor(special, dtype=torch.float64).to(device, dtype)
        for position in (3, 4):
            found[position][::2] = 0
            found[position] = found[position].to_sparse(1)
    return every


def compare(variant: str, dtype: torch.dtype, executor: Executor, device: torch.device, steps: int) -> Row:
    """Run a variant through the reference and an executor side by side, never re-synchronised, comparing after every step."""
    expected, actual = _variables(dtype, device), _variables(dtype, device)
    first, second = VARIANTS[variant](), VARIANTS[variant]()
    first.executor, second.executor = "reference", executor
    tensors = max_ulp = 0
    for gradients in _gradients(dtype, device, steps):
        first.apply_gradients(zip(gradients, expected, strict=True))
        try:
            second.apply_gradients(zip(gradients, actual, strict=True))
        except RuntimeError as error:  # a kernel that does not build or run on this machine: the other rows still count
            return Row(variant, dtype, executor, tensors, max_ulp, str(error))
        for a, b in zip([*expected, *first.weights[1:]], [*actual, *second.weights[1:]], strict=True):
            max_ulp = max(max_ulp, verification.compare(tensors, "", a, b).max_ulp)
            tensors += 1
    return Row(variant, dtype, executor, tensors, max_ulp, "")


def _why_not(executor: Executor) -> str | None:
    if executor == "compiled":
        return execute.why_not_compiled(torch.device("cpu"))
    return execute.why_not_triton() if executor == "triton" else None


def verify(steps: int, device: torch.device, optimizer: str | None, executor: Executor, console: Console) -> int:
    """Compare an executor with the reference; see `fused-kopt verify --help`. Returns the exit code."""
    if (reason := _why_not(executor)) is not None:
        return _refuse(f"nothing to compare with the reference: {executor}: {reason}")
    variants = [v for v in VARIANTS if optimizer in (None, v.split()[0])]
    cases = [(variant, dtype, executor) for dtype in DTYPES for variant in variants]
    with demo.one_thread():
        rows = [compare(*case, device, steps) for case in track(cases, "verifying", console=Console(stderr=True), transient=True)]
    title = f"Against the reference on {device}, free-running, steps: {steps}"
    numbers = (Column("tensors", justify="right"), Column("max ulp", justify="right"))
    table = Table("optimizer", "dtype", "executor", "result", *numbers, title=title)
    for row in rows:
        table.add_row(row.variant, str(row.dtype).removeprefix("torch."), row.executor, row.result, str(row.tensors), str(row.max_ulp))
    console.print(table)
    for error in dict.fromkeys(row.error for row in rows if row.error):
        console.print(error, markup=False, soft_wrap=True)
    failed, exact = sum(row.failed for row in rows), sum(not row.failed and not row.max_ulp for row in rows)
    console.print(f"{exact} of {len(rows)} equal bit for bit, {len(rows) - exact - failed} within 2 ulp, {failed} failed")
    return 1 if failed else 0


def info(console: Console) -> int:
    """Print versions, devices and executors. Returns the exit code, 0."""
    cards, table = [torch.device("cuda", index) for index in range(torch.cuda.device_count())], Table(show_header=False)
    rows = {"fused_kopt": fused_kopt.__version__, "python": platform.python_version(), "torch": torch.__version__}
    rows |= {"numpy": np.__version__, "triton": "unavailable", "platform": platform.platform()}
    if execute.why_not_triton() is None:
        import triton

        rows["triton"] = triton.__version__
    rows["cpu"] = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    rows["cuda"] = ", ".join(map(torch.cuda.get_device_name, cards)) or "no device"
    for executor in (e for e in EXECUTORS if e != "auto"):
        reason = _why_not(executor)
        rows[f"executor {executor}"] = "[green]available[/]" if reason is None else f"[yellow]unavailable[/]: {escape(reason)}"
    rows["executor auto"] = ", ".join(f"{execute.choose('auto', device)} on {device}" for device in (torch.device("cpu"), *cards))
    # a setting of the thread, which torch.set_flush_denormal and libraries built with -ffast-math change
    kept = np.float32(1e-38) * np.float32(0.1) != 0
    rows["float32 denormals"] = "kept" if kept else "[yellow]flushed to zero[/]: results below 1.2e-38 depend on the thread"
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    return 0


def _refuse(reason: str) -> int:
    Console(stderr=True).print(f"fused-kopt: {reason}", markup=False, soft_wrap=True)
    return 2


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1. Received: {text}.")
    return value


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.lower().split(","))
    unknown = [name for name in names if name not in demo.OPTIMIZERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(map(repr, unknown))}. Choose from {','.join(demo.OPTIMIZERS)}.")
    return names


def _parser() -> argparse.ArgumentParser:
    about = "Keras optimizers for PyTorch tensors, fused into one Triton launch."
    parser = argparse.ArgumentParser("fused-kopt", description=about, epilog=EXAMPLES, formatter_class=_AS_IS)
    parser.add_argument("--version", action="version", version=f"fused-kopt {fused_kopt.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,verify,info}")
    d = commands.add_parser("demo", help="train a small network with all eight optimizers", description=DEMO, formatter_class=_AS_IS)
    d.add_argument("--epochs", type=_positive, default=demo.EPOCHS, help="passes over the training images, 22 steps each (%(default)s)")
    d.add_argument("--optimizers", type=_names, default=tuple(demo.OPTIMIZERS), help="comma-separated (all eight)", metavar="NAMES")
    d.add_argument("--out", type=Path, default=Path(), help="directory for fused_kopt_demo.png (the current one)", metavar="DIR")
    d.add_argument("--executor", choices=EXECUTORS[:3], default="auto", help="auto: triton where it imports, else reference")
    d.add_argument("--seed", type=int, default=0, help="of the initial weights and the batches (%(default)s)")
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    v = commands.add_parser("verify", help="compare every executor with the reference", description=VERIFY, formatter_class=_AS_IS)
    v.add_argument("--steps", type=_positive, default=3, help="steps per optimizer and dtype (%(default)s)")
    v.add_argument("--device", choices=devices, default=devices[-1], help="cuda only where torch finds one (%(default)s)")
    v.add_argument("--optimizer", choices=tuple(dict.fromkeys(name.split()[0] for name in VARIANTS)), help="only this one (all)")
    v.add_argument("--executor", choices=EXECUTORS[2:], default="triton", help="compiled builds 76 kernels, minutes at first (%(default)s)")
    commands.add_parser("info", help="versions, devices, executors", description="Print versions, devices and executors.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. `argv`: default sys.argv[1:]. Returns the exit code; SystemExit for --help, --version and wrong arguments."""
    arguments, console = _parser().parse_args(argv), Console()
    if arguments.command == "info":
        return info(console)
    if arguments.command == "verify":
        return verify(arguments.steps, torch.device(arguments.device), arguments.optimizer, arguments.executor, console)
    reason = _why_not(arguments.executor)
    if reason is not None:
        return _refuse(f"--executor {arguments.executor}: {reason}")
    if demo.missing():
        return _refuse(f"the demo needs {' and '.join(demo.missing())}: pip install 'fused-kopt[demo]'")
    try:  # now, not after the training
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return _refuse(f"--out: {error}")
    settings = demo.Settings(arguments.optimizers, arguments.epochs, arguments.out, arguments.executor, arguments.seed)
    return demo.main(settings, console)


if __name__ == "__main__":
    sys.exit(main())
