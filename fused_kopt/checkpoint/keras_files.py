"""Keras's files: the legacy .h5 of Keras 2 and 3, .weights.h5, and .keras. Nothing in them is executed."""

import contextlib
import dataclasses
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import h5py

from fused_kopt.checkpoint import lists, meaning, scaling, snapshot
from fused_kopt.checkpoint.lists import ITERATIONS, RATE, Identifier, Place
from fused_kopt.checkpoint.neutral import Checkpoint, Order
from fused_kopt.checkpoint.storage import FilePath
from fused_kopt.errors import CheckpointError
from fused_kopt.optimizers import registry

INSIDE = "model.weights.h5"  # the member of a .keras file


@contextlib.contextmanager
def opened(path: FilePath | io.BytesIO) -> Iterator[h5py.File]:
    """The file, open for reading; CheckpointError for what is no such file, or is damaged."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except FileNotFoundError:
        raise
    except CheckpointError:
        raise
    except (OSError, KeyError, RuntimeError, TypeError, AttributeError, ValueError) as error:  # forged attributes raise the latter
        raise CheckpointError(f"{path} is not a readable Keras file: {error}") from error


# The legacy .h5: names, but a tree of groups named like the variables.


class Legacy(NamedTuple):
    """What a legacy .h5 file says: the optimizer, where each of its weights belongs, and the model's values."""

    class_name: str
    config: dict[str, Any]
    places: dict[str, Place]  # by the weight's name in the file
    values: dict[str, Any]

    @property
    def keras3(self) -> bool:
        """Whether the optimizer is one of Keras 3's, or of TensorFlow's new classes; else it is an OptimizerV2."""
        return is_keras3(self.config)


def is_keras3(config: Mapping[str, Any]) -> bool:
    """Whether a config is of Keras 3's classes, or of TensorFlow's new ones: OptimizerV2 has no `use_ema`."""
    return "use_ema" in config


def legacy(file: h5py.File, path: FilePath) -> Legacy:
    """The optimizer of a legacy file. Raises CheckpointError where there is none, or a name cannot be understood."""
    if "optimizer_weights" not in file or "training_config" not in file.attrs:
        raise CheckpointError(f"{path} has no optimizer state. Compile and train the model, and save it with its optimizer.")
    optimizer = json.loads(file.attrs["training_config"])["optimizer_config"]
    values, names = dict(_model(file)), _texts(file["optimizer_weights"].attrs["weight_names"])
    class_name, config = optimizer["class_name"].rpartition(">")[2], optimizer["config"]
    places = _keras3_names(names, class_name, list(values)) if is_keras3(config) else _keras2_names(names)
    if len(set(places)) < len(names):
        raise CheckpointError(f"{path} names a weight twice: {names}.")
    return Legacy(class_name, config, dict(zip(names, places, strict=True)), values)


def read_h5(path: FilePath) -> Checkpoint:
    """The optimizer of a legacy `.h5` model file of Keras 2 (OptimizerV2 or the new classes) or Keras 3, with the variables' values.

    The names are those of the file ("first/kernel"). Keras 3 itself restores only iterations and learning rate from its own .h5
    files; the slots are in them all the same, and read here. Needs h5py. Raises CheckpointError where the file has no optimizer state.
    """
    with opened(path) as file:
        told = legacy(file, path)
        found = {place: lists.tensor(file["optimizer_weights"][name][()]) for name, place in told.places.items()}
    names = list(dict.fromkeys(place.variable for place in found if place.variable))
    own = {name: lists.tensor(told.values[name]) for name in names if name in told.values}
    if Place("", ITERATIONS) not in found:
        raise CheckpointError(f"{path} has no count of iterations among {list(told.places)}.")
    if told.keras3:
        made = lists.keras3_checkpoint(found, names, told.class_name, told.config)
    else:
        declared = scaling.inner(snapshot.new_optimizer(Checkpoint(told.class_name, told.config, 0, {})))
        made = lists.keras2_checkpoint(found, names, declared)
    return dataclasses.replace(made, variables=own)


def _texts(names: Any) -> list[str]:
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _model(file: h5py.File) -> Iterator[tuple[str, Any]]:
    """The model's variables: (name without TensorFlow's ":0", value)."""
    for layer in file.get("model_weights", {}).values():
        for name in _texts(layer.attrs.get("weight_names", ())):
            yield name.removesuffix(":0"), layer[name][()]


def _keras2_names(weights: Sequence[str]) -> list[Place]:
    """OptimizerV2: "Adam/iter:0", "Nadam/momentum_cache:0", "Adam/first/kernel/m:0", each perhaps after "training/"."""
    found = []
    prefix = next((name.removesuffix("iter:0") for name in weights if name.endswith("/iter:0")), "")
    for name in weights:
        inner = name.removeprefix(prefix).removesuffix(":0")
        variable, _, slot = inner.rpartition("/")
        found.append(Place(variable, {"iter": ITERATIONS, "momentum_cache": "cache"}.get(slot, slot)))
    return found


