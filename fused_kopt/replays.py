"""Steps that a CUDA graph can capture: scalars of many steps to come lie on the device, and every replay takes the next ones."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fused_kopt import execute
from fused_kopt.execute import Update
from fused_kopt.hyperparameters import Step
from fused_kopt.repeat import Repeat, Scalars
from fused_kopt.state import State


def capturing() -> bool:
    """Whether a CUDA graph records what this thread launches."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


class Owner(Protocol):
    """What Replays needs of an optimizer."""

    _state: State

    def _scalars_of(self, updates: Sequence[Update], steps: dict[torch.dtype, Step]) -> Callable[[Update], Scalars]: ...
    def _commit(self, steps: Mapping[torch.dtype, Step]) -> None: ...


class Replays:
    """A step's launches that read their scalars on the device."""

    def __init__(self, owner: Owner, repeat: Repeat, steps: int) -> None:
        self.repeat, self.steps, self.left = repeat, steps, 0
        self._owner = owner
        self._tables: list[Tensor] = []
        self._counters: list[Tensor] = []
        for update, numbers in zip(repeat.updates, self._forecast(1)[0], strict=True):
            bucket = update.bucket
            self._tables.append(torch.zeros((steps, len(numbers)), dtype=bucket.compute, device=bucket.device))
            self._counters.append(torch.zeros(2, dtype=torch.int64, device=bucket.device))
            update.current = torch.zeros(len(numbers), dtype=bucket.compute, device=bucket.device)
        repeat.bind()
        self.fill()

    def step(self) -> None:
        """Launch the next step. One that a graph records is counted when it is replayed."""
        for update, table, counter, executor in zip(self.repeat.updates, self._tables, self._counters, self.repeat.chosen, strict=True):
            assert update.current is not None
            execute.advance(table, counter, update.current, executor)
        self.repeat.run(lambda update: (update.scalars, update.rows))

    def count(self, steps: int) -> None:
        """Catch up with steps that the device took, and upload the scalars of later ones before they run out."""
        for _ in range(steps):
            self._next()
        self.left -= steps
        if self.left < max(steps, 1) or not steps:
            self.fill()

    def fill(self) -> None:
        """Upload the scalars of the next steps. What the device has been told to do before still reads the old ones."""
        forecast = self._forecast(self.steps)
        for i, (table, counter) in enumerate(zip(self._tables, self._counters, strict=True)):
            rows = torch.tensor([numbers[i] for numbers in forecast], dtype=table.dtype, device="cpu")
            start = torch.tensor([0, self.steps], device="cpu")
            for target, source in ((table, rows), (counter, start)):
                target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)
        self.left = self.steps

    def _next(self) -> list[list[float]]:
        """Count one step; per update the numbers that its launch reads in it."""
        steps: dict[torch.dtype, Step] = {}
        scalars = self._owner._scalars_of(self.repeat.updates, steps)
        found = [[x for row in rows or [common] for x in row] for common, rows in map(scalars, self.repeat.updates)]
        self._owner._commit(steps)
        self._owner._state.count()
        return found

    def _forecast(self, count: int) -> list[list[list[float]]]:
        """The same for `count` steps to come, none of which is counted."""
        counters = [weight for weight in self._owner._state.weights if weight.dim() == 0]
        before = [weight.clone() for weight in counters]
        found = [self._next() for _ in range(count)]
        for weight, value in zip(counters, before, strict=True):
            weight.copy_(value)
        return found
