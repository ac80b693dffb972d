"""ZeRO: every rank keeps the slots of its share of the variables, updates that share, and gets the others' from the others."""

import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fused_kopt import collectives, gradients, layout, stages
from fused_kopt.aggregate import AllReduce, replicas
from fused_kopt.agreement import DTYPES, Agreement, hashed
from fused_kopt.buffers import Bucket
from fused_kopt.distributed.backward import Backward
from fused_kopt.distributed.incoming import Incoming, Pool
from fused_kopt.distributed.partition import Part
from fused_kopt.distributed.squares import Squares
from fused_kopt.flat import Flat, check_movable
from fused_kopt.recording import Sums
from fused_kopt.stages import Piece, Seen


class Shards:
    """The stage of a sharded optimizer."""

    aggregates = True

    def __init__(self, settings: AllReduce, part_bytes: int) -> None:
        self.settings, self.part_bytes = settings, part_bytes
        self.rank, self.ranks = collectives.rank(settings.group), collectives.size(settings.group)
        self.squares = Squares(settings.group)
        self.parts: list[Part] = []
        self.home: dict[int, tuple[int, int]] = {}  # by id of a variable: its part, and its position there
        self.own: dict[int, Piece] = {}  # by id of a variable: its piece here
        self._agreement = Agreement(settings.group)
        self.incoming: list[Incoming] = []  # by part
        self.backward = Backward(self.home, self.incoming)
        self._pool = Pool()
        self._numbered: dict[int, int] = {}  # by id of a variable that has slots: its first element's number
        self._ends: dict[Any, int] = {}  # the next number of each kind of variables
        self._empty: dict[Any, Tensor] = {}  # what a rank without elements updates, by kind
        self._followed = False  # whether a stage comes after this one
        self._seen: Seen | None = None
        self._agreed: int | None = None  # the plan whose values were compared
        self._present: tuple[bytes, list[tuple[Tensor, Tensor]]] = (b"", [])
        self._waits: dict[int, collectives.Wait] = {}  # by part that is being gathered

    def reported(self) -> AbstractContextManager[None]:
        """See Stage."""
        return self._agreement.reported()

    def enter(self, owner: Any, given: Any, aggregated: bool) -> Any:
        """See Stage. Raises RankMismatchError, PeerError, and what `apply_gradients` raises for pairs."""
        self._waits = {}  # of a step that failed
        if isinstance(given, Flat):
            raise ValueError("A sharded optimizer has flat buffers of its own. Call restore() on the Flat, and pass pairs.")
        if aggregated and not isinstance(owner._aggregator, AllReduce):
            given, aggregated = owner._aggregator(given), False
        if self.backward.hooked:
            given = gradients.listed(given)
            self.backward.flush({id(v): g for g, v in given if g is not None})
        seen = self._look(owner, given)
        codes = self._agreement.agree(self._claim(owner, seen, aggregated))
        self._agreed = seen.plan
        if not seen.variables:
            return []
        gradients.say_missing([not code for code in codes], seen.variables)
        if self._present[0] == b"":
            self._settle(owner, seen.variables)
        for part in self.parts:
            part.bring_back()
        self._followed = len(owner._stages) > 1
        if self._followed:
            self._pass_on()
        return self._divide(owner, seen, codes, aggregated)

    def _pass_on(self) -> None:
        """To the stages after this one, a piece of a variable that the caller wrote is written too."""
        found = [self.own[id(variable)][0] for part in self.parts for variable in part.written()]
        torch.autograd.graph.increment_version([piece for piece in found if piece is not None])

    def _look(self, owner: Any, given: Any) -> Seen:
        seen = stages.look(owner, given, self._seen)
        if seen is not self._seen:
            self._present = (b"", [])
            if len({id(v) for v in seen.variables}) < len(seen.variables):
                raise ValueError("A variable is given twice, which a sharded step cannot update in order. Add its gradients up first.")
            check_movable([v for v in seen.variables if id(v) not in self.home])
            for variable in seen.variables:
                self._tell(owner, variable)
        self._seen = seen
        return seen

    def _claim(self, owner: Any, seen: Seen, aggregated: bool) -> Any:
        claim = stages.claim(owner, seen, lambda: replicas(None, seen), self.settings.compares(owner, seen, self._agreed))
        codes = self.backward.added(seen)
        how = "summed by the step" if aggregated else f"whole, present {hashed([('', codes.tobytes().hex())])}"
        return claim._replace(codes=codes, numbers=[*claim.numbers, ("how gradients come", how)])

    def adopt(self, owner: Any, variables: Sequence[Tensor]) -> None:
        """Give variables their places before a first step; every rank must call it. Raises what `enter` raises."""
        with self._agreement.reported():
            seen = self._look(owner, [(None, variable) for variable in variables])
            self._agreement.agree(self._claim(owner, seen, True))
            self._agreed = seen.plan
        self._settle(owner, seen.variables)

    def _settle(self, owner: Any, variables: Sequence[Tensor]) -> None:
        """Give new variables a part, and this rank its pieces."""
        alike: dict[Any, list[Tensor]] = {}
        for variable in variables:
            if id(variable) not in self.home:
                alike.setdefault((variable.device, variable.dtype), []).append(variable)
        for run in (run for mine in alike.values() for run in self._runs(mine)):
            part = Part(run, self.ranks)
            self.home |= {id(variable): (len(self.parts), i) for i, variable in enumerate(run)}
            self.own |= {id(variable): (None, 0, 0) for variable in run}
            for index, start, end in part.of(self.rank):
                at = part.segments[index].offset
                # `.data`: with a version of its own, which other ranks' values do not change
                self.own[id(run[index])] = (part.flat.data[at + start : at + end], start, end)
            self.parts.append(part)
            self.incoming.append(Incoming(part, self.rank, self.settings.group, self._pool))
        for variable in variables:
            self._tell(owner, variable)

    def _runs(self, variables: Sequence[Tensor]) -> list[list[Tensor]]:
        sizes = [v.numel() * v.element_size() for v in variables]
        return [[variables[i] for i in run] for run in layout.runs(sizes, self.part_bytes)]

    def _tell(self, owner: Any, variable: Tensor) -> None:
        """What was said of a variable counts for its piece."""
        piece = self.own.get(id(variable), (None, 0, 0))[0]
        if piece is not None:
            stages.tell(owner, variable, piece)

    def _number(self, owner: Any, variables: Sequence[Tensor]) -> None:
        """Count the elements of variables that get slots now, as an optimizer that keeps everything would."""
        for variable in (v for v in variables if id(v) not in self._numbered):
            piece, start, _ = self.own[id(variable)]
            kind = owner._state.key(variable)[:3]
            first = self._numbered.setdefault(id(variable), self._ends.get(kind, 0))
            self._ends[kind] = first + layout.plan([variable])[0].end
            if piece is not None:
                owner._state.parts[id(piece)] = (piece, self.home[id(variable)][0], first + start)

    def _divide(self, owner: Any, seen: Seen, codes: Any, aggregated: bool) -> list[tuple[Tensor, Tensor]]:
        """Sum the gradients; what remains are this rank's pieces of those that any rank has."""
        key = codes.tobytes()
        if self._present[0] != key:
            self._present = (key, self._pairs(owner, seen, codes))
        given = dict(zip(map(id, seen.variables), seen.gradients, strict=True))
        waits = []
        for incoming in self.incoming:
            if incoming.kind is not None and not incoming.done:
                mine = [given.get(id(variable)) for variable in incoming.part.variables]
                if aggregated:
                    waits.append(incoming.reduce(mine))
                else:
                    incoming.take(mine, incoming.part.of(self.rank))
        for wait in waits:
            wait()
        return self._present[1]

    def _pairs(self, owner: Any, seen: Seen, codes: Any) -> list[tuple[Tensor, Tensor]]:
        there = [(v, dtype) for v, code in zip(seen.variables, codes.tolist(), strict=True) if (dtype := DTYPES[code]) is not None]
        self._number(owner, [v for v, _ in there])
        for number, incoming in enumerate(self.incoming):
            kinds = [dtype for v, dtype in there if self.home[id(v)][0] == number]
            incoming.expect(functools.reduce(torch.promote_types, kinds) if kinds else None)
        ordered = sorted(range(len(there)), key=lambda i: self.home[id(there[i][0])])  # launches go part by part
        mine = [(i, *self.home[id(there[i][0])], *self.own[id(there[i][0])]) for i in ordered]
        pairs = [(self.incoming[part].summed(index, a, b), piece) for _, part, index, piece, a, b in mine if piece is not None]
        numbers = [i for i, _, _, piece, _, _ in mine if piece is not None]
        if not pairs:  # this rank counts the step all the same, and takes part in norms
            empty = self._nothing(owner, there[0][0])
            pairs, numbers = [(empty, empty)], [len(there)]
        self.squares.arrange(pairs, numbers, len(there) + 1)
        return pairs

    def _nothing(self, owner: Any, like: Tensor) -> Tensor:
        """A piece without elements."""
        kind = owner._state.key(like)[:3]
        if kind not in self._empty:
            self._empty[kind] = torch.zeros(0, dtype=like.dtype, device=like.device)
            owner._state.policies[id(self._empty[kind])] = (self._empty[kind], kind[2])
        return self._empty[kind]

    def before(self, bucket: Bucket) -> None:
        """See Stage: what was updated before is gathered while this part is updated."""
        self._gather(bucket.part)

    def after(self, bucket: Bucket) -> None:
        """See Stage."""

    def _gather(self, end: int, changed: bool = True) -> None:
        """Start to gather the parts below `end`, all ranks in this order. changed: those alone that had gradients."""
        for number in range(end):
            part = self.parts[number]
            if (self.incoming[number].kind is not None or not changed) and number not in self._waits:
                mine = part.flat[self.rank * part.share :][: part.share]
                self._waits[number] = collectives.gather(part.flat, mine, self.settings.group)

    def whole(self, squares: list[Tensor], each: bool) -> tuple[list[Tensor], list[Tensor]]:
        """See clipping.Across."""
        return self.squares.whole(squares, each)

    def add(self, sums: Sums) -> None:
        """See clipping.Across. All launches are under way; what a rank without pieces in the last parts has not sent comes first."""
        self._gather(len(self.parts))
        for tensor in sums.all():
            collectives.reduce(tensor, self.settings.group)()

    def leave(self) -> None:
        """See Stage."""
        self._gather(len(self.parts))
        self._wait()
        self.backward.reset()

    def publish(self, written: Sequence[Tensor]) -> None:
        """See Stage."""
        self._gather(len(self.parts), changed=False)
        self._wait()

    def _wait(self) -> None:
        waits, self._waits = self._waits, {}
        for number, wait in waits.items():
            wait()
            torch.autograd.graph.increment_version(self.parts[number].variables)
            if self._followed:
                self.parts[number].written()

    def settle(self, owner: Any, variables: Sequence[Tensor]) -> Sequence[Tensor]:
        """See Stage. Every rank must call it, with the same variables."""
        self.adopt(owner, variables)
        self._number(owner, variables)
        mine = [piece for piece, _, _ in (self.own[id(v)] for v in variables) if piece is not None]
        return mine or [self._nothing(owner, v) for v in variables[:1]]

    def pieces(self) -> Mapping[int, Piece]:
        """See Stage."""
        return self.own
