"""Gradients on their way to sums of which every rank keeps its share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_kopt import collectives, layout
from fused_kopt.aggregate import fill
from fused_kopt.collectives import Group, Wait
from fused_kopt.distributed import partition
from fused_kopt.distributed.partition import Part


class Pool:
    """Buffers that whole gradients pass through: two of each dtype, as large as the largest part, one filled while the other is sent."""

    def __init__(self) -> None:
        self._largest = self._parts = 0
        self._free: dict[tuple[torch.dtype, torch.device], list[tuple[Tensor, Wait]]] = {}

    def reserve(self, elements: int) -> None:
        """There is a part of so many elements."""
        self._parts += 1
        if elements > self._largest:
            self._largest, self._free = elements, {}

    def borrow(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer of zeros or of what passed through it last."""
        free = self._free.setdefault((dtype, device), [])
        if len(free) < min(2, self._parts):  # in backward more may be under way
            return torch.zeros(self._largest, dtype=dtype, device=device)
        buffer, wait = free.pop(0)
        wait()
        return buffer

    def give_back(self, buffer: Tensor, wait: Wait) -> None:
        """The buffer may be used again after `wait`."""
        free = self._free.setdefault((buffer.dtype, buffer.device), [])
        if len(buffer) == self._largest and len(free) < 2:
            free.append((buffer, wait))


class Incoming:
    """The gradients of one part.

    Attributes: `kind`, the dtype in which they are summed in this step, None for a part without gradients; `done`, whether backward has
    summed them already.
    """

    def __init__(self, part: Part, rank: int, group: Group, pool: Pool) -> None:
        self.part = part
        self.kind: torch.dtype | None = None
        self.done = False
        self._low, self._group, self._pool = rank * part.share, group, pool
        self._sums: dict[torch.dtype, Tensor] = {}
        self._views: dict[int, list[Tensor]] = {}  # by a buffer's address
        pool.reserve(len(part.flat))
        self._filling: Tensor | None = None  # the buffer that backward fills
        self._arrived: dict[int, bool] = {}  # by position: whether there is a gradient

    def expect(self, kind: torch.dtype | None) -> None:
        """What dtype the next steps' gradients have."""
        self.kind = kind

    def summed(self, index: int, start: int, end: int) -> Tensor:
        """Where a piece of a variable finds its sums."""
        at = self.part.segments[index].offset - self._low
        return self._share()[at + start : at + end]

    def _share(self) -> Tensor:
        """This rank's sums."""
        assert self.kind is not None
        if self.kind not in self._sums:
            self._sums = {self.kind: torch.zeros(self.part.share, dtype=self.kind, device=self.part.flat.device)}
        return self._sums[self.kind]

    def _places(self, buffer: Tensor) -> list[Tensor]:
        if buffer.data_ptr() not in self._views:
            if len(self._views) == 2:  # the pool has others now
                self._views.pop(next(iter(self._views)))
            self._views[buffer.data_ptr()] = [segment.of(buffer) for segment in self.part.segments]
        return self._views[buffer.data_ptr()]

    @torch.no_grad()
    def reduce(self, gradients: Sequence[Tensor | None]) -> Wait:
        """Sum the gradients over the ranks; None counts as zeros."""
        assert self.kind is not None
        buffer = self._pool.borrow(self.kind, self.part.flat.device)
        fill(self._places(buffer), gradients)
        return self._send(buffer)

    def _send(self, buffer: Tensor) -> Wait:
        wait = collectives.reduce_scatter(self._share(), buffer[: len(self.part.flat)], self._group)
        self._pool.give_back(buffer, wait)
        return wait

    @torch.no_grad()
    def take(self, gradients: Sequence[Tensor | None], owned: Sequence[partition.Share]) -> None:
        """Gradients that are summed already: keep this rank's share. None counts as zeros."""
        for index, start, end in owned:
            gradient, variable = gradients[index], self.part.variables[index]
            sums = self.summed(index, start, end)
            if gradient is None:
                sums.zero_()
            else:
                same = layout.same_layout(variable.shape, variable.stride(), gradient.stride())
                laid = gradient if same else layout.clone(gradient, self.part.segments[index].stride)
                sums.copy_(layout.memory_order(laid)[start:end])

    # In backward.

    @torch.no_grad()
    def arrive(self, index: int, gradient: Tensor | None) -> bool:
        """A gradient is there, or will not come. Returns whether it was the last; then `send` may follow.

        Raises RuntimeError for a second one: two backward passes.
        """
        if index in self._arrived:
            raise RuntimeError(
                "A second gradient for a variable whose first one is on its way to the other ranks. Run one backward pass per step, and "
                "all passes but the last in `paused()`."
            )
        if self._filling is None:
            self.kind = self.part.flat.dtype
            self._filling = self._pool.borrow(self.kind, self.part.flat.device)
        self._arrived[index] = gradient is not None
        fill([self._places(self._filling)[index]], [gradient])
        return len(self._arrived) == len(self.part.segments)

    def send(self) -> Wait:
        """Sum what has arrived."""
        assert self._filling is not None
        buffer, self._filling, self.done = self._filling, None, True
        return self._send(buffer)

    def arrived(self, index: int) -> bool:
        """Whether it is known what comes for a variable."""
        return index in self._arrived

    def came(self, index: int) -> bool:
        """Whether a gradient has come."""
        return self._arrived.get(index, False)

    def reset(self) -> None:
        """The step is over."""
        self.done = False
        self._arrived = {}
