"""What an optimizer has that a checkpoint is about: its slots by name, and what lies beside them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fused_kopt import layout
from fused_kopt.errors import TornStepError
from fused_kopt.optimizer import Optimizer


def refuse_torn(optimizer: Optimizer) -> None:
    """Raises TornStepError after an interrupted step."""
    if optimizer._torn:
        raise TornStepError("The last step was interrupted: some variables were updated, others not. Restore an older checkpoint.")


def slot_views(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, dict[str, Tensor]]:
    """Variable name -> slot name -> the live slot; variables in the order in which they got slots, then those without any.

    names: the variables', by their ids.
    """
    state = optimizer._state
    place = {id(weight): position for position, weight in enumerate(state.weights)}
    found: list[tuple[int, int, str, Tensor]] = []
    tensors: dict[int, Tensor] = {}
    for bucket in state.buckets.values():
        tensors |= {id(variable): variable for variable in bucket.variables}
        for slot, views in bucket.views.items():
            entries = zip(bucket.variables, views, strict=True)
            found += [(place[id(view)], id(variable), slot, view) for variable, view in entries if view is not None]
    for (key, slot), (variable, view) in state.extra.items():
        tensors[key] = variable
        found.append((place[id(view)], key, slot, view))
    if optimizer._stages:  # a sharded optimizer steps on an empty tensor where this rank has nothing
        found = [entry for entry in found if entry[1] in names or tensors[entry[1]].numel()]
    unnamed = [tuple(tensors[key].shape) for key in dict.fromkeys(key for _, key, *_ in sorted(found)) if key not in names]
    if unnamed:
        raise ValueError(f"The optimizer has slots for variables that `variables` does not name, of shapes {unnamed}. Name them all.")
    made: dict[str, dict[str, Tensor]] = {}
    for _, key, slot, view in sorted(found, key=lambda entry: entry[0]):
        made.setdefault(names[key], {})[slot] = view
    return made | {name: {} for name in names.values() if name not in made}


def extras(optimizer: Optimizer) -> dict[str, Tensor]:
    """The weights that are neither iterations nor slots, by the attribute that holds them: Nadam's cache."""
    listed = {id(weight) for weight in optimizer.weights} - {id(optimizer._state.iterations)}
    return {name.lstrip("_"): value for name, value in vars(optimizer).items() if isinstance(value, Tensor) and id(value) in listed}


def order(variable: Tensor) -> list[int]:
    """The strides of its dimensions above 1 in memory, [] for row-major."""
    shape, stride = variable.shape, layout.dense_stride(variable)
    plain = layout.same_layout(shape, stride, layout.contiguous_stride(shape))
    return [] if plain else [step for size, step in zip(shape, stride, strict=True) if size > 1]


def scaled(slots: Mapping[str, Tensor]) -> bool:
    """Whether elements share scales, in the order in which they lie in memory."""
    return any(value.dtype == torch.uint8 for value in slots.values())
