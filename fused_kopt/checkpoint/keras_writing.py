"""A checkpoint into Keras files that exist: only the optimizer's state in them is replaced."""

import json
import shutil
import zipfile
from collections.abc import Mapping
from typing import Any

import h5py

from fused_kopt.checkpoint import keras_files, lists, tables
from fused_kopt.checkpoint.keras_files import INSIDE
from fused_kopt.checkpoint.lists import RATE, Identifier, Place
from fused_kopt.checkpoint.neutral import Checkpoint, Order
from fused_kopt.checkpoint.storage import FilePath, replacing
from fused_kopt.errors import CheckpointError


def write_h5(path: FilePath, checkpoint: Checkpoint) -> None:
    """Replace the optimizer's state in a legacy `.h5` model file, which must have one of the same class and the same names.

    The learning rate becomes the checkpoint's; other settings stay the file's. The file is replaced whole at the end, or not at all.
    Raises CheckpointError with a table where they do not fit.
    """
    with keras_files.opened(path) as file:
        told = keras_files.legacy(file, path)
    _same_class(checkpoint, told.class_name, path)
    if told.keras3:
        values = lists.to_keras3_places(checkpoint, told.config, list(told.places.values()))
    else:
        values = lists.values_of(checkpoint, list(told.places.values()))
    with replacing(path) as temporary:
        shutil.copyfile(path, temporary)
        with h5py.File(temporary, "r+") as file:
            _fill(file["optimizer_weights"], dict(zip(told.places, values, strict=True)), told.places)
            training = json.loads(file.attrs["training_config"])
            if RATE in training["optimizer_config"]["config"]:
                training["optimizer_config"]["config"][RATE] = checkpoint.config[RATE]
            file.attrs["training_config"] = json.dumps(training)


def write_weights_h5(path: FilePath, checkpoint: Checkpoint, variables: Order, optimizer: Identifier | None = None) -> None:
    """Replace the optimizer's state in a `.weights.h5` file of Keras 3.

    Args:
        path: a file saved with a trained optimizer of the checkpoint's class.
        variables: names, or (name, tensor) pairs, in the order of `model.trainable_variables`.
        optimizer: as for `read_weights_h5`; default what a checkpoint from Keras 3 says itself.

    Raises as `write_h5`.
    """
    with keras_files.opened(path) as file:
        keras_files.positions(file, path)
    with replacing(path) as temporary:
        shutil.copyfile(path, temporary)
        with h5py.File(temporary, "r+") as file:
            _fill_positions(file, path, checkpoint, keras_files.declared(optimizer or _identity(checkpoint), path), variables)


def _identity(checkpoint: Checkpoint) -> dict[str, Any] | None:
    return {"class_name": checkpoint.class_name, "config": checkpoint.config} if checkpoint.source == "Keras 3" else None


def write_keras(path: FilePath, checkpoint: Checkpoint, variables: Order, optimizer: Identifier | None = None) -> None:
    """Replace the optimizer's state in a `.keras` file; its own config says how its slots are ordered.

    Arguments and errors as for `write_weights_h5`; `optimizer` for a file that does not name its own.
    """
    named, content = keras_files.unzipped(path)
    with keras_files.opened(content), h5py.File(content, "r+") as file:
        _fill_positions(file, path, checkpoint, keras_files.declared(named or optimizer or _identity(checkpoint), path), variables)
    with replacing(path) as temporary, zipfile.ZipFile(path) as old, zipfile.ZipFile(temporary, "w") as new:
        for item in old.infolist():
            new.writestr(item, content.getvalue() if item.filename == INSIDE else old.read(item.filename))


def _same_class(checkpoint: Checkpoint, class_name: str, path: FilePath) -> None:
    if class_name != checkpoint.class_name:
        raise CheckpointError(f"{path} is of {class_name}, the checkpoint of {checkpoint.class_name}. Save the model with that optimizer.")


Declared = tuple[str, dict[str, Any]]


def _fill_positions(file: h5py.File, path: FilePath, checkpoint: Checkpoint, declared: Declared, variables: Order) -> None:
    _same_class(checkpoint, declared[0], path)
    group = keras_files.positions(file, path)
    values = lists.to_keras3(checkpoint, declared[1], variables)
    if len(values) != len(group):
        raise CheckpointError(f"{path} has {len(group)} optimizer variables, the checkpoint {len(values)}. Were their settings the same?")
    _fill(group, {str(index): value for index, value in enumerate(values)}, {})


def _fill(group: h5py.Group, values: Mapping[str, Any], places: Mapping[str, Place]) -> None:
    """Write values into the datasets of these names, after a check of all shapes."""
    have = {str(places.get(name, name)): str(tuple(value.shape)) for name, value in values.items()}
    want = {str(places.get(name, name)): str(tuple(group[name].shape)) for name in values}
    tables.refuse_unless(tables.rows(have, want), "The checkpoint's shapes are not those of the file:")
    for name, value in values.items():
        group[name][()] = value
