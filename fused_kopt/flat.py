"""Variables and gradients side by side in flat buffers: opt-in, reversible, and left at once where the caller moves something."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from fused_kopt import gradients, layout, tensors
from fused_kopt.layout import Segment

logger = logging.getLogger("fused_kopt")

_grad = attrgetter("grad")
_data_ptr = Tensor.data_ptr


class Buffer(NamedTuple):
    """Variables of one device and dtype, side by side. Between them are up to 15 elements that belong to none, all zero at first."""

    variables: Tensor  # 1-D
    gradients: Tensor  # 1-D
    members: list[Tensor]
    segments: list[Segment]


class Flat:
    """Variables that are views of one flat buffer per device and dtype, and their gradients likewise.

    Made by `Optimizer.flatten`, which says what it costs. Iterating gives (gradient, variable) pairs, so that it can stand
    wherever they are expected. Leaving it as a context manager calls `restore`.

    Attributes:
        variables: the distinct variables, in order.
        gradients: for each its view of the flat gradients, in its shape; also its `.grad`, until something else is put there.
        buffers: one per device and dtype: for one memset or one collective.
    """

    def __init__(self, variables: Iterable[Tensor]) -> None:
        self.variables = list({id(v): v for v in variables}.values())
        gradients.check([(v.detach(), v) for v in self.variables])
        check_movable(self.variables)
        self.gradients: list[Tensor] = [v.detach() for v in self.variables]
        self.buffers: list[Buffer] = []
        self._warned = False
        alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for position, variable in enumerate(self.variables):
            alike.setdefault((variable.device, variable.dtype), []).append(position)
        with torch.no_grad():
            for positions in alike.values():
                self._move_in(positions)
        self._addresses = [list(map(_data_ptr, group)) for group in (self.variables, self.gradients)]

    def _move_in(self, positions: list[int]) -> None:
        """Give variables of one device and dtype their places. Values and gradients are kept."""
        members = [self.variables[i] for i in positions]
        segments = layout.plan(members)
        values, grads = torch.zeros((2, segments[-1].end), dtype=members[0].dtype, device=members[0].device)
        self.buffers.append(Buffer(values, grads, members, segments))
        for i, variable, segment in zip(positions, members, segments, strict=True):
            place, view = segment.of(values), segment.of(grads)
            variable.data = place.copy_(variable)
            if variable.grad is not None:
                view.copy_(variable.grad)
            variable.grad = self.gradients[i] = view

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor]]:
        """(gradient, variable) pairs."""
        return ((variable.grad, variable) for variable in self.variables)

    def whole(self) -> bool:
        """Whether every variable and gradient lies in its place."""
        addresses, gradient_addresses = self._addresses
        if list(map(_data_ptr, self.variables)) != addresses:
            self._warn()
            return False
        try:
            return list(map(_data_ptr, map(_grad, self.variables))) == gradient_addresses
        except (TypeError, RuntimeError):  # a gradient is None, or sparse
            return False

    def _warn(self) -> None:
        moved = next(i for i, (v, address) in enumerate(zip(self.variables, self._addresses[0], strict=True)) if v.data_ptr() != address)
        if not self._warned:
            logger.warning(
                "%s has left its flat buffer (`.data =`, `.to()`, a memory format): steps go on with its new memory, but look at "
                "every variable. Call restore() and flatten() again.",
                gradients.name(self.variables[moved], moved),
            )
        self._warned = True

    def gather(self) -> None:
        """Bring every gradient into its place; one that is None becomes zeros."""
        with torch.no_grad():
            for variable, view in self._astray():
                if variable.grad is None:
                    view.zero_()
                else:
                    view.copy_(variable.grad)
                variable.grad = view

    def zero_grad(self) -> None:
        """Set all gradients to zero, one operation per buffer, and put those back that were replaced or set to None.

        The gradient of a variable that has left its buffer becomes None.
        """
        for buffer in self.buffers:
            buffer.gradients.zero_()
        for variable, view in self._astray():
            variable.grad = view
        for variable, address in zip(self.variables, self._addresses[0], strict=True):
            if variable.data_ptr() != address:
                variable.grad = None

    def _astray(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Variables whose gradient is not in its place, and a view of this. `.to()` moves the memory of `.grad` itself."""
        for position, (variable, address) in enumerate(zip(self.variables, self._addresses[1], strict=True)):
            if variable.grad is None or variable.grad.layout != torch.strided or variable.grad.data_ptr() != address:
                if self.gradients[position].data_ptr() != address:
                    self.gradients[position] = self._view(variable, address)
                yield variable, self.gradients[position]

    def _view(self, variable: Tensor, address: int) -> Tensor:
        (buffer,) = (b for b in self.buffers if any(member is variable for member in b.members))
        segment = buffer.segments[next(i for i, member in enumerate(buffer.members) if member is variable)]
        offset = (address - buffer.gradients.untyped_storage().data_ptr()) // buffer.gradients.element_size()
        return buffer.gradients.as_strided(segment.shape, segment.stride, offset)

    def restore(self) -> None:
        """Give every variable and gradient memory of its own again. Nothing happens to those that have left, or a second time."""
        with torch.no_grad():
            for variable, address, home in zip(self.variables, *self._addresses, strict=True):
                if variable.data_ptr() == address:
                    variable.data = layout.clone(variable, variable.stride())
                if variable.grad is not None and variable.grad.layout == torch.strided and variable.grad.data_ptr() == home:
                    variable.grad = layout.clone(variable.grad, variable.grad.stride())
        self.variables, self.gradients, self.buffers, self._addresses = [], [], [], [[], []]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()


def check_movable(variables: Sequence[Tensor]) -> None:
    """Raises ValueError for a variable that cannot move into a flat buffer, because other memory would part from it unseen."""
    for position, variable in enumerate(variables):
        what = gradients.name(variable, position)
        if variable.is_shared() and not variable.is_cuda:  # type: ignore[no-untyped-call]
            raise ValueError(f"{what} is in shared memory: other processes would no longer see its updates. Do not flatten or shard it.")
        if variable.untyped_storage().nbytes() != variable.numel() * variable.element_size() or variable._is_view():
            raise ValueError(
                f"{what} is part of a larger memory ({tensors.describe(variable)}, {variable.untyped_storage().nbytes()} bytes): "
                "a view, a Flat, FSDP, a sharded optimizer. Moved, it would part from it. Leave that first (Flat.restore())."
            )
