"""An optimizer's state: iterations, slots in flat buffers, and the live weight list in Keras order."""

import ctypes
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fused_kopt import slots
from fused_kopt.buffers import Bucket
from fused_kopt.slots import Slot, SlotGroups

Key = tuple[torch.device, torch.dtype, Any, int]
Initializer = str | float | Tensor | Callable[..., Any]
_INITIAL = {"zeros": 0.0, "ones": 1.0}


class Policy(Protocol):
    """What State asks of a precision policy."""

    def groups(self, dtype: torch.dtype, groups: SlotGroups) -> SlotGroups: ...


class State:
    """Owns the slots. Variables are kept alive, so that no id is ever reused; slots are found by variable identity."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.policies: dict[int, tuple[Tensor, Policy]] = {}  # by id: variables with one of their own
        self.parts: dict[int, tuple[Tensor, int, int]] = {}  # by id: variables whose launch, and first element's number, a stage chose
        self.iterations: Tensor | None = None
        self.weights: list[Tensor] = []
        self.buckets: dict[Key, Bucket] = {}
        self.extra: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}  # add_slot's own: (variable, slot)

    def bucket(self, variable: Tensor) -> Bucket:
        """The bucket a variable belongs to."""
        key = self.key(variable)
        return self.buckets.get(key) or Bucket(*key[:2], policy=key[2], part=key[3])

    def key(self, variable: Tensor) -> Key:
        """What variables of one bucket share."""
        own, part = self.policies.get(id(variable)), self.parts.get(id(variable))
        return variable.device, variable.dtype, own[1] if own else self.policy, part[1] if part else 0

    def steps_taken(self) -> int:
        """The value of iterations, 0 before it exists."""
        return 0 if self.iterations is None else _in_memory(self.iterations).value

    def count(self) -> None:
        """One step more."""
        _in_memory(self.make_iterations()).value += 1

    def make_iterations(self) -> Tensor:
        """The step counter, 0-d int64, created as the next weight if it does not exist."""
        if self.iterations is None:
            with torch.inference_mode(False):
                self.iterations = torch.zeros((), dtype=torch.int64, device="cpu")
            self.weights.append(self.iterations)
        return self.iterations

    def ensure(self, variables: Sequence[Tensor], groups: SlotGroups, first: Sequence[Tensor] = (), counted: bool = False) -> None:
        """Create the slots that distinct variables lack, in Keras order, after iterations (if `counted`) and `first`.

        Allocates everything before it publishes anything.
        """
        members: dict[Key, list[Tensor]] = {}
        for variable in variables:
            members.setdefault(self.key(variable), []).append(variable)
        grown = [(self.bucket(mine[0]), mine) for mine in members.values()]
        parts = {(b.dtype, b.policy): b.policy.groups(b.dtype, groups) for b, _ in grown}
        numbers = {key: number for key, (_, _, number) in self.parts.items()}
        plans = [(b, b.grown(mine, slots.flatten(parts[(b.dtype, b.policy)]), numbers)) for b, mine in grown]
        self._refuse_own(variable for _, (new, *_) in plans for variable in new)
        before = (self.iterations, len(self.weights), dict(self.buckets), [(bucket, bucket.mark()) for bucket, _ in grown])
        made: list[tuple[Bucket, str, int]] = []
        try:
            if counted:
                self.make_iterations()
            self.weights.extend(first)
            for bucket, plan in plans:
                self.buckets[bucket.key] = bucket
                bucket.adopt(*plan)
            for variable, slot in slots.creation_order(variables, lambda v: parts[self.key(v)[1:3]]):
                bucket = self.bucket(variable)
                index = bucket.index[id(variable)]
                if bucket.views[slot.name][index] is None:
                    made.append((bucket, slot.name, index))
                    view = bucket.view(slot.name, index)
                    _begin(view, slot, variable)
                    self.weights.append(view)
        except BaseException:  # Ctrl-C too: half-made slots would be taken for whole ones
            for bucket, name, index in made:
                bucket.views[name][index] = None
            self.iterations, count, self.buckets, marks = before
            del self.weights[count:]
            for bucket, mark in marks:
                bucket.back_to(mark)
            raise

    def _refuse_own(self, new: Iterable[Tensor]) -> None:
        """Raises ValueError for a variable that is one of the slots: a launch would write it twice."""
        for variable in new:
            own = [*(flat for bucket in self.buckets.values() for flat in bucket.flat.values()), *(view for _, view in self.extra.values())]
            if variable.numel() and any(variable.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in own):
                raise ValueError(f"A variable of shape {tuple(variable.shape)} is a slot of this very optimizer. Pass a clone.")

    def slot(self, variable: Tensor, name: str) -> Tensor | None:
        """The slot, or None."""
        if (id(variable), name) in self.extra:
            return self.extra[(id(variable), name)][1]
        bucket = self.bucket(variable)
        index = bucket.index.get(id(variable))
        return None if index is None or name not in bucket.views else bucket.views[name][index]

    def slot_names(self) -> list[str]:
        """The names of the slots that exist, in order of creation."""
        visible = [name for b in self.buckets.values() for name, views in b.views.items() if any(v is not None for v in views)]
        return list(dict.fromkeys([*visible, *(name for _, name in self.extra)]))

    def built_as(self, variable: Tensor) -> tuple[tuple[int, ...], torch.dtype, torch.device] | None:
        """The shape, dtype and device a variable had when its slots were made; None if it has none."""
        for bucket in self.buckets.values():
            index = bucket.index.get(id(variable))
            if index is not None:
                return bucket.segments[index].shape, bucket.dtype, bucket.device
        return None

    def add_slot(self, variable: Tensor, slot: Slot, shape: Sequence[int] | None, initializer: Initializer) -> Tensor:
        """The slot, created if need be: in the flat buffer where its shape is the variable's, else on its own."""
        found = self.slot(variable, slot.name)
        if found is not None:
            return found
        size = tuple(variable.shape if shape is None else shape)
        value = _initial_value(initializer, size, self.bucket(variable).compute, variable.device)
        if size == tuple(variable.shape) and self.bucket(variable).policy.groups(variable.dtype, ((slot,),)) == ((slot,),):
            self.ensure([variable], ((slot,),))
            view = self.bucket(variable).view(slot.name, self.bucket(variable).index[id(variable)])
        else:
            view = torch.empty(size, dtype=self.bucket(variable).compute, device=variable.device)
            self.extra[(id(variable), slot.name)] = (variable, view)
            self.weights.append(view)
        with torch.no_grad():
            view.copy_(value)
        return view

    def __getstate__(self) -> dict[str, Any]:
        place = {}
        for key, bucket in self.buckets.items():
            for name, views in bucket.views.items():
                place.update({id(view): (key, name, i) for i, view in enumerate(views) if view is not None})
        own = {"extra": list(self.extra.items()), "policies": list(self.policies.values()), "parts": list(self.parts.values())}
        return {**self.__dict__, "weights": [place.get(id(w), w) for w in self.weights], **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.extra = {(id(entry[0]), key[1]): entry for key, entry in state["extra"]}
        self.policies = {id(entry[0]): entry for entry in state["policies"]}
        self.parts = {id(entry[0]): entry for entry in state["parts"]}
        self.weights = [self.buckets[w[0]].view(*w[1:]) if isinstance(w, tuple) else w for w in state["weights"]]
        # torch.load(map_location=...) moves tensors: buckets follow theirs, counters and caches stay on the CPU
        self.buckets = {b.key: b for b in self.buckets.values()}
        for weight in (w for w in state["weights"] if isinstance(w, Tensor) and w.dim() == 0 and not w.is_meta):
            weight.data = weight.data.cpu()


def _begin(view: Tensor, slot: Slot, variable: Tensor) -> None:
    """Give a slot its first values."""
    if slot.copied:
        view.copy_(variable.detach())
    elif slot.initial:  # add_slot may have made the buffer, of zeros
        view.fill_(slot.initial)


def _in_memory(iterations: Tensor) -> ctypes.c_int64:
    """The counter itself: torch's operations on one number cost a step 10 to 20 us, in caches that the launch has emptied."""
    return ctypes.c_int64.from_address(iterations.data_ptr())


def _initial_value(initializer: Initializer, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(initializer, str):
        if initializer not in _INITIAL:
            raise ValueError(f"Unknown initializer: {initializer!r}. Use {sorted(_INITIAL)}, a number, a tensor or a callable.")
        initializer = _INITIAL[initializer]
    value = initializer(shape, dtype=dtype) if callable(initializer) else initializer
    return torch.as_tensor(value, dtype=dtype, device=device).expand(shape)


def to_numpy(weight: Tensor) -> Any:
    """A weight as numpy: an array of its own, or a numpy scalar where it is 0-d. numpy has no bfloat16: float32 instead."""
    weight = weight.float() if weight.dtype == torch.bfloat16 else weight
    return weight.detach().cpu().numpy().copy()[()]


def assign(name: str, weights: Sequence[Tensor], values: Sequence[Any]) -> None:
    """OptimizerV2's set_weights: every check before the first write."""
    if len(weights) != len(values):
        raise ValueError(
            f"You called `set_weights(weights)` on optimizer {name} with a  weight list of length {len(values)}, "
            f"but the optimizer was expecting {len(weights)} weights."
        )
    for weight, value in zip(weights, values, strict=True):
        if tuple(weight.shape) != tuple(value.shape):
            raise ValueError(
                f"Optimizer weight shape {tuple(weight.shape)} not compatible with provided weight shape {tuple(value.shape)}."
            )
        kind = ("c" if value.is_complex() else "f") if isinstance(value, Tensor) else np.asarray(value).dtype.kind
        if kind not in "fiu":
            raise TypeError(f"Optimizer weights must be real numbers. Received: {type(value).__name__} of dtype {value.dtype}.")
    # copies: a value that cannot be read fails before the first write, and live weights may be given in another order
    converted = [_converted(value, weight) for weight, value in zip(weights, values, strict=True)]
    with torch.no_grad():
        for weight, tensor in zip(weights, converted, strict=True):
            weight.copy_(tensor)


def _converted(value: Any, weight: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(weight.device, weight.dtype, copy=True)
    native = np.array(value, dtype=np.asarray(value).dtype.newbyteorder("="), order="C")  # torch reads no other byte order or strides < 0
    return torch.tensor(native, dtype=weight.dtype, device=weight.device)
