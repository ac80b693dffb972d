"""Naming optimizers: get, serialize, deserialize over a closed registry. Nothing is ever imported by name."""

from collections.abc import Mapping
from typing import Any, TypeVar

from fused_kopt.optimizer import Optimizer

_REGISTRY: dict[str, type[Optimizer]] = {}

T = TypeVar("T", bound=type[Optimizer])


def register(cls: T) -> T:
    """Make an Optimizer subclass known to get and deserialize by its class name (case-insensitive). A decorator.

    Raises TypeError for anything but an Optimizer subclass, ValueError if another class has the name.
    """
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise TypeError(f"Only subclasses of fused_kopt.optimizers.Optimizer can be registered. Received: {cls!r}.")
    key = cls.__name__.lower()
    if _REGISTRY.setdefault(key, cls) is not cls:
        raise ValueError(
            f"The name {cls.__name__!r} is taken by {_REGISTRY[key].__module__}.{_REGISTRY[key].__qualname__}. Rename the class."
        )
    return cls


def get(identifier: "str | Mapping[str, Any] | Optimizer") -> Optimizer:
    """An optimizer from its class name (case-insensitive, default arguments), its serialized dict, or itself.

    Raises ValueError for unknown names and anything else, KeyError for a dict without `class_name` or `config`.
    """
    if isinstance(identifier, Optimizer):
        return identifier
    if isinstance(identifier, Mapping):
        return deserialize(identifier)
    if isinstance(identifier, str):
        return deserialize({"class_name": identifier, "config": {}})
    raise ValueError(f"Could not interpret optimizer identifier: {identifier!r}. Pass a name, a serialized dict or an optimizer.")


def serialize(optimizer: Optimizer) -> dict[str, Any]:
    """The dict that deserialize turns back into an equal optimizer (its weights are not in it)."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"Only optimizers can be serialized. Received: {type(optimizer).__name__}.")
    name = type(optimizer).__name__
    return {"module": "fused_kopt.optimizers", "class_name": name, "config": optimizer.get_config(), "registered_name": None}


def deserialize(config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Optimizer:
    """An optimizer from `{"class_name", "config"}`; other keys, `module` among them, are not looked at.

    Only the package's own classes, registered ones and those in `custom_objects` can be named; ValueError otherwise.
    """
    name, arguments = config["class_name"], config["config"]
    known = {**_REGISTRY, **{key.lower(): value for key, value in (custom_objects or {}).items()}}
    cls = known.get(name.lower()) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        names = ", ".join(sorted(_REGISTRY))
        raise ValueError(f"Unknown optimizer: {name!r}. Please ensure it is one of {names}, registered, or in `custom_objects`.")
    if not isinstance(arguments, Mapping):
        raise ValueError(f"The config of {name!r} must be a dict. Received: {type(arguments).__name__}.")
    return cls.from_config(arguments, custom_objects)
