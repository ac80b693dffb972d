"""From the neutral form to state dicts of torch.optim."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fused_kopt.checkpoint import tables
from fused_kopt.checkpoint.neutral import Checkpoint, Order, named, ordered
from fused_kopt.checkpoint.snapshot import MULTIPLIER
from fused_kopt.checkpoint.torch_words import OPTIONS, SLOTS, factor
from fused_kopt.errors import CheckpointError
from fused_kopt.optimizers import schedules

_CLASSES = {name: name for name in SLOTS} | {"Nadam": "NAdam"}


def to_state_dict(checkpoint: Checkpoint, variables: Order | None = None) -> dict[str, Any]:
    """A state_dict, with parameter names, for `load_state_dict` of the torch.optim class of the same name.

    Args:
        checkpoint: of a class that torch.optim has.
        variables: names, or (name, tensor) pairs, in the order of the torch optimizer's parameters. Default: the checkpoint's order.
            Tensors tell the dtype of SGD's and RMSprop's momentum, which is float64 otherwise until load_state_dict rounds it.

    Variables of equal settings form one parameter group. Of a schedule the learning rate of the next step is taken (UserWarning).
    Raises CheckpointError where the checkpoint has other variables, or settings that torch.optim has no word for.
    """
    cls = checkpoint.class_name
    if cls not in SLOTS:
        raise CheckpointError(f"torch.optim has no {cls}. It has {', '.join(_CLASSES.values())}.")
    names = list(checkpoint.slots if variables is None else ordered(variables))
    lists = [dict.fromkeys(there, "a variable") for there in (checkpoint.slots, names)]
    tables.refuse_unless(tables.rows(*lists), "The checkpoint has other variables:")
    dtypes = _dtypes(variables)
    state: dict[int, dict[str, Tensor]] = {}
    groups: list[dict[str, Any]] = []
    for members, settings in _groups(checkpoint, names):
        first = sum(len(group["params"]) for group in groups)
        groups.append(_group(cls, settings, members) | {"params": list(range(first, first + len(members)))})
        for index, name in enumerate(members, start=first):
            entry = _entry(checkpoint, name, groups[-1]["lr"], dtypes.get(name))
            if entry:
                state[index] = entry
    return {"state": state, "param_groups": groups}


def _dtypes(variables: Order | None) -> dict[str, torch.dtype]:
    given: Any = list(variables.items() if isinstance(variables, Mapping) else variables or ())
    return {} if not given or isinstance(given[0], str) else {name: tensor.dtype for name, tensor in named(given).items()}


def _groups(checkpoint: Checkpoint, names: list[str]) -> list[tuple[list[str], dict[str, Any]]]:
    """(names, settings) of every parameter group."""
    found: list[tuple[list[str], dict[str, Any]]] = []
    rate = _rate(checkpoint)
    for name in names:
        own = dict(checkpoint.overrides.get(name, {}))
        base = own.get("learning_rate", rate)
        settings = {**checkpoint.config, **own, "learning_rate": base * own.pop(MULTIPLIER, 1.0)}
        settings.pop(MULTIPLIER, None)
        group = next((members for members, other in found if other == settings), None)
        if group is None:
            found.append(([name], settings))
        else:
            group.append(name)
    return found


def _rate(checkpoint: Checkpoint) -> float:
    """The learning rate of the next step."""
    rate = checkpoint.config["learning_rate"]
    if not isinstance(rate, Mapping):
        return float(rate)
    now = float(schedules.deserialize(rate)(torch.tensor(checkpoint.iterations, dtype=torch.float32)))
    text = f"torch.optim keeps schedules apart: the next step's learning rate {now} is taken of {rate['class_name']}. Add a scheduler."
    warnings.warn(text, UserWarning, stacklevel=4)
    return now


def _group(cls: str, settings: Mapping[str, Any], members: list[str]) -> dict[str, Any]:
    """A parameter group as torch.optim makes it."""
    options = {theirs: settings[ours] for theirs, ours in OPTIONS[cls].items() if ours in settings}
    if "beta_1" in settings:
        options["betas"] = (settings["beta_1"], settings["beta_2"])
    known = {*OPTIONS[cls].values(), "name", "learning_rate", "beta_1", "beta_2"}
    refused = {key: value for key, value in settings.items() if key not in known and value not in (None, False, 0)}
    if refused:
        raise CheckpointError(f"torch.optim's {_CLASSES[cls]} has no word for the checkpoint's settings {refused}. Take them out first.")
    parameters = [(name, torch.empty(0, device="meta")) for name in members]
    made = getattr(torch.optim, _CLASSES[cls])(parameters, lr=settings["learning_rate"], **options)
    (group,) = made.state_dict()["param_groups"]
    return dict(group)


def _entry(checkpoint: Checkpoint, name: str, rate: float, dtype: torch.dtype | None) -> dict[str, Tensor]:
    cls, values = checkpoint.class_name, checkpoint.slots[name]
    names = {ours: theirs for theirs, ours in SLOTS[cls].items()}
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise CheckpointError(f"torch.optim's {_CLASSES[cls]} has nothing like the slots {unknown} of {name}.")
    entry = {}
    for slot, value in values.items():
        times = factor(cls, slot, rate)
        if times == 0:
            raise CheckpointError(f"The momentum of {name} cannot be divided by a learning rate of 0. Set another one first.")
        # to float64 first: what came from torch.optim is the same value again once rounded
        entry[names[slot]] = value.clone() if times is None else (value.double() / times).to(dtype or torch.float64)
    if values and cls != "SGD":
        entry["step"] = torch.tensor(float(checkpoint.iterations))
    if values and cls == "Nadam":
        entry["mu_product"] = checkpoint.extra["cache"].clone()
    return entry
