"""Optimizers whose state is divided among ranks."""

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fused_kopt import collectives, layout, slots, tape
from fused_kopt.aggregate import AllReduce
from fused_kopt.collectives import Group
from fused_kopt.distributed.backward import ReduceInBackward
from fused_kopt.distributed.shards import Shards
from fused_kopt.mixed_precision import LossScaleOptimizer
from fused_kopt.optimizer import Optimizer

PART_BYTES = 1 << 28
Sharded = TypeVar("Sharded")
S = TypeVar("S")


def shard(optimizer: Sharded, group: Group = None, part_bytes: int = PART_BYTES, check_every: int = 0) -> Sharded:
    """Divide an optimizer's state among the ranks of a process group (ZeRO-1), before its first step.

        optimizer = fused_kopt.distributed.shard(fused_kopt.Adam(precision="bf16_split"))
        ...
        optimizer.apply_gradients(zip(grads, variables))

    Each rank keeps 1/N of the slots and masters. A step sums gradients by reduce-scatter, updates the rank's share, and gathers the
    variables: bit for bit what an optimizer makes of the sums that keeps everything, but for the last bits of norms, which are added up
    in another order. With `reduce_in_backward` gradients never are all there either (ZeRO-2). Variables become views of flat buffers at
    the first step. What `AllReduce` says of agreement and absent gradients holds here.

    Args:
        optimizer: any optimizer of this package without state, or a LossScaleOptimizer around one. It is changed in place and returned.
        group: of torch.distributed; default: all ranks. One rank, or no process group at all, is fine.
        part_bytes: about the size of a part, which is a launch of its own: one is gathered while the next is updated.
        check_every: as for AllReduce, of the variables.

    `weights` and `get_slot` have this rank's pieces, 1-D (`full_slot` collects a slot); `last_stats` and norms are of everything;
    `set_precision`, `scale_learning_rate` and `build` take variables as before. A rank that is lost before the gathering leaves
    the others torn (TornStepError): a share of the state is lost with it. Load a checkpoint.

    Raises TypeError for other objects, ValueError where there is state already, or gradient_transformers, which need whole gradients;
    a step raises ValueError for a variable given twice, RuntimeError for sparse gradients.
    """
    inner = taking_steps(optimizer)
    if inner is None:
        raise TypeError(f"`optimizer` must be one of fused_kopt.optimizers, or a LossScaleOptimizer. Received: {type(optimizer).__name__}.")
    if not isinstance(part_bytes, int) or part_bytes < 1:
        raise ValueError(f"`part_bytes` must be an int >= 1. Received: part_bytes={part_bytes!r}.")
    if inner._stages or inner._state.buckets:
        raise ValueError("This optimizer has state, or is sharded or offloaded, already. Shard a new one, then load a checkpoint.")
    if inner._transformers:
        raise ValueError("`gradient_transformers` need whole gradients, of which a rank has pieces. Use the clip arguments instead.")
    stage = Shards(AllReduce(group, check_every), part_bytes)
    inner._stages.append(stage)
    inner._across = stage
    return optimizer


def taking_steps(optimizer: Any) -> Optimizer | None:
    """The optimizer that takes the steps: itself, or the one inside a LossScaleOptimizer; None for anything else."""
    inner: Any = optimizer.inner_optimizer if type(optimizer) is LossScaleOptimizer else optimizer
    return inner if isinstance(inner, Optimizer) else None


def stage_of(optimizer: Any, kind: type[S]) -> tuple[Optimizer, S]:
    """The optimizer that takes the steps, and its stage of a kind. Raises TypeError where it has none."""
    inner = taking_steps(optimizer)
    found = [] if inner is None else [stage for stage in inner._stages if isinstance(stage, kind)]
    if inner is None or not found:
        raise TypeError(f"This {type(optimizer).__name__} has no {kind.__name__.lower()}. Pass what fused_kopt.distributed.shard returned.")
    return inner, found[0]


def full_slot(optimizer: Any, variable: Tensor, name: str) -> Tensor:
    """A slot of a sharded optimizer, collected from all ranks, in the variable's shape; float32 (float64 for float64 variables).

    Every rank must call it. Raises KeyError where the variable has no such slot, TypeError unless the optimizer is sharded, PeerError.
    """
    owner, stage = stage_of(optimizer, Shards)
    number, index = stage.home.get(id(variable), (-1, 0))
    if number < 0 or id(variable) not in stage._numbered or name not in [s.name for s in slots.flatten(owner._all_slots())]:
        raise KeyError(f"No slot {name!r} for this variable {tuple(variable.shape)}. Slots: {owner.get_slot_names()}.")
    part, (piece, start, end) = stage.parts[number], stage.own[id(variable)]
    whole = torch.zeros(len(part.flat), dtype=layout.compute_dtype(variable.dtype), device=variable.device)
    mine = whole[stage.rank * part.share :][: part.share]
    at = part.segments[index].offset
    if piece is not None:
        whole[at + start : at + end] = owner.get_slot(piece, name)
    collectives.gather(whole, mine, stage.settings.group)()
    return layout.clone(part.segments[index].of(whole), part.segments[index].stride)


def reduce_in_backward(optimizer: Any, variables: Iterable[Tensor]) -> ReduceInBackward:
    """Let a sharded optimizer sum gradients while backward computes the next ones, and free them at once (ZeRO-2).

        hooks = fused_kopt.distributed.reduce_in_backward(optimizer, model.parameters())
        for batches in data:
            with hooks.paused():
                for x in batches[:-1]:
                    loss(model, x).backward()
            loss(model, batches[-1]).backward()
            optimizer.apply_gradients([(v.grad, v) for v in model.parameters()])

    After backward `.grad` is None; the pairs' gradients of these variables may be None. Parts go out as they fill up, the last
    variables' first, in one order on all ranks. Call it on every rank, before the backward pass, with variables in one order.

    Raises TypeError unless `optimizer` is sharded, what `apply_gradients` raises for a variable, RankMismatchError, PeerError. A second
    backward pass in a step raises RuntimeError, unless it is `paused()`.
    """
    owner, stage = stage_of(optimizer, Shards)
    distinct = list({id(v): v for v in tape.flatten(variables)}.values())
    stage.adopt(owner, distinct)
    return ReduceInBackward(stage.backward, stage.backward.hook(distinct))
