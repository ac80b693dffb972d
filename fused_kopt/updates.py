"""From checked pairs to launches: dense variables join their bucket's launch, sparse gradients run on gathered rows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from fused_kopt import clipping, execute, gradients, layout, prepare, reference, tensors
from fused_kopt.buffers import Bucket
from fused_kopt.execute import Chosen, Rule, Update
from fused_kopt.layout import clone
from fused_kopt.recording import Sums
from fused_kopt.slots import Slot
from fused_kopt.stages import Stage
from fused_kopt.state import State

# What a sparse gradient moves (keras-semantics: IndexedSlices): the touched rows only; all rows of the slots but only the
# touched rows of the variable; all rows of both; or, without slots, a step of its own for every occurrence of a row.
SparseRows = Literal["touched", "state", "all", "each"]


@dataclass(frozen=True)
class Recipe:
    """What an optimizer does in this step, per bucket."""

    slots: tuple[Slot, ...]
    """In rule order."""
    rule: Rule
    sparse_rule: Callable[[int], Rule]
    sparse_rows: SparseRows
    scalars: Sequence[float]
    exact: bool
    own: Mapping[int, Sequence[float]]
    """By id of a variable: its scalars, where they are not `scalars`."""

    def rows(self, variables: Sequence[Tensor]) -> list[Sequence[float]] | None:
        """Each variable's scalars; None where all share them."""
        if not any(id(v) in self.own for v in variables):
            return None
        return [self.own.get(id(v), self.scalars) for v in variables]


@dataclass
class Launch:
    """An update, and what writes its results back where it ran on copies."""

    update: Update
    finish: list[Callable[[], object]] = field(default_factory=list)
    sparse: "SparseEntry | None" = None
    """Where the gradient is sparse: its pair, which is measured around the launch."""


@dataclass(frozen=True)
class Entry:
    """One pair, with its clip factors (None: neutral)."""

    gradient: Tensor
    variable: Tensor
    factors: Tensor | None


@dataclass(frozen=True)
class SparseEntry:
    """A sparse gradient and its variable."""

    entry: Entry
    all_rows: bool
    """Whether all rows of the variable move."""

    def measure(self) -> Callable[[], Tensor]:
        """To be called before the launch: a function that gives the sums of squares (`reference.squares`) after it."""
        gradient, variable, factors = clipping.values(self.entry.gradient), self.entry.variable, self.entry.factors
        if factors is not None:
            gradient = prepare.scale(gradient.to(factors.dtype), factors)
        rows = slice(None) if self.all_rows else torch.unique(self.entry.gradient._indices()[0])
        before = variable[rows].clone()
        return lambda: reference.squares(gradient, before, variable[rows])


def rounds(entries: Sequence[Entry], state: State) -> Iterator[list[Entry]]:
    """Entries split so that no variable occurs twice in a round; the n-th occurrences form round n, as Keras applies them.

    A later gradient in memory that an earlier round writes is copied first: it counts as it was when the step began.
    """
    left = list(entries)
    while left:
        seen: set[int] = set()
        now: list[Entry] = []
        later: list[Entry] = []
        for entry in left:
            (later if id(entry.variable) in seen else now).append(entry)
            seen.add(id(entry.variable))
        if later:
            written = _written(now, state)
            later = [replace(e, gradient=e.gradient.clone()) if written.touches(clipping.values(e.gradient)) else e for e in later]
        yield now
        left = later


def _written(entries: Sequence[Entry], state: State) -> tensors.Written:
    """The memory that a round writes: its variables, and the flat buffers of their buckets."""
    buckets = {id(bucket): bucket for bucket in (state.bucket(entry.variable) for entry in entries)}
    flats = [flat for bucket in buckets.values() for flat in bucket.flat.values()]
    return tensors.Written([*(entry.variable for entry in entries), *flats])


def plan(entries: Sequence[Entry], state: State, recipe: Callable[[Bucket], Recipe], sums: Sums | None = None) -> list[Launch]:
    """The launches of one round: one per bucket for its dense gradients, one per sparse gradient. Writes nothing.

    sums: where the round is measured.
    """
    members: dict[int, tuple[Bucket, list[Entry]]] = {}
    for entry in entries:
        bucket = state.bucket(entry.variable)
        members.setdefault(id(bucket), (bucket, []))[1].append(entry)
    written = _written(entries, state)
    launches = []
    for bucket, mine in members.values():
        how = recipe(bucket)
        dense = [entry for entry in mine if entry.gradient.layout == torch.strided]
        if dense:
            launches.append(dense_launch(bucket, dense, how, how.rule, written))
            launches[-1].update.sums = None if sums is None else sums.on(bucket.device)
        launches += [_sparse(bucket, entry, how, written) for entry in mine if entry.gradient.layout != torch.strided]
    return launches


def dense_launch(bucket: Bucket, entries: Sequence[Entry], recipe: Recipe, rule: Rule, written: tensors.Written) -> Launch:
    """One launch over a bucket. A variable laid out otherwise than its slots is updated as a copy and written back."""
    count = len(bucket.variables)
    names = tuple(slot.name for slot in recipe.slots)
    launch = Launch(Update(bucket, [None] * count, [None] * count, names, rule, recipe.scalars, recipe.exact))
    launch.update.rows = recipe.rows(bucket.variables)
    rows: list[Tensor | None] = [None] * count
    for entry in entries:
        index = bucket.index[id(entry.variable)]
        segment = bucket.segments[index]
        variable = entry.variable.detach()
        if variable.is_neg() or not layout.same_layout(segment.shape, segment.stride, variable.stride()):
            copy = clone(variable, segment.stride)
            launch.finish.append(copier(variable, copy))
            variable = copy
        launch.update.variables[index] = variable
        launch.update.gradients[index] = gradients.fit(entry.gradient, segment, written)
        rows[index] = entry.factors
    launch.update.factors = gradients.launch_factors(launch.update, rows)
    return launch


