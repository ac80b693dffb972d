"""Which tensors the step of some trainable variables touches; looked up once and kept."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import torch
from torch import Tensor

from fused_kopt import tensors

PLAIN = {Tensor, torch.nn.Parameter}


def values(variables: Iterable[Any]) -> list[Tensor]:
    """The tensors of Keras variables: those that train, not what an autocast scope would show."""
    return [variable._value for variable in variables]


def tensors_of(grads: Sequence[Any]) -> list[Tensor]:
    """Gradients as tensors: Keras takes arrays and Keras variables too."""
    if PLAIN.issuperset(map(type, grads)):
        return list(grads)
    return [keras.ops.convert_to_tensor(g) for g in grads]


class Averages(NamedTuple):
    """Variables that are averaged without being updated, and their averages."""

    variables: list[Any]
    averages: list[Any]


class Plan(NamedTuple):
    """Keras variables, in the order of the call."""

    variables: list[Any]
    slots: list[list[Any]]
    """In the rule's order, the average last if there is one."""
    accumulators: list[Any]
    which: Any
    """int array, 0 for a variable that decays, else 1; None where all decay or none does."""
    decays: bool
    """Whether any variable does."""
    names: list[str]
    absent: Averages
    """Variables the optimizer was built with that are not in the call."""
    exclusions: Any
    """Keras's cache of them, replaced when they change."""

    supported: bool
    """Whether all are plain local tensors of dtypes that launches have."""


def label(variable: Any) -> str:
    """How messages call a variable."""
    return f"{variable.path} {tuple(variable.shape)}"


def make(optimizer: Any, variables: Sequence[Any], slots: Sequence[str]) -> Plan:
    """Raises ValueError for a variable that the optimizer does not know, or slots that it was built without."""
    known = optimizer._trainable_variables_indices
    for variable in variables:
        if optimizer._var_key(variable) not in known:
            raise ValueError(
                f"Unknown variable: {label(variable)}. The optimizer {optimizer.name!r} was built with {len(known)} others and takes these "
                "only. Compile the model again after layers were added or unfrozen, or make a new optimizer."
            )
    index = [known[optimizer._var_key(variable)] for variable in variables]
    columns = [[column[i] for i in index] for column in (_column(optimizer, name) for name in slots)]
    if optimizer.use_ema:
        columns.append([optimizer._model_variables_moving_average[i] for i in index])
    decayed = [bool(optimizer.weight_decay) and optimizer._use_weight_decay(variable) for variable in variables]
    accumulators = [optimizer._accumulated_gradients[i] for i in index] if optimizer.gradient_accumulation_steps else []
    return Plan(
        variables=list(variables),
        slots=columns,
        accumulators=accumulators,
        which=None if len(set(decayed)) == 1 else np.array(decayed) ^ 1,
        decays=any(decayed),
        names=[label(variable) for variable in variables],
        absent=averaged(optimizer, set(index)),
        exclusions=getattr(optimizer, "_exclude_from_weight_decay_cache", None),
        supported=all(map(_supported, values([*variables, *accumulators, *itertools.chain(*columns)]))),
    )


def _supported(tensor: Tensor) -> bool:
    return type(tensor) in PLAIN and not tensor.is_meta and tensor.dtype in tensors.FLOATING


def averaged(optimizer: Any, without: set[int]) -> Averages:
    """The averaged variables but for those at some indices."""
    if not optimizer.use_ema:
        return Averages([], [])
    both = list(zip(optimizer._trainable_variables, optimizer._model_variables_moving_average, strict=True))
    kept = [pair for i, pair in enumerate(both) if pair[1] is not None and i not in without]
    return Averages([v for v, _ in kept], [a for _, a in kept])


def _column(optimizer: Any, name: str) -> Sequence[Any]:
    found: Sequence[Any] = getattr(optimizer, name, ())
    if len(found) != len(optimizer._trainable_variables):
        raise ValueError(
            f"The optimizer {optimizer.name!r} was built without `{name}`, which its present options need. Options that decide on slots "
            "(momentum, centered, amsgrad) must be set before the first step."
        )
    return found
