"""The default gradient aggregator: the sum over the ranks of torch.distributed, one collective per bucket."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fused_kopt import collectives, gradients, layout, stages
from fused_kopt.agreement import DTYPES, Agreement
from fused_kopt.buffers import Bucket
from fused_kopt.collectives import Group
from fused_kopt.flat import Flat
from fused_kopt.stages import Piece, Seen

# A collective starts when so many bytes are in place, while the next ones are copied.
PART = 1 << 26
MEND = "Reduce gradients yourself and pass experimental_aggregate_gradients=False."
# Sets of present gradients whose places are kept.
KEPT = 4


class AllReduce:
    """Sums gradients over the ranks of a process group: what `gradient_aggregator` is unless something else is passed.

    Every step begins with one small message per rank: order, shapes, dtypes and values of the variables, rule, hyperparameters and
    iterations must agree, or every rank raises RankMismatchError. A variable without gradient on some ranks counts as zeros there; one
    that is without on all ranks is left out. Gradients of one dtype are summed in flat buffers, of which there is one copy; the
    caller's are not written. All sums are there before the first variable is updated.

    Args:
        group: of torch.distributed; default: all ranks.
        check_every: every so many steps, variables and slots of all ranks are compared by digest as well, which reads them once. Default
            0: the variables' only, in the first step and when they become others.

    Raises ValueError unless `check_every` is an int >= 0.
    """

    def __init__(self, group: Group = None, check_every: int = 0) -> None:
        if not isinstance(check_every, int) or check_every < 0:
            raise ValueError(f"`check_every` must be an int >= 0 (0: at first only). Received: check_every={check_every!r}.")
        self.group, self.check_every = group, check_every

    def __call__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Sequence[tuple[Tensor, Tensor]]:
        """The pairs with every gradient summed, as an optimizer's steps sum them; the very same pairs where there is one rank."""
        if not self.replicated():
            return pairs
        stage = Reduction(self)
        with stage.reported():
            return [(g.clone(), v) for g, v in stage.enter(None, pairs, True)]

    def __deepcopy__(self, memo: Any) -> "AllReduce":
        return self  # a process group has no copies

    def replicated(self) -> bool:
        """Whether there is more than one rank to sum over. Raises RuntimeError for a process that is not one of them."""
        if collectives.rank(self.group) < 0:
            raise RuntimeError(f"This process is not a member of the process group and cannot aggregate gradients. {MEND}")
        return collectives.size(self.group) > 1

    def compares(self, owner: Any, seen: Seen, agreed: int | None) -> bool:
        """Whether values are due to be compared. agreed: the plan for which they were last."""
        due = bool(self.check_every) and owner is not None and owner._state.steps_taken() % self.check_every == 0
        return bool(seen.variables) and (due or agreed != seen.plan)


class Part(NamedTuple):
    """What one collective sums."""

    flat: Tensor
    members: list[int]
    """Positions of pairs."""
    views: list[Tensor]
    """Of `flat`, one for each member."""


class Places(NamedTuple):
    """Where gradients are summed that are present on any rank."""

    parts: list[Part]
    pairs: list[tuple[Tensor, Tensor]]


