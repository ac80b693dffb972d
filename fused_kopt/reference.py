"""The reference executor: rules on torch tensors, variable by variable. It verifies the others."""

from typing import Any

import torch
from torch import Tensor

from fused_kopt import layout, prepare


def run(update: Any) -> None:
    """The rule on torch tensors, variable by variable, one correctly rounded operation at a time."""
    if update.gate is not None and not update.gate:
        return
    bucket, compute = update.bucket, update.bucket.compute
    # a device row: torch divides a CUDA tensor by a Python number or CPU scalar through its reciprocal
    rows = torch.tensor([update.scalars] if update.rows is None else update.rows, dtype=compute, device=bucket.device)
    if update.current is not None:
        rows = update.current.view(rows.shape)
    packed = any(bucket.kind(name)[1] != 1 for name in update.names)
    for index, (variable, gradient) in enumerate(zip(update.variables, update.gradients, strict=True)):
        if variable is None or gradient is None or (packed and not variable.numel()):
            continue
        slots = [bucket.view(name, index) for name in update.names if bucket.kind(name)[1]]
        if packed:  # positions and groups are counted in memory order
            variable, gradient, *slots = (layout.memory_order(t) for t in (variable, gradient, *slots))
        g = raw = gradient.to(compute)
        if update.factors is not None:
            factors = update.factors[index].unbind()
            g, raw = prepare.scale_and_clip(g, factors), prepare.scale(g, factors)
        before = None if update.sums is None else variable.clone()
        scalars = type(update.scalars)(*rows[0 if update.rows is None else index].unbind())
        values = tuple(slot.to(compute if slot.is_floating_point() else torch.int32) for slot in slots)
        if len(slots) < len(update.names):
            first = bucket.segments[index].first
            values = (_positions(first, variable), *values)
        p, values = update.rule(variable.to(compute), g, values, scalars)
        variable.copy_(p)
        for slot, value in zip(slots, values, strict=True):
            slot.copy_(value)
        if update.sums is not None and before is not None:
            update.sums += squares(raw, before, variable)


def squares(gradient: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """float64 [3]: the sums of the squares of a gradient, of a variable's step, and of the variable after it."""
    gradient, before, after = gradient.double(), before.double(), after.double()
    return torch.stack([x.square().sum() for x in (gradient, after - before, after)])


def _positions(first: int, like: Tensor) -> Tensor:
    """The lower 32 bits of a segment's positions, int32."""
    return torch.arange(first, first + like.numel(), device=like.device).to(torch.int32)
