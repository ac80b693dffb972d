"""From state dicts, our own and torch.optim's, to states: every value checked before anything changes, no dtype damaged."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from fused_kopt import layout, precision
from fused_kopt.borrowed import ORDER
from fused_kopt.slots import Slot
from fused_kopt.torch_optim import arguments, stored
from fused_kopt.torch_optim.shards import sharded

Kinds = Mapping[str, tuple[torch.dtype, float]]


class Kept:
    """A parameter's state on its way through torch's load_state_dict, which would cast its tensors to the parameter's dtype."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state


class Loader(Protocol):
    """What loading needs of an optimizer."""

    param_groups: list[dict[str, Any]]
    state: Any
    counters: Kinds
    momentum_sign: int

    def slots(self, group: Mapping[str, Any]) -> dict[str, float]: ...


def kept(owner: Any, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict with ready states. Raises ValueError or TypeError for one that does not fit."""
    cls, saved = type(owner).__name__, state_dict["param_groups"]
    sizes = [[len(group["params"]) for group in groups] for groups in (saved, owner.param_groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"The state_dict has groups of {sizes[0]} parameters, this {cls} of {sizes[1]}. They must be alike.")
    places = {}
    for index, (group, own) in enumerate(zip(saved, owner.param_groups, strict=True)):
        arguments.refuse(cls, group)
        if precision.get(group.get("precision", "float32")) != stored.policy(own):
            saved_as = group.get("precision", "float32")
            raise ValueError(
                f"Group {index} of the state_dict has precision={saved_as!r}, this {cls}'s has {own['precision']!r}: stored values would "
                "mean something else. Build the optimizer with the precision that was saved."
            )
        for position, (key, param) in enumerate(zip(group["params"], own["params"], strict=True)):
            places[key] = (param, {**own, **group}, arguments.name(own, index, position))
    unknown = [key for key in state_dict["state"] if key not in places]
    if unknown:
        raise ValueError(f"The state_dict has states of parameters that are in none of its groups: {unknown[:5]}.")
    states = {key: Kept(_state(owner, entry, *places[key])) for key, entry in state_dict["state"].items()}
    groups = [{**group, "precision": own["precision"]} for group, own in zip(saved, owner.param_groups, strict=True)]
    return {**state_dict, "state": states, "param_groups": groups}


def _state(owner: Loader, entry: Mapping[str, Any], param: Tensor, group: Mapping[str, Any], what: str) -> dict[str, Any]:
    cls, slots = type(owner).__name__, stored.planes(owner, group, param.dtype)
    found = {name: value for name, value in entry.items() if value is not None}
    if "momentum_buffer" in found and owner.momentum_sign:  # torch.optim's has no learning rate in it, Keras's has
        times = owner.momentum_sign * float(group["lr"])
        found["momentum"] = (found.pop("momentum_buffer").double() * times).to(layout.compute_dtype(param.dtype))
    strange = sorted(map(str, set(found) - set(slots) - set(owner.counters)))
    missing = sorted(set(slots) - set(found) - {name for name, value in entry.items() if value is None})
    if "momentum" in missing and "momentum_buffer" in entry:
        missing.remove("momentum")
    if found and (strange or missing):
        raise ValueError(f"The state of {what} has {sorted(found)}; {cls} keeps {[*slots, *owner.counters]}. Is it another optimizer's?")
    if found:
        stored.check(owner, group, param, what)
    state = {name: _slot(value, param, slots[name], what, owner) for name, value in found.items() if name in slots}
    for name, (dtype, initial) in owner.counters.items():
        state[name] = torch.tensor(float(found.get(name, initial)), dtype=dtype, device="cpu")
    return state


def _slot(value: Any, param: Tensor, plane: Slot, what: str, owner: Loader) -> Tensor:
    """A slot, or a part of one, beside its parameter in its own dtype: the optimizer's own as it is, any other as a copy."""
    name, packed = plane.name, plane.group > 1 or plane.stored != layout.compute_dtype(param.dtype)
    alike = isinstance(value, Tensor) and value.shape == plane.shape(param)
    if not alike or (value.dtype != plane.stored if packed else not value.dtype.is_floating_point):
        got = f"shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        wanted = f"of {plane.stored} and shape {plane.shape(param)}" if packed else "a floating tensor of its parameter's shape"
        raise ValueError(f"{name!r} of {what} must be {wanted}. Received: {got}.")
    if isinstance(param, sharded()) != isinstance(value, sharded()):
        raise TypeError(
            f"{name!r} of {what} is {'no' if isinstance(param, sharded()) else 'a'} DTensor, unlike the parameter. "
            "Load it with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict."
        )
    if value.dtype == torch.uint8 and not layout.same_layout(value.shape, layout.dense_stride(param), value.stride()):
        raise ValueError(
            f"{name!r} of {what} {ORDER}: strides {value.stride()} beside {param.stride()}. Use the memory format that was saved."
        )
    if owner.state.get(param, {}).get(name) is value:
        own: Tensor = value
        return own
    slot: Tensor = stored.new(plane, param)
    with torch.no_grad():
        slot.copy_(value)
    return slot
