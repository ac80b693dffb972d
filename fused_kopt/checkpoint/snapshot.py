"""Between an optimizer and the neutral form."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_kopt import hyperparameters, slots
from fused_kopt.checkpoint import live, scaling, tables
from fused_kopt.checkpoint.meaning import differences
from fused_kopt.checkpoint.neutral import Checkpoint, Variables, named
from fused_kopt.errors import CheckpointError
from fused_kopt.optimizer import Optimizer
from fused_kopt.optimizers import registry

MULTIPLIER = "learning_rate_multiplier"


def capture(optimizer: Optimizer, variables: Variables, with_values: bool = False) -> Checkpoint:
    """The state of an optimizer, copied to the CPU.

    Args:
        optimizer: any fused_kopt optimizer, before or after its first step. Of a LossScaleOptimizer the one inside is captured, and a
            dynamic scale with its counter.
        variables: (name, tensor) pairs, such as `model.named_parameters()`; all that the optimizer has slots for.
        with_values: also copy the variables' values.

    Raises ValueError where the optimizer has slots for a tensor without name, or is sharded or offloaded, TypeError for malformed
    `variables`, TornStepError after an interrupted step.
    """
    known, scale, optimizer = named(variables), scaling.live(optimizer), scaling.inner(optimizer)
    with optimizer._lock:
        live.refuse_torn(optimizer)
        _refuse_stages(optimizer, "save")
        state = optimizer._state
        names = _names(optimizer, known)
        owned = {name: {slot: _copy(view) for slot, view in views.items()} for name, views in live.slot_views(optimizer, names).items()}
        return Checkpoint(
            type(optimizer).__name__,
            optimizer.get_config(),
            state.steps_taken(),
            owned,
            {name: _copy(value) for name, value in (live.extras(optimizer) | scale).items()},
            {name: _copy(value) for name, value in known.items()} if with_values else {},
            {names[i]: {MULTIPLIER: m} for i, (_, m) in optimizer._multipliers.items() if i in names},
            strides={name: found for name, values in owned.items() if live.scaled(values) and (found := live.order(known[name]))},
        )


def _names(optimizer: Optimizer, known: Mapping[str, Tensor]) -> dict[int, str]:
    """Names by the ids of what has slots: of an offloaded variable its twin."""
    kept = [(name, tensor, optimizer._kept_for(tensor)) for name, tensor in known.items()]
    return {id(other if other.shape == tensor.shape else tensor): name for name, tensor, other in kept}


def _refuse_stages(optimizer: Optimizer, instead: str) -> None:
    if any(stage.aggregates for stage in optimizer._stages):
        raise ValueError(f"This optimizer is sharded: no rank has all of its state. Use fused_kopt.distributed.{instead}.")


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def new_optimizer(checkpoint: Checkpoint) -> Optimizer:
    """An optimizer of the checkpoint's class and configuration, without state. CheckpointError where OptimizerV2 has no such thing."""
    config = {"class_name": checkpoint.class_name, "config": checkpoint.config}
    try:
        return registry.deserialize(config)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"fused_kopt.optimizers has no {checkpoint.class_name} as this checkpoint ({checkpoint.source}) describes it: {error}"
        ) from error


def restore(checkpoint: Checkpoint, optimizer: Optimizer, variables: Variables, settings: bool = True, with_values: bool = False) -> None:
    """Write a checkpoint into an optimizer, and create its slots if it has none yet.

    Args:
        checkpoint: from `capture`, `read` or a converter.
        optimizer: of the checkpoint's class, perhaps in a LossScaleOptimizer, which keeps its scale where the checkpoint has none.
        variables: (name, tensor) pairs: exactly the checkpoint's names.
        settings: restore hyperparameters too; what cannot change after construction (`epsilon`, `decay`, `nesterov`...) must then
            agree. A hyperparameter that is a callable of the user's stays. With False the optimizer keeps its own.
        with_values: also write the variables' values.

    Raises CheckpointError, with a table of what differs, where class, settings, names, shapes, dtypes or slots do not fit; what
    `build` raises for a variable; ValueError for a sharded optimizer. Nothing is written then. Warns (UserWarning) where
    the source's update rule differs from ours.
    """
    known, inner = named(variables), scaling.inner(optimizer)
    with inner._lock:
        _refuse_stages(inner, "load")
        check(checkpoint, optimizer, known, settings)
        _check_values(checkpoint, known, with_values)
        for text in differences(checkpoint):
            warnings.warn(text, UserWarning, stacklevel=3)
        started = [known[name] for name, values in checkpoint.slots.items() if values]
        if started or set(checkpoint.extra) - set(scaling.NAMES):
            begin(inner, started)
        fill(checkpoint, optimizer, known, settings)
        with torch.no_grad():
            for name, value in checkpoint.variables.items() if with_values else ():
                known[name].copy_(value)


