"""Sums whose bits do not depend on how many ranks there are: one tree over all micro-batches of a step."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fused_kopt import agreement, collectives, gradients, layout, stages, tape
from fused_kopt.aggregate import fill
from fused_kopt.agreement import Agreement, Claim
from fused_kopt.collectives import Group
from fused_kopt.distributed import partition

# A sum of micro-batches: its level in the tree, its index there (it covers `index << level` to `(index + 1) << level`).
Node = tuple[int, int]


def parent(node: Node, parts: int) -> tuple[Node, bool]:
    """The node above, and whether this one is its only child: at the tree's right edge there may be no sibling."""
    level, index = node
    return (level + 1, index // 2), index % 2 == 0 and (index + 1) << level >= parts


def merged(nodes: Sequence[Node], parts: int) -> list[Node]:
    """The fewest nodes that neighbouring nodes can be added up to."""
    found: list[Node] = []
    for node in nodes:
        found.append(node)
        while found[-1][0] < depth(parts):
            above, alone = parent(found[-1], parts)
            left = (found[-1][0], found[-1][1] - 1)
            if alone:
                found[-1:] = [above]
            elif found[-1][1] % 2 and found[-2:-1] == [left]:
                found[-2:] = [above]
            else:
                break
    return found


def depth(parts: int) -> int:
    """The root's level."""
    return (parts - 1).bit_length()


def mine(parts: int, rank: int, ranks: int) -> range:
    """The micro-batches of a rank: as equal runs as there can be."""
    return range(parts * rank // ranks, parts * (rank + 1) // ranks)


class TreeSum:
    """Adds up the gradients of a step's micro-batches in one order, whoever computes them: the same bits on 1, 2, 3 or 1,000 ranks.

        tree = fused_kopt.distributed.TreeSum(model.parameters(), parts=8)
        for batch in data:
            for i in tree.mine:
                loss(model, batch[i]).backward()
                tree.add()
            optimizer.apply_gradients(tree.sum(), experimental_aggregate_gradients=False)

    Micro-batches are the leaves of a balanced binary tree; a rank adds up what it has of a subtree, then every rank finishes the tree for
    1/N of the elements. What goes over the wire is what an all-reduce sends where ranks hold whole subtrees (`parts` and ranks
    are powers of two), and up to log2(parts) times as much for others; gradients are kept in float32 (float64 for float64 variables),
    as many copies as a rank has open subtrees, at most log2(parts per rank) + 1, and two more while they are exchanged.

    Args:
        variables: leaves, each once; they may be nested in lists.
        parts: micro-batches of a step, the same on every number of ranks. At least 1.
        group: of torch.distributed; default: all ranks. One rank, or no process group at all, is fine.

    Attributes: `variables`; `mine`, which micro-batches this rank must add, in order.

    Raises ValueError for `parts` below 1, and what `apply_gradients` raises for a variable.
    """

    def __init__(self, variables: Iterable[Tensor], parts: int, group: Group = None) -> None:
        if not isinstance(parts, int) or parts < 1:
            raise ValueError(f"`parts` must be an int >= 1. Received: parts={parts!r}.")
        self.variables = list({id(v): v for v in tape.flatten(variables)}.values())
        gradients.check([(v.detach(), v) for v in self.variables])
        self.parts, self.mine = parts, mine(parts, collectives.rank(group), collectives.size(group))
        self.group, self._agreement = group, Agreement(group)
        self._came = [False] * len(self.variables)
        alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for position, variable in enumerate(self.variables):
            alike.setdefault((variable.device, layout.compute_dtype(variable.dtype)), []).append(position)
        self._flats = [_Flat(self, kind, members) for kind, members in alike.items()]
        self._nodes: list[Node] = []
        self._added = 0

    def add(self, grads: Sequence[Tensor | None] | None = None) -> None:
        """The gradients of the next of `mine`.

        grads: one for each variable, dense or None. Default: every variable's `.grad`, which is None afterwards.

        Raises ValueError for another count and for more micro-batches than `mine`, what `apply_gradients` raises for a gradient.
        """
        given = [v.grad for v in self.variables] if grads is None else list(grads)
        if len(given) != len(self.variables):
            raise ValueError(f"`grads` must have one gradient for each of {len(self.variables)} variables. Received: {len(given)}.")
        if self._added == len(self.mine):
            raise ValueError(f"This rank has {len(self.mine)} of {self.parts} micro-batches per step, and they are added. Call sum().")
        gradients.check([(g, v) for g, v in zip(given, self.variables, strict=True) if g is not None])
        nodes = [*self._nodes, (0, self.mine[self._added])]
        self._nodes = merged(nodes, self.parts)
        for flat in self._flats:
            flat.push(given, len(nodes) - len(self._nodes))
        self._added += 1
        self._came = [came or g is not None for came, g in zip(self._came, given, strict=True)]
        if grads is None:
            for variable in self.variables:
                variable.grad = None

    def sum(self) -> list[tuple[Tensor | None, Tensor]]:
        """(sum, variable) pairs over all ranks' micro-batches, and a new start. None where no micro-batch had a gradient.

        The sums are valid until the next call. Raises ValueError where micro-batches are missing, RankMismatchError, PeerError.
        """
        with self._agreement.reported():
            if self._added < len(self.mine):
                raise ValueError(
                    f"{len(self.mine) - self._added} of this rank's {len(self.mine)} micro-batches were not added. Call add()."
                )
            facts = [("parts", str(self.parts)), *stages.facts(None, self.variables)]
            codes = agreement.codes([v if came else None for v, came in zip(self.variables, self._came, strict=True)])
            codes = self._agreement.agree(Claim(agreement.hashed(facts), [], codes, lambda: facts, list, False))
        found = [view for flat in self._flats for view in flat.finish()]
        order = {p: view for p, view in zip((p for flat in self._flats for p in flat.members), found, strict=True)}
        self._nodes, self._added, self._came = [], 0, [False] * len(self.variables)
        return [(order[p] if code else None, v) for p, (v, code) in enumerate(zip(self.variables, codes, strict=True))]


class _Flat:
    """The sums of one device and dtype: a stack of flat buffers, one for each node."""

    def __init__(self, tree: TreeSum, kind: tuple[torch.device, torch.dtype], members: list[int]) -> None:
        self.members, self._kind, self._parts, self._group = members, kind, tree.parts, tree.group
        self._segments = layout.plan([tree.variables[p] for p in members])
        self._ranks = collectives.size(tree.group)
        self._share = partition.share(self._segments[-1].end, self._ranks)
        self._stack: list[Tensor] = []
        self._free: list[Tensor] = []

    def _buffer(self) -> Tensor:
        size = self._share * self._ranks
        return self._free.pop() if self._free else torch.zeros(size, dtype=self._kind[1], device=self._kind[0])

    @torch.no_grad()
    def push(self, given: Sequence[Tensor | None], sums: int) -> None:
        """A micro-batch's gradients, and how many sums they complete."""
        buffer = self._buffer()
        fill([segment.of(buffer) for segment in self._segments], [given[p] for p in self.members])
        self._free += _add(self._stack, buffer, sums)

    @torch.no_grad()
    def finish(self) -> list[Tensor]:
        """The sums of all ranks' micro-batches, one for each member; a new start."""
        every = [merged([(0, i) for i in mine(self._parts, rank, self._ranks)], self._parts) for rank in range(self._ranks)]
        sizes = [len(nodes) * self._share for nodes in every]
        empty = torch.zeros(0, dtype=self._kind[1], device=self._kind[0])
        sent = torch.cat(
            [empty, *(part for chunks in zip(*(torch.split(b, self._share) for b in self._stack), strict=True) for part in chunks)]
        )
        received = torch.empty(sum(sizes), dtype=self._kind[1], device=self._kind[0])
        collectives.exchange(received, sent, (sizes, [len(self._stack) * self._share] * self._ranks), self._group)()
        self._free += self._stack
        self._stack = []
        nodes: list[Node] = []
        stack: list[Tensor] = []
        for node, part in zip((node for mine in every for node in mine), torch.split(received, self._share), strict=True):
            above = merged([*nodes, node], self._parts)
            _add(stack, part, len(nodes) + 1 - len(above))
            nodes = above
        whole = self._free[0] if self._free else self._buffer()
        collectives.gather(whole, stack[0], self._group)()
        self._free = [whole]
        return [segment.of(whole) for segment in self._segments]


def _add(stack: list[Tensor], new: Tensor, sums: int) -> list[Tensor]:
    """Put a node's sum on a stack, and add up what it completes. Returns what is free then."""
    stack.append(new)
    freed = []
    for _ in range(sums):
        freed.append(stack.pop())
        stack[-1].add_(freed[-1])
    return freed
