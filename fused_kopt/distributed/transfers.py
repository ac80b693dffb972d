"""Copies between a device and host memory: beside each other and the host's work on a GPU, at once on a CPU."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

cuda: Any = torch.cuda  # untyped in parts


class Link(Protocol):
    """The way between the host and one device.

    Attributes: `pinned`, whether host memory must be for copies to go on beside other work.
    """

    pinned: bool

    def begin(self) -> None:
        """Copies from now on come after what the device was told to do so far."""

    def down(self) -> AbstractContextManager[Any]:
        """A block in which `copy` is to the host."""

    def arriving(self) -> Any:
        """What to `synchronize()` before the copies down so far are read; None where they are there."""

    def up(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Copy to the device, whose later work waits for it."""

    def keep_apart(self) -> None:
        """Copies up from now on wait for the copies down so far."""

    def finish(self) -> None:
        """Wait for the copies up so far: then what they read may be written."""


def copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Start copies on the current stream."""
    torch._foreach_copy_(list(targets), list(sources), non_blocking=True)


class Direct:
    """Copies within host memory: done when the call returns."""

    pinned = False

    def begin(self) -> None:
        """See Link."""

    def down(self) -> AbstractContextManager[Any]:
        """See Link."""
        return nullcontext()

    def arriving(self) -> Any:
        """See Link."""
        return None

    def up(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """See Link."""
        copy(targets, sources)

    def keep_apart(self) -> None:
        """See Link."""

    def finish(self) -> None:
        """See Link."""


class Streams:
    """Two streams, since a GPU copies in both directions at once."""

    pinned = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._down, self._up = cuda.Stream(device), cuda.Stream(device)

    def begin(self) -> None:
        """See Link."""
        for stream in (self._down, self._up):
            stream.wait_stream(cuda.current_stream(self._device))

    def down(self) -> AbstractContextManager[Any]:
        """See Link."""
        return cuda.stream(self._down)  # type: ignore[no-any-return]

    def arriving(self) -> Any:
        """See Link."""
        return self._down.record_event()

    def up(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """See Link. The device waits at once: an error later in the step must not let it read half of a copy."""
        with cuda.stream(self._up):
            copy(targets, sources)
        cuda.current_stream(self._device).wait_stream(self._up)

    def keep_apart(self) -> None:
        """See Link."""
        self._up.wait_stream(self._down)

    def finish(self) -> None:
        """See Link."""
        self._up.synchronize()


def link(device: torch.device) -> Link:
    """Raises ValueError for a device that is neither a GPU nor the CPU."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"Variables can be offloaded from CUDA and ROCm devices, and for tests from the CPU. Received: {device}.")
    return Streams(device) if device.type == "cuda" else Direct()