def check(checkpoint: Checkpoint, optimizer: Optimizer, known: dict[str, Tensor], settings: bool) -> None:
    """Raises what `restore` raises, values of variables aside. Of the tensors only shapes and dtypes are looked at."""
    values, inner = scaling.taken(checkpoint, optimizer), scaling.inner(optimizer)
    with inner._lock:
        _check(scaling.without(checkpoint) if values else checkpoint, inner, known, settings)


def begin(optimizer: Optimizer, variables: Sequence[Tensor]) -> None:
    """`build` before `fill`: an interrupted step, whose traces are about to be overwritten, does not matter."""
    torn, optimizer._torn = optimizer._torn, False
    try:
        optimizer.build(variables)
    finally:
        optimizer._torn = torn


@torch.no_grad()
def fill(checkpoint: Checkpoint, optimizer: Optimizer, known: dict[str, Tensor], settings: bool) -> None:
    """Write what `check` let through into an optimizer that has the slots."""
    inner = scaling.inner(optimizer)
    if settings:
        _adopt(inner, _twin(checkpoint, inner))
        for name, keys in checkpoint.overrides.items():
            inner.scale_learning_rate([known[name]], keys[MULTIPLIER])
    views = live.slot_views(inner, _names(inner, known))
    for name, values in checkpoint.slots.items():
        for slot, value in values.items():
            views[name][slot].copy_(value)
    extra = live.extras(inner) | scaling.live(optimizer)
    for name, value in checkpoint.extra.items():
        extra[name].fill_(value.item())
    inner._state.make_iterations().fill_(checkpoint.iterations)
    inner._torn = False


def _check(checkpoint: Checkpoint, optimizer: Optimizer, known: dict[str, Tensor], settings: bool) -> None:
    """Raises CheckpointError for everything that does not fit."""
    cls = type(optimizer).__name__
    if checkpoint.class_name != cls:
        raise CheckpointError(f"The checkpoint is of {checkpoint.class_name}, the optimizer is {cls}. Pass a {checkpoint.class_name}.")
    if settings:
        _twin(checkpoint, optimizer)
    own = {n: keys for n, keys in checkpoint.overrides.items() if settings and not (n in known and _is_multiplier(keys))}
    if own:
        message = "Settings of single variables do not fit this optimizer, but for a multiplier of the learning rate (settings=False"
        raise CheckpointError(f"{message} ignores them): {own}.")
    lists = [dict.fromkeys(names, "a variable") for names in (checkpoint.slots or known, known)]  # an .h5 of plain SGD names none
    tables.refuse_unless(tables.rows(*lists), "The checkpoint's variables are not those passed as `variables`. Rename or leave out:")
    scaled = [name for name, values in checkpoint.slots.items() if live.scaled(values)]
    orders = (
        {name: checkpoint.strides.get(name) or "row-major" for name in scaled},
        {name: live.order(known[name]) or "row-major" for name in scaled},
    )
    tables.refuse_unless(
        tables.rows(*orders), "Elements share scales in the order in memory that was saved. Use its memory format (strides):"
    )
    found, expected = _schema(checkpoint, optimizer, known)
    message = f"The checkpoint's slots do not fit this {cls}. Construct it with the checkpoint's settings, with variables of its shapes:"
    tables.refuse_unless(tables.rows(found, expected), message)


