"""What a step did, in a few numbers that its launches add up: norms, the learning rate, how far training has come."""

import math
from typing import Any, TypedDict

import torch
from torch import Tensor


class StepStats(TypedDict):
    """One step in numbers; a dict, as loggers want it. Norms are Euclidean, over all variables of the step together."""

    gradient_norm: float
    """Of the gradients as the step got them, unscaled, times `grad_scale`, before any clipping. Not finite where a gradient is not."""
    update_norm: float
    """Of what the step changed, as stored: a change that a 16-bit variable rounds away counts as none."""
    weight_norm: float
    """Of the variables after the step. NaN where loss scaling left the step out."""
    update_ratio: float
    """`update_norm / weight_norm`."""
    skipped_steps: int
    """How many steps were left out so far because their gradients were not finite (loss scaling)."""
    learning_rate: float
    """As the step used it, after schedule and decay, before `scale_learning_rate`."""
    iterations: int
    """Steps taken, this one included."""


# A copy on the CPU, and what to wait for before it is read, or None.
Fetched = tuple[Tensor, Any]


class Sums:
    """A step's sums of squares."""

    def __init__(self) -> None:
        self._devices: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """float64 [3] on a device: of gradients, of changes, of variables. Launches add to it."""
        if device not in self._devices:
            self._devices[device] = torch.zeros(3, dtype=torch.float64, device=device)
        return self._devices[device]

    def all(self) -> list[Tensor]:
        """Each device's."""
        return list(self._devices.values())

    def fetched(self) -> list[Fetched]:
        """`fetched` of each device's sums."""
        return [fetched(sums) for sums in self._devices.values()]


def fetched(tensor: Tensor) -> Fetched:
    """A copy on the CPU.

    That of a GPU is on its way into pinned memory: reading it later waits for this step, not for all that was launched since.
    """
    if tensor.device.type != "cuda":
        return tensor.detach().to("cpu", copy=True), None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    return copy, torch.cuda.current_stream(tensor.device).record_event()


def _read(found: Fetched) -> Any:
    """The numbers, once they are there."""
    tensor, event = found
    if event is not None:
        event.synchronize()
    return tensor.tolist()


class Recorder:
    """Says which steps are measured, and keeps the numbers of the last one.

        sums = recorder.start(iterations + 1)
        ...  # launches that get `sums`
        recorder.finish(sums, learning_rate, iterations + 1)

    Attributes:
        skipped: steps that were left out; whoever leaves one out counts it here. A 0-d tensor where a device counts.
    """

    def __init__(self, every: int = 0) -> None:
        """Raises ValueError unless `every` is an int >= 0."""
        self.every = every
        self.skipped: int | Tensor = 0
        self._last: tuple[list[Fetched], float, int] | None = None
        self._skipped: Fetched | None = None

    @property
    def every(self) -> int:
        """So many steps apart are measured steps; 0 for none."""
        return self._every

    @every.setter
    def every(self, value: int) -> None:
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"`stats_every` must be an int >= 0 (0: never). Received: stats_every={value!r}.")
        self._every = value

    def start(self, step: int) -> Sums | None:
        """Where the launches of a step (the first is 1) add what they measure; None for a step that is not measured."""
        return Sums() if self._every and step % self._every == 0 else None

    def finish(self, sums: Sums | None, learning_rate: float, iterations: int) -> None:
        """Keep what a step has measured. Waits for nothing."""
        if sums is not None:
            self._last = sums.fetched(), learning_rate, iterations
            self._skipped = fetched(self.skipped) if isinstance(self.skipped, Tensor) else None

    def last(self) -> StepStats | None:
        """The last measured step; None before there is one. Waits until the device has taken it.

        Raises RuntimeError where steps are never measured.
        """
        if self._last is None:
            if not self._every:
                raise RuntimeError("Steps are not measured. Set stats_every=1, or more to measure fewer steps.")
            return None
        sums, learning_rate, iterations = self._last
        gradient, update, weight = (math.sqrt(sum(squares)) for squares in zip(*map(_read, sums), strict=True))
        return StepStats(
            gradient_norm=gradient,
            update_norm=update,
            weight_norm=weight,
            update_ratio=update / weight if weight else math.inf if update else 0.0,
            skipped_steps=int(self.skipped) if self._skipped is None else _read(self._skipped),
            learning_rate=learning_rate,
            iterations=iterations,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"_every": self._every, "skipped": self.skipped, "_last": None, "_skipped": None}
