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


class Place(NamedTuple):
    """Where a variable and its gradient lie."""

    buffer: Tensor  # of the gradients
    segment: Segment
    address: int  # of the variable
    gradient_address: int

    def holds(self, gradient: Tensor | None) -> bool:
        """Whether a gradient is the view that lies here."""
        return gradient is not None and gradient.layout == torch.strided and self._same(gradient)

    def _same(self, gradient: Tensor) -> bool:
        return (gradient.data_ptr(), gradient.shape, gradient.stride()) == (self.gradient_address, self.segment.shape, self.segment.stride)

    def fits(self, gradient: Tensor) -> bool:
        """Whether a gradient can be copied here: dense, of the buffer's dtype and device, outside any graph."""
        kinds = (gradient.layout, gradient.dtype, gradient.device, gradient.requires_grad)
        return kinds == (torch.strided, self.buffer.dtype, self.buffer.device, False)


class Flat:
    """Variables that are views of one flat buffer per device and dtype, and their gradients likewise.

    Made by `Optimizer.flatten`, which says what it costs. Iterating gives (gradient, variable) pairs, so that it can stand
    wherever they are expected; `Optimizer.apply_gradients(flat)` takes the same time for any number of variables. Leaving it
    as a context manager calls `restore`.

    Attributes:
        variables: the distinct variables, in order.
        buffers: one per device and dtype: for one memset or one collective.
    """

    def __init__(self, variables: Iterable[Tensor]) -> None:
        self.variables = list({id(v): v for v in variables}.values())
        _check(self.variables)
        self._by_hand = [not v.requires_grad for v in self.variables]
        self.buffers: list[Buffer] = []
        self._places: list[Place] = [None] * len(self.variables)  # type: ignore[list-item]
        self._arrived: set[int] = set()
        self._strayed = self._warned = False
        self._references: list[int] = []
        with torch.no_grad():
            for members in _alike(self.variables):
                self._move_in(members)
        taught = [(i, v) for i, v in enumerate(self.variables) if not self._by_hand[i]]
        self._hooks = [v.register_post_accumulate_grad_hook(_Arrival(self, i)) for i, v in taught]  # type: ignore[no-untyped-call]

    def _move_in(self, members: list[int]) -> None:
        """Give variables of one device and dtype their places. Values and gradients are kept."""
        segments = layout.plan(self.variables[i] for i in members)
        first = self.variables[members[0]]
        # two memories, not halves of one: `whole` counts the references to each
        values, grads = (torch.zeros(segments[-1].end, dtype=first.dtype, device=first.device) for _ in range(2))
        self.buffers.append(Buffer(values, grads, [self.variables[i] for i in members], segments))
        for i, segment in zip(members, segments, strict=True):
            variable = self.variables[i]
            variable.data = self._view(values, segment).copy_(variable)
            self._places[i] = Place(grads, segment, variable.data_ptr(), self._view(grads, segment).data_ptr())
            if not self._by_hand[i]:
                self._bring_home(i)

    @staticmethod
    def _view(buffer: Tensor, segment: Segment) -> Tensor:
        return buffer.as_strided(segment.shape, segment.stride, segment.offset)

    @property
    def gradients(self) -> list[Tensor]:
        """A view of the flat gradients for each variable, in its shape; new ones at every call (`whole` counts references)."""
        return [self._view(place.buffer, place.segment) for place in self._places]

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor]]:
        """(gradient, variable) pairs; the gradient of a variable that required none when it was flattened is its view."""
        for variable, place, by_hand in zip(self.variables, self._places, self._by_hand, strict=True):
            yield (self._view(place.buffer, place.segment) if by_hand else variable.grad), variable

    def whole(self) -> bool:
        """Whether every variable and gradient lies in its place.

        O(1) if autograd brought every gradient since the last step, and as many tensors use the buffers' memory as when it was
        last found whole: a variable or gradient that was replaced no longer does.
        """
        counts = [_references(tensor) for buffer in self.buffers for tensor in buffer[:2]]
        if len(self._arrived) + sum(self._by_hand) == len(self.variables) and not self._strayed and counts == self._references:
            return True
        stray = next((i for i, pair in enumerate(self) if not self._at_home(i, *pair)), None)
        if stray is None:
            self._strayed, self._references = False, counts
        elif not self._warned and self.variables[stray].data_ptr() != self._places[stray].address:
            self._warned = True
            logger.warning(
                "%s has left its flat buffer (`.data =`, `.to()`, a memory format): steps go on with its new memory, but no "
                "longer in constant time. Call restore() and flatten() again.",
                gradients.name(self.variables[stray], stray),
            )
        return stray is None

    def _at_home(self, position: int, gradient: Tensor | None, variable: Tensor) -> bool:
        place = self._places[position]
        return variable.data_ptr() == place.address and variable.shape == place.segment.shape and place.holds(gradient)

    def _bring_home(self, position: int) -> None:
        """Copy a gradient into its place, and a None as it is: with zeros."""
        place, variable = self._places[position], self.variables[position]
        view = self._view(place.buffer, place.segment)
        if variable.grad is None:
            view.zero_()
        elif not place.holds(variable.grad):
            view.copy_(variable.grad)
        variable.grad = view

    def gather(self) -> None:
        """Bring every gradient into its place; one that is None becomes zeros."""
        if not self.whole():
            with torch.no_grad():
                for position in (i for i, by_hand in enumerate(self._by_hand) if not by_hand):
                    self._bring_home(position)

    def stepped(self) -> None:
        """A step has used the gradients: the next one waits for new ones."""
        self._arrived.clear()

    def zero_grad(self) -> None:
        """Set all gradients to zero: one operation per buffer. Gradients that were set to None are back in their places."""
        for buffer in self.buffers:
            buffer.gradients.zero_()
        for variable, place, by_hand in zip(self.variables, self._places, self._by_hand, strict=True):
            if not by_hand and variable.grad is None:
                variable.grad = self._view(place.buffer, place.segment)
        self._arrived.clear()

    def restore(self) -> None:
        """Give every variable and gradient memory of its own again. Nothing happens to those that have left, or a second time."""
        with torch.no_grad():
            for variable, place in zip(self.variables, self._places, strict=True):
                if variable.data_ptr() == place.address:
                    variable.data = layout.clone(variable, variable.stride())
                if variable.grad is not None and place.holds(variable.grad):
                    variable.grad = layout.clone(variable.grad, variable.grad.stride())
        for hook in self._hooks:
            hook.remove()
        self.variables, self.buffers, self._places, self._by_hand, self._hooks = [], [], [], [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()


class _Arrival:
    """Called by autograd when a variable's gradient is complete: brings it home where autograd made a new tensor."""

    def __init__(self, flat: Flat, position: int) -> None:
        self.flat, self.position = flat, position

    def __call__(self, variable: Tensor) -> None:
        flat, place, gradient = self.flat, self.flat._places[self.position], variable.grad
        if gradient is None or not place.fits(gradient) or variable.data_ptr() != place.address:
            flat._strayed = True
            return
        if not place.holds(gradient):
            with torch.no_grad():
                flat._bring_home(self.position)
        flat._arrived.add(self.position)


def _references(tensor: Tensor) -> int:
    """How many tensors use this one's memory."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


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
