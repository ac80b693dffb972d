"""The neutral form: an optimizer's state by names, in OptimizerV2's words, whatever it was read from or goes to."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from fused_kopt.errors import CheckpointError

Source = Literal["OptimizerV2", "Keras 3", "torch.optim"]
SOURCES: tuple[Source, ...] = ("OptimizerV2", "Keras 3", "torch.optim")
Variables = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
# What a positional format needs: names, in the order of the file; with tensors the shapes are checked too.
Order = Variables | Sequence[str]


@dataclass(frozen=True)
class Checkpoint:
    """An optimizer's state. Slots have OptimizerV2's names and meaning (a momentum contains the learning rate).

    Attributes:
        class_name: of the optimizer ("Adam").
        config: its constructor's arguments in Keras's spelling, JSON-able, schedules as their serialized dicts. Options of Keras 3
            or torch.optim that OptimizerV2 lacks are there only where they are in use (`weight_decay`, `use_ema`...).
        iterations: the number of steps taken.
        slots: variable name -> slot name -> tensor in the variable's shape. A variable without steps has none: {}.
        extra: weights that belong to no variable, 0-d: Nadam's `cache`; under loss scaling `loss_scale` and `dynamic_counter`.
        variables: values of the variables, where they were saved too.
        overrides: variable name -> what differs from `config` for it: `learning_rate_multiplier` (scale_learning_rate), or the
            hyperparameters of a later parameter group of torch.optim.
        source: whose update rule made the state. It decides which differences `restore` warns of.
        strides: variable name -> strides of the dimensions above 1, of variables that are not row-major in memory and whose 8-bit slots
            have scales: elements share them in this order.
    """

    class_name: str
    config: dict[str, Any]
    iterations: int
    slots: dict[str, dict[str, Tensor]]
    extra: dict[str, Tensor] = field(default_factory=dict)
    variables: dict[str, Tensor] = field(default_factory=dict)
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    source: Source = "OptimizerV2"
    strides: dict[str, list[int]] = field(default_factory=dict)


def named(variables: Variables, what: str = "variables") -> dict[str, Tensor]:
    """Name -> tensor. Raises TypeError for anything else, ValueError for a name or a tensor that comes twice."""
    pairs = list(variables.items() if isinstance(variables, Mapping) else variables)
    found: dict[str, Tensor] = {}
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Tensor)):
            raise TypeError(
                f"`{what}` must be (name, tensor) pairs, such as model.named_parameters(). Received an element of type "
                f"{type(pair).__name__}."
            )
        if pair[0] in found:
            raise ValueError(f"`{what}` has the name {pair[0]!r} twice. Names must be unique.")
        found[pair[0]] = pair[1]
    names = {id(tensor): name for name, tensor in found.items()}
    for name, tensor in found.items():
        if names[id(tensor)] != name:
            raise ValueError(f"`{what}` has one tensor under two names, {name!r} and {names[id(tensor)]!r}. Pass it once.")
    return found


def ordered(variables: Order) -> dict[str, tuple[int, ...] | None]:
    """Name -> shape, or None where only names were given. Raises as `named`."""
    if isinstance(variables, str):
        raise TypeError(f"`variables` must be a list of names or of (name, tensor) pairs. Received: the string {variables!r}.")
    given = list(variables.items() if isinstance(variables, Mapping) else variables)
    if given and all(isinstance(name, str) for name in given):
        if len(set(given)) < len(given):
            raise ValueError(f"`variables` has a name twice: {given}. Names must be unique.")
        return dict.fromkeys(given)  # type: ignore[arg-type]
    return {name: tuple(tensor.shape) for name, tensor in named(given).items()}  # type: ignore[arg-type]


def renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """The checkpoint with other names for its variables: old name -> new name; variables not named keep theirs.

    Raises CheckpointError for names that the checkpoint does not have, and where two variables would get one name.
    """
    unknown = [name for name in names if name not in checkpoint.slots]
    if unknown:
        raise CheckpointError(f"No variable is called {', '.join(map(repr, unknown))}. There are: {', '.join(checkpoint.slots)}.")
    new = {name: names.get(name, name) for name in checkpoint.slots}
    if len(set(new.values())) < len(new):
        raise CheckpointError(f"Two variables would have the same name. Received: names={dict(names)!r}.")
    return Checkpoint(
        checkpoint.class_name,
        checkpoint.config,
        checkpoint.iterations,
        {new[name]: slots for name, slots in checkpoint.slots.items()},
        checkpoint.extra,
        {new.get(name, name): value for name, value in checkpoint.variables.items()},
        {new[name]: value for name, value in checkpoint.overrides.items()},
        checkpoint.source,
        {new[name]: value for name, value in checkpoint.strides.items()},
    )
