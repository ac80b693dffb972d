"""Positional formats: `get_weights()` of OptimizerV2, and the variables of Keras 3's optimizers. Names come from the caller."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fused_kopt.checkpoint import meaning, scaling, snapshot, tables
from fused_kopt.checkpoint.neutral import Checkpoint, Order, ordered
from fused_kopt.errors import CheckpointError
from fused_kopt.optimizer import Optimizer
from fused_kopt.optimizers import registry
from fused_kopt.slots import SlotGroups

Identifier = str | Mapping[str, Any] | Optimizer
ITERATIONS, RATE = "iterations", "learning_rate"


class Place(NamedTuple):
    """One entry of a positional list: a slot of a variable, or a weight of the optimizer ("" as variable)."""

    variable: str
    name: str

    def __str__(self) -> str:
        return f"{self.name} of {self.variable}" if self.variable else self.name


def tensor(value: Any) -> Tensor:
    """An array of a file or a list as a tensor of its own. Raises CheckpointError for what is not real numbers."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise CheckpointError(f"Weights must be real numbers. Received: {type(value).__name__} of dtype {array.dtype}.")
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def _filled(values: Sequence[Any], places: Sequence[Place], shapes: Mapping[str, tuple[int, ...] | None], what: str) -> dict[Place, Tensor]:
    """The list's values by place. Raises CheckpointError with a table where count or shapes differ."""
    given = [tensor(value) for value in values]
    count = max(len(given), len(places))
    labels = [str(places[i]) if i < len(places) else f"(position {i})" for i in range(count)]
    found = {label: str(tuple(given[i].shape)) if i < len(given) else None for i, label in enumerate(labels)}
    expected = {}
    for i, label in enumerate(labels):
        shape = None if i >= len(places) else (shapes[places[i].variable] if places[i].variable else ())
        expected[label] = str(shape) if shape is not None else (found[label] or "a weight") if i < len(places) else None
    message = f"{what} has {len(given)} weights; for these variables, in this order, {len(places)} are expected:"
    tables.refuse_unless(tables.rows(found, expected), message)
    return dict(zip(places, given, strict=True))


