"""Reading and writing by format: one call for every kind of file."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from fused_kopt.checkpoint import lists, storage, torch_read, torch_write
from fused_kopt.checkpoint.lists import Identifier
from fused_kopt.checkpoint.neutral import Checkpoint, Order
from fused_kopt.checkpoint.storage import FilePath
from fused_kopt.errors import CheckpointError

Format = Literal["safetensors", "h5", "weights.h5", "keras", "torch", "npz"]
SUFFIXES: dict[str, Format] = {
    ".safetensors": "safetensors",
    ".weights.h5": "weights.h5",
    ".h5": "h5",
    ".hdf5": "h5",
    ".keras": "keras",
    ".pt": "torch",
    ".pth": "torch",
    ".bin": "torch",
    ".ckpt": "torch",
    ".npz": "npz",
}
FORMATS: tuple[Format, ...] = tuple(dict.fromkeys(SUFFIXES.values()))
KERAS: tuple[Format, ...] = ("h5", "weights.h5", "keras")
# Files without names: the caller gives them, in order.
POSITIONAL: tuple[Format, ...] = ("weights.h5", "keras", "npz")


class Hints(NamedTuple):
    """What a file does not say about itself."""

    variables: Order | None = None
    """Names, or (name, tensor) pairs, in the order of the file."""
    optimizer: Identifier | None = None
    """A class name, or `{"class_name", "config"}`."""
    format: Format | None = None
    """Default: by the file's suffix."""


NO_HINTS = Hints()


def format_of(path: FilePath, given: Format | None = None) -> Format:
    """The format of a file: the given one, or what its suffix says. Raises CheckpointError for an unknown suffix or a missing extra."""
    name = Path(path).name.lower()
    found = given or next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)
    if found is None:
        raise CheckpointError(f"{path}: the suffix does not say what the file is. Known are {', '.join(SUFFIXES)}; or name the format.")
    if found not in FORMATS:
        raise CheckpointError(f"`format` must be one of {FORMATS}. Received: format={found!r}.")
    if found in KERAS and importlib.util.find_spec("h5py") is None:
        raise CheckpointError(f"{path}: Keras's files need h5py. pip install 'fused-kopt[checkpoint]'")
    return found


def read(path: FilePath, hints: Hints = NO_HINTS) -> Checkpoint:
    """A checkpoint from a file of any format. Nothing in it is executed.

    Args:
        path: `.safetensors` (fused_kopt's own), `.h5` (a model saved by Keras 2 or 3), `.weights.h5`, `.keras`, `.pt` (a state_dict of
            torch.optim, or a dict that contains one), `.npz` (`np.savez(path, *optimizer.get_weights())`).
        hints: names for files that have positions only; the optimizer for `.npz` and `.weights.h5`, which do not name theirs.

    Raises CheckpointError, with a table where names, counts or shapes do not fit; OSError.
    """
    kind, (variables, optimizer, _) = format_of(path, hints.format), hints
    if kind == "safetensors":
        return storage.read(path)
    if kind == "torch":
        state = _load_torch(path)
        try:
            return torch_read.from_state_dict(state, variables)
        except (KeyError, AttributeError, IndexError) as error:  # a forged group or state
            raise CheckpointError(f"{path}: the state_dict lacks {error}, or it is of another kind.") from error
    if kind in KERAS:
        from fused_kopt.checkpoint import keras_files

        if kind == "h5":
            return keras_files.read_h5(path)
        by_position = keras_files.read_keras if kind == "keras" else keras_files.read_weights_h5
        return by_position(path, _needed(path, variables), optimizer)
    if optimizer is None:
        raise CheckpointError(f"{path} does not say which optimizer it is of. Pass `optimizer`: a name, or {{'class_name', 'config'}}.")
    return lists.from_weights(_load_npz(path), optimizer, _needed(path, variables))


