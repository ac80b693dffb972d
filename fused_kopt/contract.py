"""The part of OptimizerV2's contract that takes no step: options, configuration, weights and slots."""

import itertools
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from typing_extensions import Self

from fused_kopt import hyperparameters, precision, state
from fused_kopt.aggregate import AllReduce, Reduction
from fused_kopt.clipping import Everywhere
from fused_kopt.execute import Executor
from fused_kopt.hyperparameters import Hyperparameter, Options
from fused_kopt.loss_scale import Guard
from fused_kopt.precision import Precision
from fused_kopt.recording import Recorder
from fused_kopt.repeats import Repeats
from fused_kopt.replays import Replays
from fused_kopt.slots import SlotGroups
from fused_kopt.stages import Stage

_CLIPS = ("clipnorm", "clipvalue", "global_clipnorm")
_PROCESS = ("_lock", "_stepping", "_repeats", "_replays", "_guard", "_scaled", "_reduction", "_stages", "_across")  # no copy has these
_counts: dict[str, Iterator[int]] = {}


def _unique_name(cls: type) -> str:
    base = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()
    count = next(_counts.setdefault(base, itertools.count()))
    return f"{base}_{count}" if count else base


class Contract(ABC):
    """Options, hyperparameters, configuration, weights and slots of an optimizer."""

    learning_rate = Hyperparameter(low=0.0)
    decay = Hyperparameter(low=0.0)
    grad_scale: float = 1.0
    """Every gradient is multiplied by this inside the launch, before clipping: 1 / loss_scale unscales."""

    def __init__(self, name: str | None, learning_rate: Any, options: Options) -> None:
        hyperparameters.check_options(options)
        self._clips: dict[str, float | None] = {key: options.get(key) for key in _CLIPS}  # type: ignore[misc]
        self._transformers: list[Callable[..., Any]] = list(options.get("gradient_transformers") or ())
        hyperparameters.check_clips(self._clips, self._transformers)
        self._aggregator: Callable[..., Any] = options.get("gradient_aggregator") or AllReduce()
        self._executor: Executor = options.get("executor", "auto")
        self.verify_every = options.get("verify_every", 0)
        self._recorder = Recorder(options.get("stats_every", 0))
        self.ema_momentum = options.get("ema_momentum")
        self._name = name or _unique_name(type(self))
        self._hyper: dict[str, Any] = {}
        self._hypers_created = False
        self._initial_decay = options.get("decay", 0.0)
        self._state = state.State(precision.get(options.get("precision", precision.DEFAULT)))
        self._lock = threading.RLock()
        self._stepping = False
        self._torn = False
        self._repeats = Repeats()
        self._replays: Replays | None = None
        self._multipliers: dict[int, tuple[Tensor, float]] = {}  # by id of the variable
        self._guard: Guard | None = None  # of the step being taken, under loss scaling
        self._scaled = False  # whether a LossScaleOptimizer is around it
        self._stages: list[Stage] = []
        self._reduction: Reduction | None = None
        self._across: Everywhere | None = None  # where other ranks have other parts of the variables
        self._last_rate = 0.0  # the learning rate of the last step
        lr = options.get("lr")
        self.learning_rate = learning_rate if lr is None else lr
        self.decay = self._initial_decay

    @abstractmethod
    def slot_groups(self) -> SlotGroups:
        """The slots, in groups that give Keras's weight order."""

    # Configuration.

    @abstractmethod
    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON-able values, in Keras's key order. Functions and the executor are left out."""

    def _config(self, **own: Any) -> dict[str, Any]:
        """The common keys, then a class's own."""
        clips = {key: value for key, value in self._clips.items() if value is not None}
        stored = {} if self.precision == precision.DEFAULT else {"precision": precision.serialize(self.precision)}
        stored |= {} if self.ema_momentum is None else {"ema_momentum": float(self.ema_momentum)}
        rates = {"learning_rate": self._hyper["learning_rate"], "decay": self._initial_decay}
        config = {"name": self._name, **clips, **rates, **own, **stored}
        return {key: hyperparameters.serializable(value) for key, value in config.items()}

    def _value(self, name: str) -> Any:
        """A hyperparameter for get_config: as given until it is live, then its float32 value."""
        return hyperparameters.serializable(self._hyper[name])

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Self:
        """An optimizer from get_config's dict (left as it is); `custom_objects` may name schedule classes."""
        from fused_kopt.optimizers import schedules

        config = dict(config)
        if "lr" in config:
            config["learning_rate"] = config.pop("lr")
        if isinstance(config.get("learning_rate"), dict):
            config["learning_rate"] = schedules.deserialize(config["learning_rate"], custom_objects)
        return cls(**config)

    @property
    def lr(self) -> Any:
        """Alias of `learning_rate`."""
        return self.learning_rate

    @lr.setter
    def lr(self, value: Any) -> None:
        self.learning_rate = value

    @property
    def clipnorm(self) -> float | None:
        """Limit on the norm of each gradient, or None."""
        return self._clips["clipnorm"]

    @clipnorm.setter
    def clipnorm(self, value: float | None) -> None:
        self._set_clip("clipnorm", value)

    @property
    def clipvalue(self) -> float | None:
        """Limit on the magnitude of each gradient element, or None."""
        return self._clips["clipvalue"]

    @clipvalue.setter
    def clipvalue(self, value: float | None) -> None:
        self._set_clip("clipvalue", value)

    @property
    def global_clipnorm(self) -> float | None:
        """Limit on the norm of all gradients together, or None."""
        return self._clips["global_clipnorm"]

    @global_clipnorm.setter
    def global_clipnorm(self, value: float | None) -> None:
        self._set_clip("global_clipnorm", value)

    def _set_clip(self, name: str, value: float | None) -> None:
        clips = {**self._clips, name: value}
        hyperparameters.check_transformers(clips, self._transformers)
        self._clips = clips

    @property
    def gradient_transformers(self) -> list[Callable[..., Any]]:
        """Functions from pairs to pairs, applied in order after aggregation."""
        return self._transformers

    @gradient_transformers.setter
    def gradient_transformers(self, value: Sequence[Callable[..., Any]] | None) -> None:
        hyperparameters.check_transformers(self._clips, value or ())
        self._transformers = list(value or ())

    @property
    def gradient_aggregator(self) -> Callable[..., Any]:
        """Function of the pairs that returns them aggregated over the replicas."""
        return self._aggregator

    @property
    def executor(self) -> Executor:
        """ "auto", "reference", "triton" or "compiled"; may be changed between steps."""
        return self._executor

    @executor.setter
    def executor(self, value: Executor) -> None:
        hyperparameters.check_options({"executor": value})
        self._executor = value

    @property
    def precision(self) -> Precision:
        """How state is stored where `set_precision` said nothing else."""
        return self._state.policy  # type: ignore[return-value]

    # State.

    @property
    def iterations(self) -> Tensor:
        """The number of steps taken: 0-d int64 tensor, created on first use. May be set only before it exists."""
        return self._state.make_iterations()

    @iterations.setter
    def iterations(self, value: Tensor | int) -> None:
        if self._state.iterations is not None:
            raise RuntimeError(
                "Cannot set `iterations` to a new Variable after the Optimizer weights have been created. Use set_weights()."
            )
        count = int(value)
        self._state.make_iterations().fill_(count)

    @property
    def weights(self) -> list[Tensor]:
        """The live list of iterations and slots, in Keras's order."""
        return self._state.weights

    def variables(self) -> list[Tensor]:
        """The same list as `weights`."""
        return self._state.weights

    def get_weights(self) -> list[Any]:
        """The weights as numpy: iterations (np.int64), then the slots, in Keras's order."""
        with self._lock:
            return [state.to_numpy(weight) for weight in self._state.weights]

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Write values (numpy arrays or tensors) into the weights, in the order of `weights`.

        Raises ValueError for a wrong count or shape, AttributeError for items without shape, TypeError for values that
        are not numbers; nothing is written then. An optimizer has weights from its first step or `build` on.
        """
        with self._lock:
            state.assign(self._name, self._state.weights, self._compatible(weights))
            self._torn = False

    def _compatible(self, weights: Sequence[Any]) -> Sequence[Any]:
        """Weight lists of Keras's V1 optimizers, made to fit (Adam, RMSprop, Adagrad, Adadelta)."""
        return weights

    def __getstate__(self) -> dict[str, Any]:
        if self._stages:
            raise TypeError("This optimizer is sharded or offloaded, and has no copies. Save it with fused_kopt.distributed.save.")
        own = {"_multipliers": list(self._multipliers.values())}
        return {k: v for k, v in self.__dict__.items() if k not in _PROCESS} | own

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)
        for value in (v for v in self._hyper.values() if isinstance(v, Tensor) and not v.is_meta):
            value.data = value.data.cpu()  # torch.load(map_location=...) moves them; a step would wait for their values
        self._lock = threading.RLock()
        self._stepping = False
        self._repeats = Repeats()
        self._replays = None
        self._guard, self._scaled = None, False
        self._reduction, self._stages, self._across = None, [], None
        self._multipliers = {id(variable): (variable, m) for variable, m in values["_multipliers"]}


def without_iterations(weights: Sequence[Any], expected: int) -> Sequence[Any]:
    """A V1 list, which lacks the iterations, with a 0 in front. Source: Keras's RMSprop, Adagrad and Adadelta."""
    if len(weights) == expected - 1:
        return [np.zeros((), np.int64), *weights]
    return weights
