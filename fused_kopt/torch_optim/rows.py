"""A step's scalars: a row for every distinct (group, counters) among the parameters, which is mostly one for all of them."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from fused_kopt import hyperparameters, options
from fused_kopt.hyperparameters import Step
from fused_kopt.torch_optim import stored
from fused_kopt.torch_optim.members import Part

Group = Mapping[str, Any]


class Owner(Protocol):
    """What rows need of an optimizer."""

    param_groups: list[dict[str, Any]]

    def scalars(self, group: Group, step: Step) -> Any: ...
    def decoupled(self, group: Group) -> bool: ...


class Rows:
    """The rows of one part.

    counts: by counter its values before the step, per parameter. decaying: whether the rule has weight decay around it.
    """

    def __init__(self, owner: Owner, part: Part, counts: Mapping[str, Any], decaying: bool) -> None:
        self._owner, self._decaying, self._policy = owner, decaying, part.policy
        self._groups = [owner.param_groups[i] for i in part.groups]
        columns = list(counts.values())
        if all((column == column[0]).all() for column in columns):
            self._distinct: Any = [(rank, *(column[0] for column in columns)) for rank in range(len(part.groups))]
            self.which: Any = part.ranks
        else:
            table = np.column_stack([part.ranks, *columns]).astype(np.float64)
            self._distinct, self.which = np.unique(table, axis=0, return_inverse=True)
        self._found: dict[torch.dtype, Sequence[Any]] = {}
        self.products: dict[torch.dtype, Any] = {}
        """By compute dtype Nadam's `mu_product` after the step, per row."""

    def of(self, dtype: torch.dtype) -> Sequence[Any]:
        """The rows in a compute dtype, or the one that is all of them."""
        if dtype not in self._found:
            steps = [Step(int(count), dtype) for _, count, *_ in self._distinct]
            for step, (_, _, *product) in zip(steps, self._distinct, strict=True):
                step.cache = product[0] if product else None
            with hyperparameters.ieee():
                rows = [self._row(self._groups[int(row[0])], step) for row, step in zip(self._distinct, steps, strict=True)]
            found = [self._policy.extended(row, step.iterations) for row, step in zip(rows, steps, strict=True)]
            self.products[dtype] = np.array([step.cache for step in steps])
            self._found[dtype] = found[:1] if all(row == found[0] for row in found) else found
        return self._found[dtype]

    def _row(self, group: Group, step: Step) -> Any:
        row = self._owner.scalars(group, step)
        if not self._decaying:
            return row
        decay = float(group["weight_decay"])
        kind: Any = type(row)
        if self._owner.decoupled(group):  # in double precision and rounded once, as torch.optim's AdamW
            return options.extended(kind, "decay")(*row, 1 - float(group["lr"]) * decay)
        return options.extended(kind, "penalty")(*row, decay)


def rules(owner: Any) -> tuple[list[Any], bool]:
    """The rule and the precision policy of every group, and whether the rules have weight decay around them: where one group decays,
    all do, in one launch."""
    decaying = any(float(group["weight_decay"]) for group in owner.param_groups)
    found = [owner.rule(group) for group in owner.param_groups]
    if decaying:
        kinds = [options.decayed if owner.decoupled(group) else options.penalised for group in owner.param_groups]
        found = [options.around(kind, rule) for kind, rule in zip(kinds, found, strict=True)]
    return list(zip(found, map(stored.policy, owner.param_groups), strict=True)), decaying
