"""A step, worked out before anything is created or written: scalars, executors, factors, launches."""

from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fused_kopt import clipping, execute, hyperparameters, layout, updates
from fused_kopt.clipping import Clips
from fused_kopt.declared import Declared
from fused_kopt.execute import Chosen
from fused_kopt.hyperparameters import Step
from fused_kopt.recording import Sums
from fused_kopt.state import Key
from fused_kopt.updates import Entry, Launch, Recipe, SparseRows


class Prepared(NamedTuple):
    """A step, worked out but not begun."""

    entries: list[Entry]
    variables: list[Tensor]  # distinct, in order of first appearance
    recipes: dict[Key, Recipe]
    executors: dict[torch.device, Chosen]
    steps: dict[torch.dtype, Step]


class Planned(Declared):
    """The part of Optimizer that plans steps."""

    sparse_rows: ClassVar[SparseRows] = "touched"

    def _new_weights(self, variables: Sequence[Tensor]) -> list[Tensor]:
        """Weights besides the slots that the first step creates, before them (Nadam's momentum cache)."""
        return []

    def _prepare(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Prepared:
        """All that a step needs to know before anything is created."""
        self._check_precision(pairs)
        variables = list({id(v): v for _, v in pairs}.values())
        steps: dict[torch.dtype, Step] = {}
        recipes = {key: self._recipe(key, steps) for key in dict.fromkeys(map(self._state.key, variables))}
        executors = self._executors(variables)
        rows = clipping.rows(pairs, self._clipping(), executors, self._executor, self._guard)
        entries = [Entry(g, v, row) for (g, v), row in zip(pairs, rows, strict=True)]
        return Prepared(entries, variables, recipes, executors, steps)

    def _executors(self, variables: Iterable[Tensor]) -> dict[torch.device, Chosen]:
        """By device the executor of distinct variables."""
        sizes: dict[torch.device, list[int]] = {}
        for variable in variables:
            sizes.setdefault(variable.device, []).append(variable.numel())
        return {device: execute.choose(self._executor, device, sum(mine), len(mine)) for device, mine in sizes.items()}

    def _clipping(self) -> Clips:
        unscale = None if self._guard is None else self._guard.unscale
        return Clips(self.grad_scale, self.clipvalue, self.clipnorm, self.global_clipnorm, unscale=unscale, across=self._across)

    def _rounds(self, prepared: Prepared, sums: Sums | None = None) -> Iterator[list[Launch]]:
        for entries in updates.rounds(prepared.entries, self._state):
            with torch.no_grad():  # not around the yield: a traceback that keeps this frame would keep gradients off
                launches = updates.plan(entries, self._state, lambda b: prepared.recipes[b.key], sums)
            for launch in launches:
                launch.update.gate = None if self._guard is None else self._guard.gate(launch.update.bucket.device)
            yield launches

    def _recipe(self, key: Key, steps: dict[torch.dtype, Step]) -> Recipe:
        hyperparameters.create(self)
        _, dtype, policy, _ = key
        scalars, own = self._scalars((layout.compute_dtype(dtype), policy), steps)
        planes = policy.planes(dtype, self._all_slots())
        rule = self._stored_rule(dtype, policy)
        return Recipe(planes, rule, self.sparse_rule, self.sparse_rows, scalars, self.exact, own)

    def _begin(self, variables: Sequence[Tensor]) -> None:
        """Create what the first step creates: hyperparameters, iterations, slots."""
        weights = self._new_weights(variables)
        hyperparameters.create(self)
        self._state.ensure(variables, self._all_slots(), weights, counted=True)