class Reduction:
    """The stage of an optimizer whose gradients are summed."""

    aggregates = True

    def __init__(self, settings: AllReduce) -> None:
        self.settings = settings
        self._agreement = Agreement(settings.group)
        self._seen: Seen | None = None
        self._agreed: int | None = None  # the plan whose values were compared
        self._memory: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._places: dict[bytes, Places] = {}

    def reported(self) -> AbstractContextManager[None]:
        """See Stage."""
        return self._agreement.reported()

    def enter(self, owner: Any, given: Any, aggregated: bool) -> Any:
        """See Stage. Raises RankMismatchError, PeerError, and what `apply_gradients` raises for pairs."""
        flat = given if isinstance(given, Flat) else None
        if flat is not None:
            flat.gather()  # every rank must call the same collectives, whatever gradients it has
        seen = self._look(owner, given)
        codes = self._agreement.agree(
            stages.claim(owner, seen, lambda: replicas(owner, seen), self.settings.compares(owner, seen, self._agreed))
        )
        self._agreed = seen.plan
        if flat is not None:
            self._wait([collectives.reduce(buffer.gradients, self.settings.group) for buffer in flat.buffers])
            return flat
        gradients.say_missing([not code for code in codes], seen.variables)
        return self._sum(seen, codes)

    def _look(self, owner: Any, given: Any) -> Seen:
        before, seen = self._seen, stages.look(owner, given, self._seen)
        if seen is not before:
            _check_backends(seen, self.settings.group)
            if before is None or list(map(id, before.variables)) != list(map(id, seen.variables)):
                self._places = {}
        self._seen = seen
        return seen

    def _sum(self, seen: Seen, codes: Any) -> list[tuple[Tensor, Tensor]]:
        key = codes.tobytes()
        if key not in self._places:
            kept = list(self._places.items())[-(KEPT - 1) :]
            self._places = dict([*kept, (key, self._lay(seen.variables, codes))])
        places, waits = self._places[key], []
        with torch.no_grad():
            for part in places.parts:
                fill(part.views, [seen.gradients[p] for p in part.members])
                waits.append(collectives.reduce(part.flat, self.settings.group))
        self._wait(waits)
        return places.pairs

    def _lay(self, variables: Sequence[Tensor], codes: Any) -> Places:
        """Places for the gradients that any rank has, in memory that all sets of them share."""
        alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for position, (variable, code) in enumerate(zip(variables, codes.tolist(), strict=True)):
            dtype = DTYPES[code]
            if dtype is not None:
                alike.setdefault((variable.device, dtype), []).append(position)
        parts: list[Part] = []
        for key, members in alike.items():
            segments = dict(zip(members, layout.plan([variables[p] for p in members]), strict=True))
            size = segments[members[-1]].end
            if key not in self._memory or len(self._memory[key]) < size:
                self._memory[key] = torch.zeros(size, dtype=key[1], device=key[0])
                self._places = {}  # the others' places are in memory that is given up
            for positions in layout.runs([variables[p].numel() * key[1].itemsize for p in members], PART):
                run = [members[i] for i in positions]
                flat = self._memory[key][segments[run[0]].offset : segments[run[-1]].end]
                places = [segments[p]._replace(offset=segments[p].offset - segments[run[0]].offset) for p in run]
                parts.append(Part(flat, run, [s.of(flat) for s in places]))
        views = {p: view for part in parts for p, view in zip(part.members, part.views, strict=True)}
        return Places(parts, [(views[p], variables[p]) for p in sorted(views)])

    def _wait(self, waits: Sequence[collectives.Wait]) -> None:
        for wait in waits:
            wait()

    def before(self, bucket: Bucket) -> None:
        """See Stage."""

    def after(self, bucket: Bucket) -> None:
        """See Stage."""

    def leave(self) -> None:
        """See Stage."""

    def publish(self, written: Sequence[Tensor]) -> None:
        """See Stage."""

    def settle(self, owner: Any, variables: Sequence[Tensor]) -> Sequence[Tensor]:
        """See Stage."""
        return variables

    def pieces(self) -> Mapping[int, Piece]:
        """See Stage."""
        return {}


def fill(views: Sequence[Tensor], given: Sequence[Tensor | None]) -> None:
    """Put gradients into their places; zeros for those that are absent."""
    both = [(view, gradient) for view, gradient in zip(views, given, strict=True) if gradient is not None]
    if both:
        torch._foreach_copy_([view for view, _ in both], [gradient for _, gradient in both])
    for view in (view for view, gradient in zip(views, given, strict=True) if gradient is None):
        view.zero_()


def replicas(owner: Any, seen: Seen) -> list[tuple[str, Tensor]]:
    """What must be equal on all ranks: variables, and their slots."""
    found = [(gradients.name(v, i), v) for i, v in enumerate(seen.variables)]
    if owner is None:
        return found
    buckets = owner._state.buckets.values()
    return found + [(f"{name} of the {b.dtype} variables", flat) for b in buckets for name, flat in b.flat.items()]


def _check_backends(seen: Seen, group: Group) -> None:
    config = dist.get_backend_config(group)  # lists a backend per device type, as in 'cpu:gloo,cuda:nccl'
    for position, variable in enumerate(seen.variables):
        if f"{variable.device.type}:" not in config:
            raise RuntimeError(
                f"The process group has no backend for {variable.device.type} tensors ({config}): gradient {position}. {MEND}"
            )
