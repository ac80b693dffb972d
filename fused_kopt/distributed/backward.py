"""ZeRO-2: gradients go to the ranks that need them while backward computes the next ones, and are freed."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_kopt.agreement import CODES
from fused_kopt.collectives import Wait
from fused_kopt.distributed.incoming import Incoming
from fused_kopt.stages import Seen


class Backward:
    """What of a sharded optimizer's gradients has come by hooks in backward.

    home: by id of a variable its part, and its position there. incoming: by part. Both grow with the optimizer's variables.
    """

    def __init__(self, home: Mapping[int, tuple[int, int]], incoming: Sequence[Incoming]) -> None:
        self._home, self._incoming = home, incoming
        self._parts: list[int] = []  # in the order in which all ranks send them: the last variables' gradients come first
        self._sent = 0
        self._full: set[int] = set()
        self._waits: list[Wait] = []
        self.paused = False

    @property
    def hooked(self) -> bool:
        """Whether there are hooks."""
        return bool(self._parts)

    def hook(self, variables: Iterable[Tensor]) -> list[Any]:
        """Handles of the variables' hooks. Raises ValueError where variables of one part would come in different ways."""
        mine = {id(variable): variable for variable in variables}
        self._parts = sorted({self._home[key][0] for key in mine}, reverse=True)
        left = [v for number in self._parts for v in self._incoming[number].part.variables if id(v) not in mine]
        if left:
            raise ValueError(f"{len(left)} variables share buffers with those given and must be given too, of shapes {_shapes(left)}.")
        return [variable.register_post_accumulate_grad_hook(self._arrive) for variable in mine.values()]  # type: ignore[no-untyped-call]

    def _arrive(self, variable: Tensor) -> None:
        if self.paused:
            return
        number, index = self._home[id(variable)]
        if self._incoming[number].arrive(index, variable.grad):
            self._full.add(number)
        variable.grad = None
        while self._sent < len(self._parts) and self._parts[self._sent] in self._full:
            self._send()

    def _send(self) -> None:
        if len(self._waits) > 1:  # gloo's sums are added up by whoever waits
            self._waits.pop(0)()
        self._waits.append(self._incoming[self._parts[self._sent]].send())
        self._sent += 1

    def flush(self, given: Mapping[int, Any]) -> None:
        """Send what backward has not: parts with variables that got no gradient there. given: by id of a variable, what a caller has."""
        for number in self._parts[self._sent :]:
            incoming = self._incoming[number]
            for index, variable in enumerate(incoming.part.variables):
                if not incoming.arrived(index):
                    gradient = given.get(id(variable), variable.grad)
                    fits = isinstance(gradient, Tensor) and gradient.shape == variable.shape and gradient.layout == torch.strided
                    incoming.arrive(index, gradient if fits else None)
                    variable.grad = None
            self._send()
        waits, self._waits = self._waits, []
        for wait in waits:
            wait()

    def added(self, seen: Seen) -> Any:
        """The codes of gradients, with those that have come by backward."""
        if not self._parts:
            return seen.codes
        codes = seen.codes.copy()
        for position, variable in enumerate(seen.variables):
            number, index = self._home.get(id(variable), (-1, 0))
            if number in self._parts and self._incoming[number].came(index):
                codes[position] = CODES[variable.dtype]
        return codes

    def reset(self) -> None:
        """The step is over."""
        self._sent, self._full = 0, set()
        for number in self._parts:
            self._incoming[number].reset()


class ReduceInBackward:
    """Hooks on variables; made by `reduce_in_backward`."""

    def __init__(self, backward: Backward, handles: list[Any]) -> None:
        self._backward, self._handles = backward, handles

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A block in which gradients add up in `.grad`, for all micro-batches but a step's last."""
        before, self._backward.paused = self._backward.paused, True
        try:
            yield
        finally:
            self._backward.paused = before

    def remove(self) -> None:
        """Take the hooks away; between steps only."""
        for handle in self._handles:
            handle.remove()
        self._backward._parts = []


def _shapes(variables: list[Tensor]) -> str:
    return ", ".join(str(tuple(v.shape)) for v in variables[:4]) + (" ..." if len(variables) > 4 else "")
