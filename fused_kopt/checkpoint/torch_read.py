"""From state dicts of torch.optim to the neutral form."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_kopt.checkpoint import tables
from fused_kopt.checkpoint.neutral import Checkpoint, Order, ordered
from fused_kopt.checkpoint.torch_words import IDLE, OPTIONS, SLOTS, class_of, factor
from fused_kopt.errors import CheckpointError


def from_state_dict(state: Mapping[str, Any], variables: Order | None = None, iterations: int | None = None) -> Checkpoint:
    """A checkpoint from a torch.optim state_dict.

    Args:
        state: `optimizer.state_dict()`. The class is recognised by its parameter groups' keys.
        variables: names, or (name, tensor) pairs, in the order in which the optimizer was given them; not needed where it was given
            named parameters, whose names win.
        iterations: the number of steps, where the state has none (SGD); default 0, which only schedules and `decay` notice.

    A later parameter group's own settings go to `overrides`. SGD's momentum is `-lr * momentum_buffer`, RMSprop's `lr *
    momentum_buffer`, in float64: back in torch.optim's dtype it is the same value. Raises CheckpointError for L2 penalties
    (`weight_decay` of all but AdamW), `maximize`, `dampening`, steps or Nadam products that differ between variables.
    """
    entries, groups = _parts(state)
    names, shapes = _names(groups, variables)
    classes = {class_of(group) for group in groups}
    if len(classes) != 1:
        raise CheckpointError(f"The parameter groups belong to different classes: {sorted(classes)}.")
    (cls,) = classes
    settings = {index: _settings(cls, group) for group in groups for index in group["params"]}
    config = dict(settings[groups[0]["params"][0]])
    overrides = {names[i]: {k: v for k, v in own.items() if config[k] != v} for i, own in settings.items() if own != config}
    slots = {name: _neutral(cls, entries.get(index, {}), settings[index]) for index, name in names.items()}
    _check_shapes(slots, shapes)
    steps = _common("step", names, entries)
    product = _common("mu_product", names, entries)
    taken = int(steps.item()) if steps is not None else iterations or 0
    extra = {} if product is None else {"cache": product.detach().cpu().clone()}
    return Checkpoint(cls, config, taken, slots, extra, overrides=overrides, source="torch.optim")


def _parts(state: Mapping[str, Any]) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    """The two halves of a state dict, checked."""
    entries: Any = state.get("state")
    groups: Any = state.get("param_groups")
    fits = isinstance(entries, Mapping) and all(isinstance(entry, Mapping) for entry in entries.values())
    fits = fits and isinstance(groups, Sequence) and all(isinstance(group, Mapping) and group.get("params") for group in groups)
    if not (fits and groups):
        raise CheckpointError(f"Not a state_dict of torch.optim, with `state` and `param_groups`. Received the keys {list(state)[:9]}.")
    indices = [index for group in groups for index in group["params"]]
    unknown = [index for index in entries if index not in indices]
    if unknown or len(set(indices)) < len(indices):
        raise CheckpointError(f"The state_dict's groups and states do not fit: parameters {indices}, states of {list(entries)}.")
    return dict(entries), [dict(group) for group in groups]


def _names(groups: Sequence[Mapping[str, Any]], variables: Order | None) -> tuple[dict[Any, str], dict[str, Any]]:
    """Parameter index -> name, and name -> shape where the caller gave one."""
    indices = [index for group in groups for index in group["params"]]
    given = {} if variables is None else ordered(variables)
    if all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
        if given:
            lists = [dict.fromkeys(there, "a variable") for there in (names, given)]
            tables.refuse_unless(tables.rows(*lists), "The state_dict's own names are not those of `variables`:")
    elif not given:
        raise CheckpointError("The state_dict has positions only. Pass `variables`: names in the order the optimizer was given them.")
    else:
        names = list(given)
    if len(names) != len(indices) or len(set(names)) < len(names):
        raise CheckpointError(f"{len(indices)} parameters, but {len(set(names))} different names: {names}.")
    return dict(zip(indices, names, strict=True)), given


def _settings(cls: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's hyperparameters in Keras's words."""
    own = OPTIONS[cls]
    refused = {key: group[key] for key, idle in IDLE.items() if key not in own and group.get(key, idle) != idle}
    if refused:
        raise CheckpointError(f"Keras's {cls} has nothing like torch.optim's {refused}. Only {IDLE} can be converted.")
    if group.get("eps") == 0:
        raise CheckpointError("Keras's epsilon cannot be 0, which means its default 1e-7 there. Received: eps=0. Set a tiny one.")
    found = {"learning_rate": _number(group["lr"])}
    if "betas" in group:
        found |= {"beta_1": _number(group["betas"][0]), "beta_2": _number(group["betas"][1])}
    return found | {ours: _number(group[theirs]) for theirs, ours in own.items() if theirs in group}


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _neutral(cls: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    made = {}
    unknown = set(entry) - set(SLOTS[cls]) - {"step", "mu_product"}
    if unknown:
        raise CheckpointError(f"The state of torch.optim's {cls} has entries of no known meaning: {sorted(unknown)}.")
    for theirs, ours in SLOTS[cls].items():
        if entry.get(theirs) is not None:
            times = factor(cls, ours, settings["learning_rate"])
            value = entry[theirs].detach().to("cpu", copy=True)
            made[ours] = value if times is None else value.double() * times
    return made


def _check_shapes(slots: Mapping[str, Mapping[str, Tensor]], shapes: Mapping[str, tuple[int, ...] | None]) -> None:
    found = {f"{slot} of {name}": str(tuple(v.shape)) for name, values in slots.items() for slot, v in values.items()}
    wanted = {f"{slot} of {name}": str(shapes[name]) for name, values in slots.items() for slot in values if shapes.get(name) is not None}
    tables.refuse_unless(tables.rows(found, found | wanted), "The state_dict's shapes are not those of `variables`:")


def _common(key: str, names: Mapping[Any, str], entries: Mapping[Any, Mapping[str, Any]]) -> Tensor | None:
    """A number that must be the same for all variables: Keras has one counter and one product."""
    found = {names[index]: torch.as_tensor(entry[key]) for index, entry in entries.items() if key in entry}
    if key == "step" and any(value > 0 for value in found.values()):  # Adagrad has its sums, and step 0, before any gradient
        found = {name: value for name, value in found.items() if value > 0}
    if len({value.item() for value in found.values()}) > 1:
        shown = {name: value.item() for name, value in found.items()}
        raise CheckpointError(f"Keras counts steps once for all variables; here `{key}` differs between them: {shown}.")
    return next(iter(found.values()), None)
