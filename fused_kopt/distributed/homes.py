"""Where an offloaded optimizer's variables live on the host."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_kopt import layout, stages, tensors
from fused_kopt.distributed import transfers
from fused_kopt.distributed.transfers import Link
from fused_kopt.errors import StaleVariableError
from fused_kopt.layout import Segment
from fused_kopt.stages import Piece


class Buffer:
    """Host memory for variables side by side, and for their gradients by dtype."""

    def __init__(self, segments: Sequence[Segment], dtype: torch.dtype, link: Link) -> None:
        self.link = link
        self._size = segments[-1].end
        self.variables = self._zeros(dtype)
        self._gradients: dict[torch.dtype, Tensor] = {}

    def _zeros(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self._size, dtype=dtype, device="cpu", pin_memory=self.link.pinned)

    def gradient(self, segment: Segment, dtype: torch.dtype) -> Tensor:
        """The place of a gradient."""
        if dtype not in self._gradients:
            self._gradients[dtype] = self._zeros(dtype)
        return segment.of(self._gradients[dtype])


@dataclass
class Home:
    """A variable's place on the host."""

    variable: Tensor
    twin: Tensor
    segment: Segment
    buffer: Buffer
    address: int
    """Of the variable, when it was last looked at."""
    version: int | None = None
    """The variable's when it had the twin's value; None where it need not have it."""


class Homes:
    """The homes of all variables so far."""

    def __init__(self, part_bytes: int) -> None:
        self._part_bytes = part_bytes
        self._pieces: dict[int, Piece] = {}
        self._found: dict[int, Home] = {}  # by id of the variable
        self._links: dict[torch.device, Link] = {}
        self._parts = 0
        self._ends: dict[Any, int] = {}  # the next element's number of each kind of variables

    def __getitem__(self, variable: Tensor) -> Home:
        return self._found[id(variable)]

    def all(self) -> Iterable[Home]:
        """In order of first appearance."""
        return self._found.values()

    def pieces(self) -> dict[int, Piece]:
        """See Stage. Who gets a twin may write it: waits for the copies that read them."""
        for link in self._links.values():
            link.finish()
        return self._pieces

    def check(self, variable: Tensor, what: str) -> None:
        """Raises ValueError for a kind of device without copies, StaleVariableError where the variable is no longer what it was."""
        if variable.device not in self._links:
            self._links[variable.device] = transfers.link(variable.device)
        home = self._found.get(id(variable))
        now = variable.shape, variable.dtype, self._links[variable.device]
        if home is not None and now != (home.twin.shape, home.twin.dtype, home.buffer.link):
            was, is_now = f"shape {tuple(home.twin.shape)}, {home.twin.dtype}", tensors.describe(variable)
            raise StaleVariableError(f"{what} was {was} when it was offloaded and is {is_now} now. Use a new optimizer for it.")

    def settle(self, owner: Any, variables: Sequence[Tensor]) -> None:
        """Make homes for those variables that have none."""
        alike: dict[Any, list[Tensor]] = {}
        for variable in (v for v in variables if id(v) not in self._found):
            # a sharded optimizer gathers by its own parts, none before its last launch
            chosen = owner._state.parts.get(id(variable), None if variable.numel() else (variable, 0, 0))
            kind = owner._state.key(variable)[:3]
            alike.setdefault((*kind, None if chosen is None else chosen[1]), []).append(variable)
        for (*kind, chosen), mine in alike.items():
            for part in [mine] if chosen is not None else self._cut(mine):
                self._add(owner, tuple(kind), part, self._parts if chosen is None else chosen)
                self._parts += chosen is None

    def _cut(self, variables: Sequence[Tensor]) -> list[list[Tensor]]:
        """Runs of variables that fill no more than a part, or of one variable."""
        found: list[list[Tensor]] = [[]]
        size = 0
        for variable, segment in zip(variables, layout.plan(variables), strict=True):
            more = (segment.end - segment.offset) * variable.element_size()
            if found[-1] and size + more > self._part_bytes:
                found.append([])
                size = 0
            found[-1].append(variable)
            size += more
        return found

    def _add(self, owner: Any, kind: Any, variables: Sequence[Tensor], part: int) -> None:
        segments = layout.plan(variables)
        buffer = Buffer(segments, variables[0].dtype, self._links[variables[0].device])
        state = owner._state
        for variable, segment in zip(variables, segments, strict=True):
            first = self._ends.get(kind, 0)  # as it would be in the one bucket of an optimizer without offload
            self._ends[kind] = first + segment.end - segment.offset
            _, _, number = state.parts.get(id(variable), (None, 0, first))
            twin = segment.of(buffer.variables)
            state.parts[id(twin)] = (twin, part, number)
            self._found[id(variable)] = Home(variable, twin, segment, buffer, variable.data_ptr())
            self._pieces[id(variable)] = (twin, 0, twin.numel())
            stages.tell(owner, variable, twin)

    def fetch(self, variables: Sequence[Tensor]) -> None:
        """Bring twins up to date, and wait for it."""
        for home in (h for h in map(self.__getitem__, variables) if h.version != h.variable._version and h.twin.numel()):
            link = home.buffer.link
            link.begin()
            with link.down():
                transfers.copy([home.twin], [home.variable.detach()])
                arriving = link.arriving()
            if arriving is not None:
                arriving.synchronize()
            home.version = home.variable._version

    def publish(self, twins: Sequence[Tensor]) -> None:
        """Copy twins up."""
        found = {id(home.twin): home for home in self._found.values()}
        for home in (found[id(twin)] for twin in twins if twin.numel()):
            home.buffer.link.begin()
            home.buffer.link.up([home.variable.detach()], [home.twin])

    def follow(self, owner: Any) -> None:
        """What was said of variables since then counts for their twins. Raises ValueError for a policy that comes too late."""
        state = owner._state
        for key, home in list(self._found.items()):
            if state.key(home.variable)[2] != state.key(home.twin)[2]:
                if state.built_as(home.twin) is not None:
                    what = tensors.describe(home.variable)
                    raise ValueError(f"A variable ({what}) has slots already. Call set_precision() before its first step.")
                del self._found[key], self._pieces[key]
            else:
                stages.tell(owner, home.variable, home.twin)