def copier(target: Tensor, source: Tensor) -> Callable[[], object]:
    """What writes a copy back."""
    return lambda: target.copy_(source)


def _row_copier(target: Tensor, rows: Tensor, source: Tensor) -> Callable[[], object]:
    return lambda: target.index_copy_(0, rows, source)


def _sparse(bucket: Bucket, entry: Entry, recipe: Recipe, written: tensors.Written) -> Launch:
    """One sparse gradient: clipped as stored, then its duplicate rows summed, then the rule on the rows it moves."""
    launch = _sparse_launch(bucket, entry, recipe, written)
    launch.sparse = SparseEntry(entry, recipe.sparse_rows == "all")
    return launch


def _sparse_launch(bucket: Bucket, entry: Entry, recipe: Recipe, written: tensors.Written) -> Launch:
    indices, values = entry.gradient._indices()[0], entry.gradient._values().to(bucket.compute)
    if entry.factors is not None:
        values = prepare.scale_and_clip(values, entry.factors.unbind())
    variable = entry.variable
    if recipe.sparse_rows == "each" and bucket.compute == variable.dtype:
        return _each(bucket, variable, indices, values, recipe)
    rows, sums = _merge(indices, values)
    if recipe.sparse_rows in ("touched", "each"):
        return _touched(bucket, variable, rows, sums, recipe)
    dense = torch.zeros(variable.shape, dtype=bucket.compute, device=bucket.device).index_copy_(0, rows, sums)
    launch = dense_launch(bucket, [Entry(dense, variable, None)], recipe, recipe.sparse_rule(variable.dim()), written)
    if recipe.sparse_rows == "state":
        segment = bucket.segments[bucket.index[id(entry.variable)]]
        copy = layout.clone(variable, segment.stride)
        launch.update.variables[bucket.index[id(entry.variable)]] = copy
        launch.finish = [lambda: variable.index_copy_(0, rows, copy.index_select(0, rows))]
    return launch


def _merge(indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows and the sums of their values."""
    rows, place = torch.unique(indices, return_inverse=True)
    sums = torch.zeros((len(rows), *values.shape[1:]), dtype=values.dtype, device=values.device)
    if values.device.type == "cpu":  # one occurrence after the other, as TensorFlow sums; coalesce() does not
        return rows, sums.index_add_(0, place, values)
    return rows, sums.index_put_((place,), values, accumulate=True)  # sorts first, so that the order is the same in every run


def _each(bucket: Bucket, variable: Tensor, indices: Tensor, values: Tensor, recipe: Recipe) -> Launch:
    """The rule on zeros gives the steps of all occurrences, which are then added one after the other."""
    values = values.clone(memory_format=torch.contiguous_format)  # the kernel reads rows in order; autograd may expand one element
    steps = torch.full_like(values, -0.0)  # what changes nothing when it is added, should the launch leave it
    small = Bucket(bucket.device, bucket.dtype)
    small.adopt(*small.grown([steps], recipe.slots))
    scalars = recipe.own.get(id(variable), recipe.scalars)
    update = Update(small, [steps], [values], (), recipe.sparse_rule(variable.dim()), scalars, recipe.exact)
    if variable.device.type == "cpu":
        return Launch(update, [lambda: variable.index_add_(0, indices, steps)])
    return Launch(update, [lambda: variable.index_put_((indices,), steps, accumulate=True)])


def _touched(bucket: Bucket, variable: Tensor, rows: Tensor, sums: Tensor, recipe: Recipe) -> Launch:
    """The rule on the touched rows, gathered into a bucket of their own."""
    gathered = variable.index_select(0, rows)
    small = Bucket(bucket.device, bucket.dtype)
    small.adopt(*small.grown([gathered], recipe.slots))
    names = tuple(slot.name for slot in recipe.slots)
    scalars = recipe.own.get(id(variable), recipe.scalars)
    launch = Launch(Update(small, [gathered], [sums], names, recipe.sparse_rule(variable.dim()), scalars, recipe.exact))
    launch.finish.append(_row_copier(variable, rows, gathered))
    for name in names:
        view, mine = bucket.view(name, bucket.index[id(variable)]), small.view(name, 0)
        mine.copy_(view.index_select(0, rows))
        launch.finish.append(_row_copier(view, rows, mine))
    return launch


def run(launches: Sequence[Launch], executors: Sequence[Chosen], sums: Sums | None = None, stages: Sequence[Stage] = ()) -> None:
    """Execute the launches of a round, and write back what ran on copies."""
    with torch.no_grad():
        for launch, executor in zip(launches, executors, strict=True):
            measured = launch.sparse.measure() if sums is not None and launch.sparse is not None else None
            for stage in stages:
                stage.before(launch.update.bucket)
            execute.run(launch.update, executor)
            for write_back in launch.finish:
                write_back()
            for stage in stages:
                stage.after(launch.update.bucket)
            if sums is not None and measured is not None:
                sums.on(launch.update.bucket.device).add_(measured())