def _is_multiplier(keys: dict[str, Any]) -> bool:
    value = keys.get(MULTIPLIER)
    return len(keys) == 1 and isinstance(value, float) and 0 <= value < math.inf


def _twin(checkpoint: Checkpoint, optimizer: Optimizer) -> Optimizer:
    rate = optimizer._hyper["learning_rate"]
    customs = {type(rate).__name__: type(rate)} if hyperparameters.is_schedule(rate) else {}
    try:
        twin = type(optimizer).from_config({**checkpoint.config, "name": optimizer._name}, customs)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        message = f"The checkpoint's settings do not fit {type(optimizer).__name__}: {error} Or load with settings=False."
        raise CheckpointError(message) from error
    live = set(optimizer._hyper) - {"decay"}  # decay is fixed at construction, as in Keras
    fixed = [{k: str(v) for k, v in o.get_config().items() if k not in live} for o in (twin, optimizer)]
    tables.refuse_unless(tables.rows(*fixed), "Settings that are fixed at construction differ (settings=False keeps the optimizer's):")
    return twin


def _schema(checkpoint: Checkpoint, optimizer: Optimizer, known: dict[str, Tensor]) -> tuple[dict[str, str], dict[str, str]]:
    """What the checkpoint has, and what the optimizer has or will create, by "slot of variable", as dtypes and shapes."""
    there = live.slot_views(optimizer, _names(optimizer, known))
    found: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for name, values in checkpoint.slots.items():
        wanted = dict(there[name])
        if values or wanted:
            wanted = _planned(optimizer, known[name]) | wanted
        expected |= {f"{slot} of {name}": value for slot, value in wanted.items()}
        found |= {f"{slot} of {name}": value for slot, value in values.items()}
    first = next((known[name] for name, values in checkpoint.slots.items() if values), None)
    extra = live.extras(optimizer) or ({} if first is None else _new_extra(optimizer, first))
    expected |= extra
    found |= checkpoint.extra
    lone = found.keys() ^ expected.keys()  # sharded optimizers keep no slots without elements
    found, expected = ({n: v for n, v in there.items() if n not in lone or v.numel()} for there in (found, expected))
    shown = {n: tables.shown(_taken(v, expected[n].dtype, checkpoint.source) if n in expected else v) for n, v in found.items()}
    return shown, {n: tables.shown(v) for n, v in expected.items()}


def _planned(optimizer: Optimizer, variable: Tensor) -> dict[str, Tensor]:
    """The slots that a variable will get, or the parts that its precision policy stores them in; on the meta device."""
    place = optimizer._state.bucket(variable)
    parts = slots.flatten(place.policy.groups(variable.dtype, optimizer._all_slots()))
    return {part.name: torch.empty(part.shape(variable), dtype=part.stored or place.compute, device="meta") for part in parts}


def _taken(value: Tensor, dtype: torch.dtype, source: str) -> Tensor:
    """The value as a weight of a dtype takes it: without loss, or, converted from torch.optim in float64, rounded once. Else as it is."""
    lossless = value.is_floating_point() and torch.promote_types(dtype, value.dtype) == dtype
    return torch.empty(value.shape, dtype=dtype, device="meta") if lossless or source == "torch.optim" else value


def _new_extra(optimizer: Optimizer, first: Tensor) -> dict[str, Tensor]:
    """The extra weights that a first step on `first` would create."""
    probe = type(optimizer).from_config(optimizer.get_config())
    probe.build([torch.zeros((), dtype=first.dtype)])
    return live.extras(probe)


def _check_values(checkpoint: Checkpoint, known: dict[str, Tensor], with_values: bool) -> None:
    if with_values:
        tables.refuse_unless(tables.rows(checkpoint.variables, known), "The checkpoint's values do not fit the variables (with_values):")


def _adopt(optimizer: Optimizer, twin: Optimizer) -> None:
    """The twin's hyperparameters, except where the optimizer calls a function of the user's."""
    for name, value in twin._hyper.items():
        old = optimizer._hyper[name]
        if hyperparameters.is_schedule(old) or not callable(old):
            setattr(optimizer, name, value)
