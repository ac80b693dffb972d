"""Launches on buffers of their own, for timing: an update of user state cannot be repeated."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_kopt.kernels.offline import Spec
from fused_kopt.kernels.tuning import Config
from fused_kopt.kernels.update import update_bucket


class Scratch:
    """One variable of `elements` elements with its gradient and slots, and the arguments of a launch."""

    def __init__(self, spec: Spec, scalars: Sequence[float], elements: int, device: torch.device) -> None:
        self.spec, self.elements, self.device = spec, elements, device
        self.variable = self._ones(spec.variable)
        self.gradient = self._ones(spec.gradient)  # no subnormal number, whose slow path would be timed
        self.slots = tuple(self._ones(spec.compute) for _ in range(spec.slots))
        rows = [[self.variable.data_ptr(), self.gradient.data_ptr(), elements, *(slot.data_ptr() for slot in self.slots)]]
        self._segments = torch.tensor(rows, dtype=torch.int64, device=device)
        self._factors = torch.ones((1, 5), dtype=spec.compute, device=device)
        by_pointer = spec.compute == torch.float64 or device.type == "cpu"  # as in a launch; the interpreter's floats are float64
        row = torch.tensor(scalars, dtype=spec.compute, device=device)
        self._scalars = spec.scalars(*(row.split(1) if by_pointer else scalars))

    def _ones(self, dtype: torch.dtype) -> Tensor:
        return torch.ones(self.elements, dtype=dtype, device=self.device)

    def arguments(self, block: int) -> tuple[Any, ...]:
        """The kernel's arguments before its constexprs; `blocks`, the second, has a row per program."""
        programs = torch.arange(-(-self.elements // block), dtype=torch.int32, device=self.device)
        blocks = torch.stack((torch.zeros_like(programs), programs), dim=1)
        return self._segments, blocks, self._factors, self._scalars, None

    def launcher(self, config: Config) -> Callable[[], None]:
        """A function that launches the compiled kernel once, in one configuration."""
        arguments, constants = self.arguments(config.block), self.spec.constants(config.block)
        grid = (len(arguments[1]),)

        def launch() -> None:
            update_bucket[grid](*arguments, **constants, num_warps=config.warps, enable_fp_fusion=False)

        return launch