def _needed(path: FilePath, variables: Order | None) -> Order:
    if variables is None:
        raise CheckpointError(f"{path} has no names, only positions. Pass the variables' names, in the order of model.trainable_variables.")
    return variables


def _load_torch(path: FilePath) -> Mapping[str, Any]:
    """The one optimizer state_dict in a file of torch.save, loaded with weights_only."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged and forged files raise whatever the part that meets the damage raises
        raise CheckpointError(f"{path} is not a file of torch.save that weights_only=True can load: {error}") from error
    found = list(_state_dicts(content))
    if len(found) != 1:
        raise CheckpointError(f"{path} contains {len(found)} optimizer state_dicts; one is needed. Save optimizer.state_dict() by itself.")
    return found[0]


def _state_dicts(content: Any) -> list[Mapping[str, Any]]:
    """The optimizer state_dicts in what a training script saved: it itself, an entry of a dict, an element of a list (Lightning)."""
    if isinstance(content, Mapping):
        if {"state", "param_groups"} <= set(content):
            return [content]
        return [found for value in content.values() if isinstance(value, (Mapping, list)) for found in _state_dicts(value)]
    return [found for value in content for found in _state_dicts(value)] if isinstance(content, list) else []


def _load_npz(path: FilePath) -> list[Any]:
    """The arrays of `np.savez(path, *weights)`, in order."""
    try:
        with np.load(path, allow_pickle=False) as file:
            expected = [f"arr_{index}" for index in range(len(file.files))]
            if sorted(file.files) != sorted(expected):
                raise CheckpointError(
                    f"{path} must have the arrays arr_0, arr_1..., as np.savez(path, *weights) writes. Has: {file.files}."
                )
            return [file[name] for name in expected]
    except OSError:
        raise
    except CheckpointError:
        raise
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise CheckpointError(f"{path} is not a readable .npz file: {error}") from error


def write(path: FilePath, checkpoint: Checkpoint, hints: Hints = NO_HINTS) -> None:
    """Write a checkpoint in any format; `path` is replaced whole, or stays as it was.

    Keras's files (`.h5`, `.weights.h5`, `.keras`) contain a model too: `path` must be one, and its optimizer's state is replaced.

    Args:
        path: the file.
        checkpoint: from `read`, `capture` or a converter.
        hints: `variables`, the order of the positions: required for `.weights.h5` and `.keras`, by default the checkpoint's for `.npz`
            and torch; `optimizer`, Keras's, for a `.weights.h5` and a checkpoint that is not from Keras 3.

    Raises CheckpointError where the format cannot hold the checkpoint, or an existing file does not fit; OSError.
    """
    kind, (variables, optimizer, _) = format_of(path, hints.format), hints
    if kind == "safetensors":
        storage.write(path, checkpoint)
    elif kind == "torch":
        state = torch_write.to_state_dict(checkpoint, variables)
        with storage.replacing(path) as temporary:
            torch.save(state, temporary)
    elif kind == "npz":
        weights = lists.to_weights(checkpoint, variables)
        with storage.replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, *weights)
    else:
        from fused_kopt.checkpoint import keras_writing

        if not Path(path).exists():
            raise CheckpointError(f"{path} does not exist, and a checkpoint has no model. Save the model there with Keras first.")
        if kind == "h5":
            return keras_writing.write_h5(path, checkpoint)
        by_position = keras_writing.write_keras if kind == "keras" else keras_writing.write_weights_h5
        by_position(path, checkpoint, _needed(path, variables), optimizer)


def most_variables(path: FilePath, given: Format | None = None) -> int:
    """At most how many variables a file without names can be of; 0 for formats with names. Raises as `read`."""
    kind = format_of(path, given)
    if kind == "torch":
        return sum(len(group["params"]) for group in _load_torch(path)["param_groups"])
    if kind == "npz":
        return len(_load_npz(path))
    if kind in ("keras", "weights.h5"):
        from fused_kopt.checkpoint import keras_files

        return keras_files.positions_in(path, kind == "keras")
    return 0
