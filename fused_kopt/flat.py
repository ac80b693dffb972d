"""Variables and gradients side by side in flat buffers: opt-in, reversible, and left at once where the caller moves something."""

import logging
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from fused_kopt import gradients, layout, tensors
from fused_kopt.layout import Segment

logger = logging.getLogger("fused_kopt")


class Buffer(NamedTuple):
    """Variables of one device and dtype, side by side. Between them are up to 15 elements that belong to none, all zero at first."""

    variables: Tensor  # 1-D
    gradients: Tensor  # 1-D
    members: list[Tensor]
    segments: list[Segment]


class Flat:
    """Variables that are views of one flat buffer per device and dtype, and their gradients likewise.

    Made by `Optimizer.flatten`, which says what it costs. Iterating gives (gradient, variable) pairs, so that it can stand
    wherever they are expected; `Optimizer.apply_gradients(flat)` takes the same time for any number of variables. Leaving it
    as a context manager calls `restore`.

    Attributes:
        variables: the distinct variables, in order.
        gradients: a view of the flat gradients for each variable, in its shape.
        buffers: one per device and dtype: for one memset or one collective.
    """

    def __init__(self, variables: Iterable[Tensor]) -> None:
        self.variables = list({id(v): v for v in variables}.values())
        _check(self.variables)
        self._by_hand = [not v.requires_grad for v in self.variables]
        self.gradients: list[Tensor] = [v.detach() for v in self.variables]
        self.buffers: list[Buffer] = []
        self._arrived: set[int] = set()
        self._strayed = self._warned = False
        self._hooks: list[Any] = []
        with torch.no_grad():
            for members in _alike(self.variables):
                self._move_in(members)
        self._addresses = [v.data_ptr() for v in self.variables]
        for position, variable in enumerate(self.variables):
            if variable.requires_grad:
                self._hooks.append(variable.register_post_accumulate_grad_hook(_Arrival(self, position)))  # type: ignore[no-untyped-call]

    def _move_in(self, members: list[int]) -> None:
        """Give variables of one device and dtype their places. Values and gradients are kept."""
        segments = layout.plan(self.variables[i] for i in members)
        first = self.variables[members[0]]
        buffers = torch.zeros((2, segments[-1].end), dtype=first.dtype, device=first.device)
        self.buffers.append(Buffer(buffers[0], buffers[1], [self.variables[i] for i in members], segments))
        for i, segment in zip(members, segments, strict=True):
            variable = self.variables[i]
            here, self.gradients[i] = (b.as_strided(segment.shape, segment.stride, b.storage_offset() + segment.offset) for b in buffers)
            variable.data = here.copy_(variable)
            if variable.grad is not None:
                self.gradients[i].copy_(variable.grad)
            if variable.requires_grad:
                variable.grad = self.gradients[i]

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor]]:
        """(gradient, variable) pairs; the gradient of a variable that required none when it was flattened is its view."""
        zipped = zip(self.gradients, self.variables, self._by_hand, strict=True)
        return ((view if by_hand else variable.grad, variable) for view, variable, by_hand in zipped)

    def whole(self) -> bool:
        """Whether every variable and gradient lies in its place. O(1) if autograd brought every gradient since the last step."""
        if len(self._arrived) == len(self.variables) and not self._strayed:
            return True
        stray = self._first_stray()
        if stray is None:
            self._strayed = False
        elif not self._warned and self.variables[stray].data_ptr() != self._addresses[stray]:
            self._warned = True
            logger.warning(
                "%s has left its flat buffer (`.data =`, `.to()`, a memory format): steps go on with its new memory, but no "
                "longer in constant time. Call restore() and flatten() again.",
                gradients.name(self.variables[stray], stray),
            )
        return stray is None

    def _first_stray(self) -> int | None:
        """The first variable that is not in its place or whose gradient is not."""
        for position, ((gradient, variable), view, address) in enumerate(zip(self, self.gradients, self._addresses, strict=True)):
            if gradient is not view or variable.data_ptr() != address or variable.shape != view.shape:
                return position
        return None

    def gather(self) -> None:
        """Bring every gradient into its place; one that is None becomes zeros."""
        if self.whole():
            return
        with torch.no_grad():
            for variable, view in zip(self.variables, self.gradients, strict=True):
                if variable.requires_grad and variable.grad is not view:
                    view.copy_(variable.grad if variable.grad is not None else torch.zeros_like(view))
                    variable.grad = view

    def stepped(self) -> None:
        """A step has used the gradients: the next one waits for new ones."""
        self._arrived.clear()

    def zero_grad(self) -> None:
        """Set all gradients to zero: one operation per buffer. Gradients that were set to None are back in their places."""
        for buffer in self.buffers:
            buffer.gradients.zero_()
        for variable, view in zip(self.variables, self.gradients, strict=True):
            if variable.requires_grad and variable.grad is None:
                variable.grad = view
        self._arrived.clear()

    def restore(self) -> None:
        """Give every variable and gradient memory of its own again. Nothing happens to those that have left, or a second time."""
        with torch.no_grad():
            for variable, view, address in zip(self.variables, self.gradients, self._addresses, strict=True):
                if variable.data_ptr() == address:
                    variable.data = layout.clone(variable, variable.stride())
                if variable.grad is view:
                    variable.grad = layout.clone(view, view.stride())
        for hook in self._hooks:
            hook.remove()
        self.variables, self.gradients, self.buffers, self._addresses, self._hooks = [], [], [], [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()


class _Arrival:
    """Called by autograd when a variable's gradient is complete: brings it home where autograd made a new tensor."""

    def __init__(self, flat: Flat, position: int) -> None:
        self.flat, self.position = flat, position

    def __call__(self, variable: Tensor) -> None:
        flat, position = self.flat, self.position
        view, gradient = flat.gradients[position], variable.grad
        if gradient is not view:
            if gradient is None or gradient.layout != torch.strided or gradient.requires_grad or _kind(gradient) != _kind(view):
                flat._strayed = True
                return
            view.detach().copy_(gradient)
            variable.grad = view
        if variable.data_ptr() != flat._addresses[position]:
            flat._strayed = True
        flat._arrived.add(position)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _alike(variables: list[Tensor]) -> list[list[int]]:
    """Positions by device and dtype."""
    found: dict[Any, list[int]] = {}
    for position, variable in enumerate(variables):
        found.setdefault((variable.device, variable.dtype), []).append(position)
    return list(found.values())


def _check(variables: list[Tensor]) -> None:
    """Raises what apply_gradients raises for a variable, and ValueError where other memory would part from it unseen."""
    gradients.check([(v.detach(), v) for v in variables])
    for position, variable in enumerate(variables):
        what = gradients.name(variable, position)
        if variable.is_shared() and not variable.is_cuda:  # type: ignore[no-untyped-call]
            raise ValueError(f"{what} is in shared memory: other processes would no longer see its updates. Do not flatten it.")
        if variable.untyped_storage().nbytes() != variable.numel() * variable.element_size() or variable._is_view():
            raise ValueError(
                f"{what} is part of a larger memory ({tensors.describe(variable)}, {variable.untyped_storage().nbytes()} bytes): "
                "a view, another Flat, FSDP. Moved, it would part from it. Do not flatten it, or call restore() on the other Flat."
            )
