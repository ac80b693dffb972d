"""Checkpoints that move: an optimizer's state in files, and between frameworks.

`save` and `load` are all that a run of one's own needs. Everything else goes through one neutral form, `Checkpoint`: `read`, `write` and
the converters make it from other frameworks' files and states, or turn it into them; `capture` and `restore` connect it to optimizers.
"""

from fused_kopt.checkpoint import storage
from fused_kopt.checkpoint.formats import Hints, read, write
from fused_kopt.checkpoint.lists import from_keras3, from_weights, to_keras3, to_weights
from fused_kopt.checkpoint.neutral import Checkpoint, Variables, renamed
from fused_kopt.checkpoint.snapshot import capture, new_optimizer, restore
from fused_kopt.checkpoint.storage import FilePath
from fused_kopt.checkpoint.torch_read import from_state_dict
from fused_kopt.checkpoint.torch_write import to_state_dict
from fused_kopt.optimizer import Optimizer

__all__ = [
    "Checkpoint",
    "Hints",
    "capture",
    "from_keras3",
    "from_state_dict",
    "from_weights",
    "load",
    "new_optimizer",
    "read",
    "renamed",
    "restore",
    "save",
    "to_keras3",
    "to_state_dict",
    "to_weights",
    "write",
]


def save(path: FilePath, optimizer: Optimizer, variables: Variables, with_values: bool = False) -> None:
    """Write an optimizer's state to a safetensors file: slots by name, iterations, hyperparameters, schedule.

    The file appears whole, or the old one stays: it is written beside `path`, flushed to the disk and renamed.

    Args:
        path: where to; by convention `.safetensors`.
        optimizer: any fused_kopt optimizer.
        variables: (name, tensor) pairs, such as `model.named_parameters()`; all that the optimizer has slots for.
        with_values: also write the variables' values.

    Raises what `capture` raises, CheckpointError for settings that are not JSON, OSError. Needs the extra `checkpoint`.
    """
    storage.write(path, capture(optimizer, variables, with_values))


def load(path: FilePath, optimizer: Optimizer, variables: Variables, settings: bool = True, with_values: bool = False) -> None:
    """Read an optimizer's state from a file of `save`, and create its slots if it has none yet. Nothing is unpickled.

    Args:
        path: the file.
        optimizer: of the class that was saved.
        variables: (name, tensor) pairs with exactly the names that were saved.
        settings, with_values: as for `restore`.

    Raises CheckpointError for a file that is damaged or does not fit, with a table of what differs, OSError; then nothing has been
    written into the optimizer or the variables. Needs the extra `checkpoint`.
    """
    restore(storage.read(path), optimizer, variables, settings, with_values)