def _keras3_names(weights: Sequence[str], class_name: str, variables: Sequence[str]) -> list[Place]:
    """Keras 3: "adam/seq_first_kernel_momentum"; TensorFlow's new classes: "Adam/m/first/kernel:0". Raises CheckpointError for others."""
    lists.known_class(class_name)
    known = {"iteration:0": {Place("", ITERATIONS)}, "iteration": {Place("", ITERATIONS)}}
    known |= {name: {Place("", RATE)} for name in ("learning_rate", "learning_rate:0")}
    words = meaning.KERAS3_SLOTS[class_name] | {"average": "average", "gradient_accumulator": "gradient_accumulator"}
    for variable in variables:
        for slot, ours in words.items():
            for spelling in (f"{variable.replace('/', '_')}_{slot}", f"{slot}/{variable}:0"):
                known.setdefault(spelling, set()).add(Place(variable, ours))
    found: list[Place] = []
    for name in weights:
        if class_name == "Nadam" and re.fullmatch(
            r"variable(_\d+)?", name.rpartition("/")[2]
        ):  # the product of momenta has no name of its own
            found.append(Place("", "cache"))
            continue
        places = known.get(name) or known.get(name.partition("/")[2]) or set()
        if len(places) != 1:
            told = f"could be any of {', '.join(sorted(map(str, places)))}" if places else f"belongs to none of {list(variables)}"
            raise CheckpointError(f"The weight {name!r} {told}. Save as .keras or .weights.h5 and convert with names in order.")
        found += places
    return found


# .weights.h5 and .keras: positions, in the group optimizer/vars.


def declared(optimizer: Identifier | None, path: FilePath) -> tuple[str, dict[str, Any]]:
    """Class and config of the Keras optimizer behind a positional file; of the inner one of a LossScaleOptimizer."""
    if isinstance(optimizer, Mapping):
        if optimizer["class_name"] == "LossScaleOptimizer":
            return declared(optimizer["config"]["inner_optimizer"], path)
        return str(optimizer["class_name"]).rpartition(">")[2], dict(optimizer["config"])
    if isinstance(optimizer, str):
        default = registry.get(optimizer)
        return type(default).__name__, default.get_config()
    raise CheckpointError(f"{path} does not say which optimizer it is of. Pass `optimizer`: a name, or {{'class_name', 'config'}}.")


def positions(file: h5py.File, path: FilePath) -> h5py.Group:
    """The group of the optimizer's variables "0", "1"..., of the inner one of a LossScaleOptimizer."""
    group = file.get("optimizer/inner_optimizer/vars") or file.get("optimizer/vars")
    if not group or any(str(index) not in group for index in range(len(group))):
        raise CheckpointError(f"{path} has no optimizer state (optimizer/vars/0...). Train the model, and save it with its optimizer.")
    return group


def _values(file: h5py.File, path: FilePath) -> list[Any]:
    group = positions(file, path)
    return [group[str(index)][()] for index in range(len(group))]


def read_weights_h5(path: FilePath, variables: Order, optimizer: Identifier | None) -> Checkpoint:
    """The optimizer state of a `.weights.h5` file of Keras 3.

    Args:
        variables: names, or (name, tensor) pairs, in the order of `model.trainable_variables`: the file has positions only.
        optimizer: `{"class_name", "config"}` of the Keras optimizer; or a class name, where its slots are those of the defaults. The
            file has no hyperparameters but the learning rate: a name leaves the others at our defaults.

    Of a LossScaleOptimizer the inner optimizer is read. Raises CheckpointError with a table where they do not fit.
    """
    with opened(path) as file:
        values = _values(file, path)
    return lists.from_keras3(values, *declared(optimizer, path), variables)


def read_keras(path: FilePath, variables: Order, optimizer: Identifier | None = None) -> Checkpoint:
    """The optimizer state of a `.keras` file of Keras 3, which has class and config.

    Args:
        variables: names, or (name, tensor) pairs, in the order of `model.trainable_variables`.
        optimizer: as for `read_weights_h5`, for a file that does not name its optimizer.

    Raises as `read_weights_h5`.
    """
    named, content = unzipped(path)
    with opened(content) as file:
        values = _values(file, path)
    return lists.from_keras3(values, *declared(named or optimizer, path), variables)


def unzipped(path: FilePath) -> tuple[dict[str, Any] | None, io.BytesIO]:
    """The serialized optimizer in a .keras file, if there is one, and its weights."""
    try:
        with zipfile.ZipFile(path) as archive:
            config = json.loads(archive.read("config.json"))
            content = io.BytesIO(archive.read(INSIDE))
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is not a readable .keras file: {error}") from error
    compiled = config.get("compile_config") if isinstance(config, dict) else None
    optimizer = compiled.get("optimizer") if isinstance(compiled, dict) else None
    return (optimizer if isinstance(optimizer, dict) else None), content


def positions_in(path: FilePath, zipped: bool) -> int:
    """How many optimizer variables a `.weights.h5` or, zipped, `.keras` file has."""
    with opened(unzipped(path)[1] if zipped else path) as file:
        return len(positions(file, path))
