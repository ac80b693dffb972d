"""How precision policies of parameter groups store a parameter's state: which tensors `state[p]` holds, and what they stand for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fused_kopt import layout, precision
from fused_kopt.op import GROUP
from fused_kopt.planes import Kept
from fused_kopt.precision import Precision
from fused_kopt.slots import Slot
from fused_kopt.torch_optim import shards

Group = Mapping[str, Any]
# Slots in which no element is ever negative, by their names in any class.
POSITIVE = {"exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "sum", "accumulator"}


class Owner(Protocol):
    """What is needed of an optimizer."""

    def slots(self, group: Group) -> dict[str, float]: ...


def policy(group: Group) -> Precision:
    """A group's precision policy. Raises ValueError or TypeError for one that is none."""
    return precision.get(group["precision"])


def slots(owner: Owner, group: Group) -> tuple[Slot, ...]:
    """The slots of the rule."""
    return tuple(Slot(name, initial, name in POSITIVE) for name, initial in owner.slots(group).items())


def planes(owner: Owner, group: Group, dtype: torch.dtype) -> dict[str, Slot]:
    """What `state` holds besides counters for a parameter of a dtype, by name: slots or their parts, and the master's."""
    (parts, *master) = policy(group).groups(dtype, (slots(owner, group),))
    compute = layout.compute_dtype(dtype)
    return {plane.name: plane._replace(stored=plane.stored or compute) for part in (parts, *master) for plane in part}


def check(owner: Owner, group: Group, param: Tensor, what: str) -> None:
    """Raises ValueError for a policy that has no meaning for a parameter, or cannot be sharded as the parameter is."""
    if group["precision"] == "float32":  # comparing 5,000 policies takes 3 ms
        return
    chosen = policy(group)
    chosen.check(param.dtype, slots(owner, group), what)
    if not isinstance(param, shards.sharded()) or shards.divides(param, GROUP):
        return
    if any(plane.group > 1 for plane in planes(owner, group, param.dtype).values()):
        raise ValueError(
            f"{what} is placed as {param.placements} on {tuple(param.device_mesh.shape)} ranks, and {chosen} keeps a scale for every "
            f"{GROUP} elements: it needs shards of equal rows that are multiples of {GROUP} elements. "
            "Use slots of float32 or bfloat16: 'bf16_split', 'bf16_kahan' or 'bf16_stochastic'."
        )


def check_same(owner: Any, before: Sequence[tuple[Any, Precision]], now: Sequence[tuple[Any, Precision]]) -> None:
    """Raises ValueError for a group whose policy is another than a step before, where it has state: that would be read as what it is not.

    before, now: by group, rule and policy.
    """
    for index, ((_, old), (_, chosen)) in enumerate(zip(before, now, strict=False)):
        if old != chosen and any(param in owner.state for param in owner.param_groups[index]["params"]):
            raise ValueError(
                f"Group {index} has state under precision={precision.title(old)!r}; received: precision={precision.title(chosen)!r}. "
                "A policy is fixed by the first step; build a new optimizer for another one."
            )


def new(plane: Slot, param: Tensor) -> Tensor:
    """A part of a parameter's state as it begins: beside the parameter, of its shape, layout and placement where it has the shape."""
    if plane.group == 1:
        return torch.full_like(param, plane.initial, dtype=plane.stored, requires_grad=False)
    (local,) = shards.local([param])
    numbers = torch.full(plane.shape(local), plane.initial, dtype=plane.stored, device=param.device)
    return shards.vector(param, numbers, *plane.shape(param)) if local is not param else numbers


def kept(owner: Owner, group: Group) -> Callable[[Tensor], Kept]:
    """What `describe` says of a group's parameters."""
    chosen, mine = policy(group), slots(owner, group)
    names, title = tuple(slot.name for slot in mine), precision.title(chosen)
    return lambda param: Kept(title, names, chosen.planes(param.dtype, (mine,)), chosen)


def master(owner: Owner, group: Group, param: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """What a parameter stands for, float32 (float64 for float64), in its shape."""
    names = list(planes(owner, group, param.dtype))
    (local, *parts) = shards.local([param.detach(), *(state[name] for name in names)])
    laid = [layout.clone(t, layout.dense_stride(local)) if t.shape == local.shape else t for t in parts]
    return policy(group).read((slots(owner, group),), local, dict(zip(names, laid, strict=True)))[0]
