"""Who takes part in a step: the parameters with gradients, their states, and the counters of all states in one array."""

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fused_kopt import layout
from fused_kopt.clipping import Clips
from fused_kopt.execute import Rule
from fused_kopt.precision import Precision
from fused_kopt.torch_optim import shards
from fused_kopt.torch_optim.shards import Across, Shards

State = dict[str, Any]


class Counters:
    """The 0-d CPU tensors of all states, such as `step`, as views of one array: counting 5,000 one by one takes 8 ms.

    Nothing else of the states is kept alive: whoever replaces one frees its memory.
    """

    def __init__(self, owners: Mapping[Tensor, State], kinds: Mapping[str, tuple[torch.dtype, float]]) -> None:
        self.params, states = list(owners), list(owners.values())
        self.values: dict[str, Any] = {}
        self._views: dict[str, list[Tensor]] = {}
        for name, (dtype, initial) in kinds.items():
            counts = torch.tensor([float(state.get(name, initial)) for state in states], dtype=dtype, device="cpu")
            self.values[name], self._views[name] = counts.numpy(), list(counts.unbind())
            for state, view in zip(states, self._views[name], strict=True):
                state[name] = view

    def of(self, owners: Mapping[Tensor, State]) -> bool:
        """Whether these are the parameters, with the counters in their states: whoever loads or moves a state replaces them."""
        states = list(owners.values())
        if len(states) != len(self.params) or not all(map(is_, owners, self.params)):
            return False
        return all(all(map(is_, [state.get(name) for state in states], views)) for name, views in self._views.items())


class Part(NamedTuple):
    """The members that one rule updates under one precision policy."""

    rule: Rule
    policy: Precision
    groups: list[int]
    positions: list[int] | None
    """Among the members; None: all."""
    ranks: Any
    """int64, per parameter the position of its group in `groups`."""

    def select(self, values: Any) -> Any:
        """What of a list, or an array, by members belongs to this part."""
        if self.positions is None:
            return values
        return values[self.positions] if isinstance(values, np.ndarray) else [values[i] for i in self.positions]


class Sighting(NamedTuple):
    """What one look at an optimizer's groups finds, and the next look can be compared with."""

    params: list[Tensor]
    """Of all groups, in order."""
    sizes: list[int]
    absent: list[bool] | None
    """Which have no gradient; None for none."""
    rules: list[tuple[Rule, Precision]]
    """By group, with the policy that says how its state is stored."""
    decaying: bool
    """Whether the rules have weight decay around them."""

    def same(self, other: "Sighting") -> bool:
        """Whether the members are the same."""
        alike = self.sizes == other.sizes and self.rules == other.rules and self.absent == other.absent
        return alike and all(map(is_, self.params, other.params))


class Members:
    """The parameters that have gradients, and the parts that the rules make of them."""

    def __init__(self, seen: Sighting, names: list[str]) -> None:
        self.seen, self.names = seen, names
        self.params = present(seen.params, seen.absent)
        self.sharded = any(isinstance(param, shards.sharded()) for param in seen.params)
        self.wide = np.array([param.dtype == torch.float64 for param in self.params])
        groups = np.array(present([i for i, size in enumerate(seen.sizes) for _ in range(size)], seen.absent))
        self.parts = [_part(rule, seen.rules, groups) for rule in dict.fromkeys(seen.rules[i] for i in groups)]
        self.positions = _positions(seen) if any(part.policy.random for part in self.parts) else None
        self._counters: Counters | None = None
        self._places: Any = None
        self._fit: list[Any] = []  # of the last gradients that were placed as their parameters: where they lie
        self._shards: dict[tuple[Rule, Precision], tuple[Shards, Any]] = {}

    def local(self, gradients: Sequence[Any]) -> list[Any]:
        """What of gradients lies on this rank, placed as their parameters."""
        specs = shards.specs(gradients)
        if len(specs) != len(self._fit) or not all(map(is_, specs, self._fit)):  # comparing placements takes 0.2 us for each
            fitting = shards.placed(gradients, self.params)
            self._fit = specs if all(map(is_, fitting, gradients)) else []
            gradients = fitting
        return shards.local(gradients)

    def moves(self, gradients: Sequence[Tensor]) -> bool:
        """Whether any gradient, on any rank, has an element that is not 0."""
        mine = any(bool(gradient.any()) for gradient in gradients)
        return Shards(self.seen.params).agree(mine) if self.sharded else mine

    def clips(self, part: Part, clips: Clips, gradients: Sequence[Tensor], variables: Sequence[Tensor]) -> Clips:
        """What happens to a part's gradients, where limits on norms may need other ranks' shards. Raises what `shards.check_norms` does."""
        if not clips.by_norm:
            return clips
        key = (part.rule, part.policy)
        if key not in self._shards:
            self._shards[key] = self._others(*key)
        others, there = self._shards[key]
        return clips._replace(across=Across(others, there, list(zip(gradients, variables, strict=True)))) if others.groups else clips

    def _others(self, *key: Any) -> tuple[Shards, Any]:
        """Who has the other shards of a rule's parameters, and which of these have gradients here: another rank may have more."""
        foreign = [self.seen.rules[i] != key for i, size in enumerate(self.seen.sizes) for _ in range(size)]
        absent = np.array(present(self.seen.absent or [False] * len(foreign), foreign))
        params = present(self.seen.params, foreign)
        shards.check_norms(params)
        return Shards(params), np.flatnonzero(~absent)

    def places(self, counters: Counters) -> Any:
        """int64, where the members' states and counters lie among all."""
        if counters is not self._counters:
            places = {id(param): i for i, param in enumerate(counters.params)}
            self._counters, self._places = counters, np.array([places[id(param)] for param in self.params])
        return self._places


def _part(rule: tuple[Rule, Precision], rules: Sequence[tuple[Rule, Precision]], groups: Any) -> Part:
    mine = np.array([rules[i] == rule for i in groups])
    found, ranks = np.unique(groups[mine], return_inverse=True)
    return Part(*rule, found.tolist(), None if mine.all() else np.flatnonzero(mine).tolist(), ranks)


def _positions(seen: Sighting) -> list[int]:
    """Where each member's elements begin among those of all parameters in their order, so that nobody's random bits depend on who
    else has a gradient, on dtypes, devices or policies, nor on how parameters are sharded where `shards.start` says so."""
    sizes = np.array([-(-param.numel() // layout.ALIGNMENT) * layout.ALIGNMENT for param in seen.params])
    starts = np.array([shards.start(param) for param in seen.params])
    return present((np.cumsum(sizes) - sizes + starts).tolist(), seen.absent)


def present(values: list[Any], absent: list[bool] | None) -> list[Any]:
    """The values of those that are not absent."""
    return values if absent is None else [value for value, gone in zip(values, absent, strict=True) if not gone]
