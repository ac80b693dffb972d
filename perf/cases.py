"""A case: one optimizer on one workload, with what does not depend on who runs it. Its tensors are shared by all providers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from perf.workloads import Shape, elements

RATE = 1e-3
CLIP = 1.0
# slots per optimizer: the same numbers in every library here
SLOTS = {"sgd": 0, "momentum": 1, "rmsprop": 1, "adam": 2, "adadelta": 2, "adagrad": 1, "adamax": 2, "nadam": 2, "ftrl": 2, "lion": 1}
OPTIMIZERS = tuple(SLOTS)
# plain: the same gradients in every step; clip: and a global norm; fresh: gradients at other addresses in every step; average: clip,
# and Keras 3's moving average of the variables
VARIANTS = ("plain", "clip", "fresh", "average")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """What is measured. `workload` and `sample` say where the shapes come from."""

    optimizer: str
    workload: str
    sample: str
    shapes: list[Shape]
    dtype: torch.dtype
    variant: str
    device: torch.device

    @property
    def elements(self) -> int:
        """Of all variables together."""
        return elements(self.shapes)

    @property
    def clip(self) -> float | None:
        """The limit on the global norm, if any."""
        return CLIP if self.variant in ("clip", "average") else None

    @property
    def averaged(self) -> bool:
        """Whether a moving average of the variables is kept."""
        return self.variant == "average"

    @property
    def name(self) -> str:
        """For messages."""
        sample = "" if self.sample == "all" else f" ({self.sample})"
        return f"{self.optimizer} {self.workload}{sample} {str(self.dtype).removeprefix('torch.')} {self.variant}"

    def bytes(self, slot_bytes: float) -> int:
        """What a step must move: variables, slots and averages read and written, gradients read, for a global norm once more."""
        touched = 3 + (self.clip is not None) + 2 * self.averaged
        return round(self.elements * (touched * self.dtype.itemsize + 2 * SLOTS[self.optimizer] * slot_bytes))


class Runner(NamedTuple):
    """A provider on a case: `prepare` before each `step` is not timed."""

    step: Callable[[], object]
    variables: list[Parameter]
    prepare: Callable[[], None]


class Tensors:
    """Variables and gradients of a case, the latter twice where they are to change address in every step."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator(case.device).manual_seed(0)

        def draw(shape: Shape) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=case.dtype, device=case.device)

        self.variables = [Parameter(draw(shape)) for shape in case.shapes]
        self._sets = [[draw(shape) for shape in case.shapes] for _ in range(2 if case.variant == "fresh" else 1)]
        self._turn = 0
        self._present()

    def _present(self) -> None:
        for variable, gradient in zip(self.variables, self._sets[self._turn], strict=True):
            variable.grad = gradient

    def prepare(self) -> None:
        """Gradients for the next step."""
        if len(self._sets) > 1:
            self._turn = 1 - self._turn
            self._present()

    def runner(self, step: Callable[[], object]) -> Runner:
        """A runner on these variables."""
        return Runner(step, self.variables, self.prepare)