def _checkpoint(found: dict[Place, Tensor], names: Sequence[str], identity: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """The arguments of a Checkpoint that both kinds of list share."""
    return {
        "class_name": identity[0],
        "config": identity[1],
        "iterations": count(found[Place("", ITERATIONS)]),
        "slots": {name: {place.name: value for place, value in found.items() if place.variable == name} for name in names},
        "extra": {place.name: v for place, v in found.items() if not place.variable and place.name not in (ITERATIONS, RATE)},
    }


def count(value: Tensor) -> int:
    """The iterations as a file has them. Raises CheckpointError for anything but a whole number >= 0."""
    number = value.item() if value.numel() == 1 else -1
    if number < 0 or number != int(number):
        raise CheckpointError(f"The iterations must be one whole number >= 0. Received: {value.tolist()}.")
    return int(number)


def from_weights(weights: Sequence[Any], optimizer: Identifier, variables: Order) -> Checkpoint:
    """A checkpoint from `get_weights()` of an OptimizerV2 (tf.keras.optimizers.legacy), or of one of ours.

    Args:
        weights: numpy arrays or tensors: iterations, [Nadam's cache,] slots.
        optimizer: what the list belongs to: a name, `{"class_name", "config"}`, or an optimizer of the same configuration.
        variables: their names, or (name, tensor) pairs, in the order in which Keras created the slots: that of
            `model.trainable_variables`. The list has no names, so only count and shapes can be checked.

    Raises CheckpointError with a table where they do not fit.
    """
    shapes, declared = ordered(variables), scaling.inner(registry.get(optimizer))
    cls = type(declared).__name__
    found = _filled(weights, _places(declared, list(shapes)), shapes, f"This list of {cls}'s weights")
    return keras2_checkpoint(found, list(shapes), declared)


def keras2_checkpoint(found: dict[Place, Tensor], names: Sequence[str], declared: Optimizer) -> Checkpoint:
    """The checkpoint of an OptimizerV2's values, by place."""
    return Checkpoint(**_checkpoint(found, names, (type(declared).__name__, declared.get_config())))


def to_weights(checkpoint: Checkpoint, variables: Order | None = None) -> list[Any]:
    """What `get_weights()` of the OptimizerV2 would return: for `set_weights`, here or in TensorFlow.

    variables: their order in Keras; default the checkpoint's. Raises CheckpointError where the checkpoint has others.
    """
    declared = snapshot.new_optimizer(checkpoint)
    names = agreeing(checkpoint, variables)
    return values_of(checkpoint, _places(declared, names))


def agreeing(checkpoint: Checkpoint, variables: Order | None) -> list[str]:
    """The names in the caller's order, or the checkpoint's. Raises CheckpointError unless they are the same names with slots."""
    own = {name: "a variable" for name, values in checkpoint.slots.items() if values}
    names = list(own) if variables is None else list(ordered(variables))
    if not own:  # plain SGD
        return names
    tables.refuse_unless(tables.rows(own, dict.fromkeys(names, "a variable")), "The checkpoint has slots for other variables:")
    return names


def _places(optimizer: Optimizer, names: Sequence[str]) -> list[Place]:
    extra = [Place("", "cache")] if type(optimizer).__name__ == "Nadam" else []
    return [Place("", ITERATIONS), *extra, *_slot_places(optimizer._all_slots(), names)]


def _slot_places(groups: SlotGroups, names: Sequence[str]) -> list[Place]:
    return [Place(name, slot.name) for group in groups for name in names for slot in group]


def values_of(checkpoint: Checkpoint, places: Sequence[Place]) -> list[Any]:
    """The checkpoint's values as numpy, in the order of places. Raises CheckpointError where it has others."""
    have: dict[Place, Tensor] = {Place("", name): value for name, value in scaling.without(checkpoint).extra.items()}
    have |= {Place(name, slot): value for name, values in checkpoint.slots.items() for slot, value in values.items()}
    found = {place: value.float() if checkpoint.source == "torch.optim" else value for place, value in have.items()}
    given = {Place("", ITERATIONS): np.int64(checkpoint.iterations), Place("", RATE): np.float32(_rate(checkpoint))}
    found_names = {str(place): "a weight" for place in (*have, *(place for place in given if place in places))}
    expected = {str(place): "a weight" for place in places}
    tables.refuse_unless(tables.rows(found_names, expected), f"The checkpoint's weights are not those of this {checkpoint.class_name}:")
    return [given[place] if place in given else found[place].numpy() for place in places]


def _rate(checkpoint: Checkpoint) -> float:
    rate = checkpoint.config.get(RATE)
    return rate if isinstance(rate, float) else 0.0  # of a schedule: not a weight


def from_keras3(values: Sequence[Any], class_name: str, config: Mapping[str, Any], variables: Order) -> Checkpoint:
    """A checkpoint from the values of a Keras 3 optimizer's `variables`, in their order.

    Args:
        values: numpy arrays or tensors.
        class_name, config: of the Keras optimizer: `type(optimizer).__name__`, `optimizer.get_config()`.
        variables: names, or (name, tensor) pairs, in the order of `model.trainable_variables`.

    Raises CheckpointError with a table where they do not fit, and for optimizers that OptimizerV2 has no counterpart of.
    """
    shapes = ordered(variables)
    found = _filled(values, _keras3_places(class_name, config, list(shapes)), shapes, f"This list of {class_name}'s variables")
    return keras3_checkpoint(found, list(shapes), class_name, config)


def keras3_checkpoint(found: dict[Place, Tensor], names: Sequence[str], class_name: str, config: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint of a Keras 3 optimizer's values, by place."""
    kept = meaning.from_keras3(class_name, config)
    if Place("", RATE) in found and not isinstance(config.get(RATE), Mapping):
        kept[RATE] = found[Place("", RATE)].item()
    if class_name == "SGD" and not config.get("momentum"):  # TensorFlow's classes have the slot all the same, of zeros
        found = {place: value for place, value in found.items() if place.name != "momentum"}
    if class_name == "Nadam" and Place("", "cache") not in found:
        found = found | {Place("", "cache"): meaning.momentum_product(count(found[Place("", ITERATIONS)]), config["beta_1"])}
    return Checkpoint(**_checkpoint(found, names, (class_name, kept)), source="Keras 3")


def to_keras3(checkpoint: Checkpoint, config: Mapping[str, Any], variables: Order | None = None) -> list[Any]:
    """The values for the `variables` of a built Keras 3 optimizer of the checkpoint's class and of this config, in their order.

    variables: their order in Keras; default the checkpoint's. Raises CheckpointError where the checkpoint has other weights.
    """
    return to_keras3_places(checkpoint, config, _keras3_places(checkpoint.class_name, config, agreeing(checkpoint, variables)))


def to_keras3_places(checkpoint: Checkpoint, config: Mapping[str, Any], places: Sequence[Place]) -> list[Any]:
    """The values of a Keras 3 optimizer of this config, by place."""
    rates = checkpoint.config[RATE], config[RATE]
    if isinstance(rates[0], Mapping) != isinstance(rates[1], Mapping):
        raise CheckpointError(
            "A learning rate cannot become a schedule, or a schedule a learning rate. Give both optimizers the same kind. Received: "
            f"{rates[0]!r} in the checkpoint, {rates[1]!r} in the Keras optimizer."
        )
    if checkpoint.class_name == "Nadam" and checkpoint.config.get("decay") != 1.0:
        raise CheckpointError(
            "Keras 3's Nadam is OptimizerV2's with schedule_decay=1; the product of momenta of any other cannot be continued there. "
            f"Received: schedule_decay={checkpoint.config.get('decay')}."
        )
    return values_of(checkpoint, places)


def _keras3_places(class_name: str, config: Mapping[str, Any], names: Sequence[str]) -> list[Place]:
    known_class(class_name)
    tensorflow = meaning.is_tensorflow(config)
    first = [Place("", ITERATIONS), *([] if tensorflow or isinstance(config.get(RATE), Mapping) else [Place("", RATE)])]
    last = [Place("", "cache")] if class_name == "Nadam" and not tensorflow else []
    return [*first, *_slot_places(meaning.keras3_groups(class_name, config), names), *last]


def known_class(class_name: str) -> None:
    """Raises CheckpointError for Keras 3 classes whose slots have no counterpart."""
    if class_name not in meaning.KERAS3_SLOTS:
        known = ", ".join(meaning.KERAS3_SLOTS)
        raise CheckpointError(f"The slots of Keras's {class_name} have no counterpart in OptimizerV2. Those of {known} can be converted.")
