"""The stage of an offloaded optimizer: in the place of the caller's pairs come pairs in host memory."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kopt import gradients
from fused_kopt.aggregate import AllReduce
from fused_kopt.buffers import Bucket
from fused_kopt.distributed.homes import Homes
from fused_kopt.distributed.loads import Load, Plan
from fused_kopt.replays import capturing
from fused_kopt.stages import Piece

# Sets of pairs whose plans are kept.
KEPT = 4


class OffloadStats(NamedTuple):
    """What the last step of an offloaded optimizer moved, and where the host's time went."""

    parts: int = 0
    """Launches."""
    bytes_down: int = 0
    """To the host: gradients, and variables that somebody else wrote."""
    bytes_up: int = 0
    """To the device: variables."""
    copying: float = 0.0
    """Seconds in copies; between a GPU and the host, in starting them."""
    waiting: float = 0.0
    """Seconds of waiting for gradients: what nothing hid of the copies down. 0 where variables lie on the CPU."""
    updating: float = 0.0
    """Seconds in the launches."""


class Hosting:
    """The stage of an offloaded optimizer.

    Attributes: `stats`, of the last step.
    """

    aggregates = False

    def __init__(self, part_bytes: int) -> None:
        self.stats = OffloadStats()
        self._homes = Homes(part_bytes)
        self._plans: list[Plan] = []  # the latest first
        self._plan: Plan | None = None  # of the step being taken
        self._settings: Any = None  # the optimizer's `_repeats`, which is made anew where policies or multipliers change
        self._finished = True  # the last step
        self._counts: dict[str, Any] = {}
        self._launched = 0.0

    def reported(self) -> AbstractContextManager[None]:
        """See Stage."""
        return nullcontext()

    @torch.no_grad()
    def enter(self, owner: Any, given: Any, aggregated: bool) -> Any:
        """See Stage. Raises what `apply_gradients` raises for pairs."""
        if capturing():
            raise RuntimeError("An offloaded step cannot be captured in a CUDA graph: the host takes it. Step outside the graph.")
        if aggregated and not isinstance(owner._aggregator, AllReduce):
            given = owner._aggregator(given)
        self._counts = dict.fromkeys(OffloadStats._fields, 0)
        self._plan, found = self._planned(owner, given)
        if self._plan is None:
            return []
        if not self._finished:
            self.forget()  # twins may be ahead of their variables
        stale = [home for home in self._plan.homes if home.variable._version != home.version]
        self._finished = False
        with self._timed("copying"):
            self._plan.start(found, stale)
        if _read_at_once(owner) or (stale and owner.ema_momentum is not None):  # an average starts from its variable
            self._wait(self._plan.loads.values())
        self._counts["bytes_down"] += sum(home.twin.numel() * home.twin.element_size() for home in stale)
        self._counts["bytes_down"] += sum(load.bytes_down for load in self._plan.loads.values())
        return self._plan.pairs

    def forget(self) -> None:
        """Fetch all variables' values in the next step."""
        for home in self._homes.all():
            home.version = None

    def _planned(self, owner: Any, given: Any) -> tuple[Plan | None, Sequence[Tensor]]:
        """How these pairs are taken, and their gradients; None where there are no pairs."""
        if self._settings is not owner._repeats:
            self._homes.follow(owner)
            self._plans, self._settings = [], owner._repeats
        pairs, both = gradients.flattened(given)
        plan = self._known(both[::2], both[1::2])
        if plan is not None:
            return plan, both[::2]
        pairs = gradients.present(pairs)
        plan = self._known([g for g, _ in pairs], [v for _, v in pairs])
        if plan is None and pairs:
            pairs = gradients.check(pairs)
            plan = self._known([g for g, _ in pairs], [v for _, v in pairs]) or self._look(owner, pairs)
        return plan, [g for g, _ in pairs]

    def _known(self, found: Sequence[Any], variables: Sequence[Any]) -> Plan | None:
        for position, plan in enumerate(self._plans):
            if plan.meets(found, variables):
                self._plans.insert(0, self._plans.pop(position))
                return plan
        return None

    def _look(self, owner: Any, pairs: Sequence[tuple[Tensor, Tensor]]) -> Plan:
        """A plan for pairs that were checked one by one."""
        variables = [v for _, v in pairs]
        if len({id(v) for v in variables}) < len(variables):
            raise ValueError("A variable is given twice, which an offloaded step cannot update in order. Add its gradients up first.")
        for position, (gradient, variable) in enumerate(pairs):
            what = gradients.name(variable, position)
            if gradient.layout != torch.strided:
                raise RuntimeError(f"The gradient of {what} is sparse ({gradient.layout}), which cannot be offloaded. Pass it dense.")
            self._homes.check(variable, what)
        owner._check_precision(pairs)
        self._homes.settle(owner, variables)
        homes = [self._homes[v] for v in variables]
        for home in (h for h in homes if h.address != h.variable.data_ptr()):  # moved
            home.address, home.version, self._plans = home.variable.data_ptr(), None, []
        plan = Plan(pairs, homes, [owner._state.key(home.twin) for home in homes])
        self._plans = [plan, *self._plans[: KEPT - 1]]
        return plan

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._counts[what] += time.perf_counter() - start

    def _wait(self, loads: Iterable[Load]) -> None:
        with self._timed("waiting"):
            for load in loads:
                load.wait()

    def before(self, bucket: Bucket) -> None:
        """See Stage: its gradients must be there."""
        load = None if self._plan is None else self._plan.loads.get(bucket.key)
        self._wait([] if load is None else [load])
        self._launched = time.perf_counter()

    @torch.no_grad()
    def after(self, bucket: Bucket) -> None:
        """See Stage: its variables go up while the next are updated."""
        self._counts["updating"] += time.perf_counter() - self._launched
        load = None if self._plan is None else self._plan.loads.get(bucket.key)
        if load is not None:
            with self._timed("copying"):
                load.give_back()
            self._counts["parts"] += 1
            self._counts["bytes_up"] += load.bytes_up

    def leave(self) -> None:
        """See Stage."""
        if self._plan is not None:
            torch.autograd.graph.increment_version(self._plan.variables)
            for home in self._plan.homes:
                home.version = home.variable._version
        self._finished, self._plan = True, None
        self.stats = OffloadStats(**self._counts)

    def publish(self, written: Sequence[Tensor]) -> None:
        """See Stage."""
        self._homes.publish(written)

    @torch.no_grad()
    def settle(self, owner: Any, variables: Sequence[Tensor]) -> Sequence[Tensor]:
        """See Stage."""
        for position, variable in enumerate(variables):
            self._homes.check(variable, gradients.name(variable, position))
        self._homes.settle(owner, variables)
        self._homes.fetch(variables)
        return [self._homes[variable].twin for variable in variables]

    def pieces(self) -> Mapping[int, Piece]:
        """See Stage."""
        return self._homes.pieces()


def _read_at_once(owner: Any) -> bool:
    """Whether all gradients are looked at before the first launch: norms, a loss scale's check, transformers, verification."""
    checked = owner._guard is not None and owner._guard.open
    return bool(owner._clipping().by_norm or checked or owner._transformers or owner._verifying())
