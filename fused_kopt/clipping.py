"""Keras's gradient scaling and clipping, as five factors per gradient that the launch applies (`fused_kopt.prepare`)."""

import functools
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fused_kopt import layout, norms, op, verification
from fused_kopt.execute import Chosen, Executor
from fused_kopt.loss_scale import Guard
from fused_kopt.norms import Norms
from fused_kopt.prepare import NEUTRAL_FACTORS
from fused_kopt.recording import Sums

Pairs = Sequence[tuple[Tensor, Tensor]]


class Across(Protocol):
    """Adds up squares over ranks that each have parts of the gradients."""

    def whole(self, squares: list[Tensor], each: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Squares for the factors, and squares whose sum is not finite where any rank's gradient is not.

        squares: per group float64 [n], of this rank's parts. The first result has each part's whole gradient's in the same places if
        `each`, else the sum over everything as its one element.
        """


class Everywhere(Across, Protocol):
    """Where every rank has parts of all variables: adds up what is measured of a step, too."""

    def add(self, sums: Sums) -> None:
        """Make a step's sums of this rank those of all."""


class Clips(NamedTuple):
    """What happens to every gradient before the rule, in this order. Limits are >= 0 or None."""

    grad_scale: Any
    clipvalue: float | None
    clipnorm: float | None
    global_clipnorm: float | None
    trust: bool = False
    """In place of limits: multiply by |variable| / |gradient|, where neither is 0. Both have one dtype."""
    unscale: Tensor | None = None
    """0-d, on any device: what grad_scale is multiplied by there; under loss scaling the scale's reciprocal."""
    across: "Across | None" = None
    """Where other ranks have the other parts of the gradients."""

    @property
    def neutral(self) -> bool:
        """Whether gradients stay as they are. Raises TypeError for a grad_scale that is no number."""
        if type(self.grad_scale) is not float and not isinstance(self.grad_scale, Real):
            raise TypeError(f"`grad_scale` must be a real number. Received: grad_scale={self.grad_scale!r}.")
        return self.grad_scale == 1.0 and self.clipvalue is None and not self.by_norm and self.unscale is None

    @property
    def by_norm(self) -> bool:
        """Whether norms are needed."""
        return self.clipnorm is not None or self.global_clipnorm is not None or self.trust

    def row(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The factors that do not depend on a norm: compute dtype [5]."""
        bound = NEUTRAL_FACTORS[1] if self.clipvalue is None else self.clipvalue
        return torch.tensor((self.grad_scale, bound, *NEUTRAL_FACTORS[2:]), dtype=dtype, device=device)


TRUST = Clips(1.0, None, None, None, trust=True)


class Group:
    """The gradients of a step that lie on one device and share their dtype and their variables' compute dtype."""

    def __init__(self, pairs: Pairs, positions: Sequence[int]) -> None:
        self.positions = list(positions)
        gradient, variable = pairs[positions[0]]
        self.device, self.compute = variable.device, layout.compute_dtype(variable.dtype)
        self.dtypes = (self.compute, gradient.dtype)
        self._counts = [values(pairs[p][0]).numel() for p in positions]
        self._tables: dict[Clips, Tensor] = {}

    @functools.cached_property
    def norms(self) -> Norms:
        """How square norms are computed."""
        return Norms(self._counts, self.dtypes, self.device)

    def table(self, clips: Clips) -> Tensor:
        """`clips.row` for every gradient, compute dtype [n, 5], uploaded once. Not to be written."""
        return _unscaled(self._fixed(clips), clips.unscale)

    def row(self, clips: Clips) -> Tensor:
        """The same, of one gradient: [5]."""
        return _unscaled(self._fixed(clips)[:1], clips.unscale)[0]

    def _fixed(self, clips: Clips) -> Tensor:
        clips = clips._replace(unscale=None, across=None)  # neither is in a row
        if clips not in self._tables:
            kept = list(self._tables.items())[-1:]  # two: a guard's check knows no clipvalue
            self._tables = dict([*kept, (clips, clips.row(self.compute, self.device).repeat(len(self._counts), 1))])
        return self._tables[clips]


def _unscaled(table: Tensor, unscale: Tensor | None) -> Tensor:
    if unscale is None:
        return table
    table = table.clone()
    table[:, 0] *= unscale if unscale.device.type == "cpu" else unscale.to(table.device, non_blocking=True)
    return table


def measure(
    groups: Sequence[Group], clips: Clips, squares_of: Callable[[Group, Clips], Tensor], guard: Guard | None
) -> list[Tensor] | None:
    """The squares that clips need, and a guard's look at its own: those of gradients that no clipvalue has made finite."""
    squares, seen = _whole([squares_of(group, clips) for group in groups], clips) if clips.by_norm else (None, None)
    if guard is not None and guard.open:
        free = clips._replace(clipvalue=None)
        if seen is None or clips != free:
            _, seen = _whole([squares_of(group, free) for group in groups], free)
        guard.check(seen)
    return squares


def _whole(squares: list[Tensor], clips: Clips) -> tuple[list[Tensor], list[Tensor]]:
    return (squares, squares) if clips.across is None else clips.across.whole(squares, clips.clipnorm is not None)


def values(gradient: Tensor) -> Tensor:
    """The stored elements: all of a dense gradient, the rows of a sparse one before duplicates are merged."""
    return gradient._values() if gradient.layout == torch.sparse_coo else gradient


def groups(pairs: Pairs) -> list[Group]:
    """The pairs' groups, in order of first appearance."""
    found: dict[Any, list[int]] = {}
    for position, (gradient, variable) in enumerate(pairs):
        found.setdefault((variable.device, layout.compute_dtype(variable.dtype), gradient.dtype), []).append(position)
    return [Group(pairs, positions) for positions in found.values()]


def factors(
    groups: Sequence[Group], clips: Clips, squares: Sequence[Tensor] | None, weights: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Per group the factors of its gradients, compute dtype [n, 5].

    squares: per group float64 [n], where clips go by norm; weights: those of the variables, where they go by trust.
    """
    tables = [group.table(clips) for group in groups]
    if squares is None:
        return tables
    tables = [table.clone() for table in tables]
    if clips.clipnorm is not None:
        squares = [_clip_each(table, square, clips.clipnorm) for table, square in zip(tables, squares, strict=True)]
    if clips.global_clipnorm is not None:
        _clip_all(tables, squares, clips.global_clipnorm)
    for table, square, weight in zip(tables, squares, weights or (), strict=False):
        table[:, 4] = torch.where((weight > 0) & (square > 0), op.div(op.sqrt(weight), op.sqrt(square)), 1.0)
    return tables


def _clip_each(table: Tensor, squares: Tensor, clip: float) -> Tensor:
    """Set multipliers and divisors: g * clip / max(norm, clip). Returns the square norms after it."""
    table[:, 2] = clip
    table[:, 3] = torch.maximum(op.sqrt(squares).to(table.dtype), table[:, 2])
    return squares * (table[:, 2].double() / table[:, 3].double()) ** 2


def _clip_all(tables: Sequence[Tensor], squares: Sequence[Tensor], clip: float) -> None:
    """Set every scale to clip * min(1 / G, 1 / clip) in its dtype; NaN where the global norm G is not finite."""
    norm = op.sqrt(norms.fold(torch.cat([s.to(squares[0].device) for s in squares])))
    for table in tables:
        bound = torch.full((), clip, dtype=table.dtype, device=table.device)
        g = norm.to(bound)
        table[:, 4] = bound * torch.minimum(1 / g, 1 / bound) + (g - g)


def rows(
    pairs: Pairs, clips: Clips, executors: Mapping[torch.device, Chosen], requested: Executor, guard: Guard | None = None
) -> list[Tensor | None]:
    """Per pair its factors, compute dtype [5]; None where they are neutral. A guard checks the gradients.

    Squares are summed in float64 (`fused_kopt.norms`); TensorFlow sums in the variable's dtype, and the last bits of a norm
    can differ.
    """
    found: list[Tensor | None] = [None] * len(pairs)
    if clips.neutral and (guard is None or not guard.open):
        return found
    parts = groups(pairs)
    squares = measure(parts, clips, lambda group, c: _squares(group, pairs, c, executors[group.device], requested), guard)
    if clips.neutral:
        return found
    itself = [(variable.detach(), variable) for _, variable in pairs]
    weights = [_squares(group, itself, clips, executors[group.device], requested) for group in parts] if clips.trust else None
    for group, table in zip(parts, factors(parts, clips, squares, weights), strict=True):
        for position, row in zip(group.positions, table.unbind(), strict=True):
            found[position] = row
    return found


def _squares(group: Group, pairs: Pairs, clips: Clips, executor: Chosen, requested: Executor) -> Tensor:
    flat = [layout.memory_order(values(pairs[position][0])) for position in group.positions]
    executor = verification.proven_norms(group.dtypes, group.device, executor, requested)
    if executor == "reference":
        return norms.reference(flat, group.row(clips))
    return group.norms.squares(np.array([g.data_ptr() for g in flat], dtype=np.int64), group.row(clips), executor)
