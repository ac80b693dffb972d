"""`fused-kopt verify`: every optimizer and variant, in every dtype, through an executor beside the reference."""

import functools
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from torch import Tensor

from fused_kopt import verification
from fused_kopt.commands.common import RefusedError, one_thread, why_not
from fused_kopt.commands.variants import DTYPES, VARIANTS, selected
from fused_kopt.execute import Executor

ALLOWED_ULP = {"ftrl power": 2, "ftrl power shrinkage": 2}  # a power that is not a square root; all others are exact
# 0-d, one element, odd, transposed, a block of a compiled kernel (1,024) and of the interpreter (65,536) and a little more
SHAPES = ((), (1,), (7, 3), (33, 31), (1025,), (65_541,))
ABOUT = """Run every optimizer and variant, in float32, float64, bfloat16 and float16, through every executor.

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


def verify(steps: int, device: torch.device, optimizer: str | None, executor: Executor, console: Console) -> int:
    """Compare an executor with the reference; see `fused-kopt verify --help`. Returns the exit code."""
    if (reason := why_not(executor)) is not None:
        raise RefusedError(f"nothing to compare with the reference: {executor}: {reason}")
    cases = [(variant, dtype, executor) for dtype in DTYPES.values() for variant in selected(optimizer)]
    with one_thread():
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
