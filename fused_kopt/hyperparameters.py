"""Hyperparameters: OptimizerV2's options, live float32 values, and the scalars a step derives from them."""

import contextlib
import ctypes
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor

from fused_kopt.execute import EXECUTORS, Executor

Pairs = Sequence[tuple[Tensor, Tensor]]
NUMBER = (int, float, np.integer, np.floating)


class Options(TypedDict, total=False):
    """The keyword arguments that every optimizer accepts besides its own."""

    clipnorm: float | None
    clipvalue: float | None
    global_clipnorm: float | None
    lr: float | None
    decay: float
    gradient_aggregator: Callable[[Pairs], Pairs] | None
    gradient_transformers: Sequence[Callable[[Pairs], Pairs]] | None
    executor: Executor
    verify_every: int
    precision: Any
    stats_every: int
    ema_momentum: float | None


_NOT_NEGATIVE = ("clipnorm", "clipvalue", "global_clipnorm", "lr", "decay")


def check_options(options: Mapping[str, Any]) -> None:
    """OptimizerV2's checks of its keyword arguments, in its order, and ours of `executor` and `verify_every`."""
    for name, value in options.items():
        if name not in Options.__annotations__:
            allowed = ", ".join(sorted(Options.__annotations__))
            raise TypeError(f"Unexpected keyword argument passed to optimizer: {name}. Allowed kwargs are {allowed}.")
        if name in _NOT_NEGATIVE and (value is not None or name == "decay") and value < 0:
            raise ValueError(f"Expected {name} >= 0, received: {value}.")
        if name == "lr":
            warnings.warn("The `lr` argument is deprecated, use `learning_rate` instead.", UserWarning, stacklevel=4)
    if options.get("executor", "auto") not in EXECUTORS:
        raise ValueError(f"`executor` must be one of {EXECUTORS}. Received: executor={options['executor']!r}.")
    if (momentum := options.get("ema_momentum")) is not None and not (isinstance(momentum, NUMBER) and 0 <= momentum <= 1):
        raise ValueError(f"`ema_momentum` must be a number in [0, 1], or None. Received: ema_momentum={momentum!r}.")
    if not isinstance(every := options.get("verify_every", 0), int) or every < 0:
        raise ValueError(f"`verify_every` must be an int >= 0 (0: never). Received: verify_every={every!r}.")


def check_clips(clips: Mapping[str, float | None], transformers: Sequence[Any]) -> None:
    """Raises ValueError for combinations that Keras refuses."""
    if clips["clipnorm"] is not None and clips["global_clipnorm"] is not None:
        given = f"clipnorm={clips['clipnorm']}, global_clipnorm={clips['global_clipnorm']}"
        raise ValueError(f"Cannot accept both `clipnorm` and `global_clipnorm`. Received: {given}. Pass one of them.")
    check_transformers(clips, transformers)


def check_transformers(clips: Mapping[str, float | None], transformers: Sequence[Any]) -> None:
    """Raises ValueError where clip arguments meet gradient_transformers."""
    used = [name for name, value in clips.items() if value is not None]
    if transformers and used:
        raise ValueError(f"`gradient_transformers` cannot be combined with {used}. Clip inside a transformer instead.")


def check_fraction(name: str, value: Any) -> None:
    """Keras's check of `momentum`: a Python number must lie in [0, 1]. Callables and tensors pass."""
    if callable(value) or isinstance(value, (Tensor, np.float32)):
        return
    if not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, a tensor or a callable. Received: {name}={value!r}.")
    if not 0 <= value <= 1:
        raise ValueError(f"`{name}` must be between [0, 1]. Received: {name}={value}.")


def check_not_negative(**arguments: Any) -> None:
    """Raises ValueError for a negative number."""
    for name, value in arguments.items():
        if not callable(value) and value < 0:
            raise ValueError(f"`{name}` needs to be positive or zero. Received: {name}={value}.")


def fuzz(epsilon: float | None) -> float:
    """Keras's test of epsilon: None and 0 mean 1e-7, its backend default."""
    return epsilon or 1e-7


def is_schedule(value: Any) -> bool:
    """Whether a value is a learning-rate schedule: callable with the step, and configurable."""
    return callable(value) and hasattr(value, "get_config")


class HasHypers(Protocol):
    """What a Hyperparameter descriptor needs of its owner."""

    _hyper: dict[str, Any]
    _hypers_created: bool


class Hyperparameter:
    """A dynamic hyperparameter: raw until first read or step, then a live 0-d float32 tensor that may be written in place.

    Values may be numbers, 0-d tensors (kept by identity), callables without arguments (called once per bucket and step)
    and, for the learning rate, schedules. Source: OptimizerV2's `_set_hyper` and `_get_hyper`.
    """

    def __init__(self, low: float = -math.inf, high: float = math.inf) -> None:
        self.low, self.high = low, high

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, owner: HasHypers | None, kind: type | None = None) -> Any:
        if owner is None:
            return self
        create(owner)
        value = owner._hyper[self.name]
        return value() if callable(value) and not is_schedule(value) else value

    def __set__(self, owner: HasHypers, value: Any) -> None:
        old = owner._hyper.get(self.name)
        if isinstance(value, NUMBER):
            self._warn(float(value))
        elif isinstance(value, Tensor):
            if value.dim() != 0 or not value.dtype.is_floating_point or value.is_meta:
                got = f"shape {tuple(value.shape)}, dtype {value.dtype}, {value.device}"
                raise ValueError(f"`{self.name}` as a tensor must be 0-d and floating. Received: {got}.")
        elif not callable(value):
            raise TypeError(f"`{self.name}` must be a number, a 0-d tensor or a callable. Received: {self.name}={value!r}.")
        if isinstance(old, Tensor) and isinstance(value, (*NUMBER, Tensor)):
            with torch.no_grad():  # in place, as Keras assigns to its variable: who holds the tensor sees the new value
                old.fill_(value if isinstance(value, Tensor) else float(value))
        else:
            owner._hyper[self.name] = value

    def _warn(self, value: float) -> None:
        # Keras accepts any number; ours warns where a run would diverge or silently stand still.
        with np.errstate(all="ignore"):
            rounded = float(np.float32(value))
        if not self.low <= value < self.high:
            text = f"`{self.name}`={value} lies outside [{self.low}, {self.high}); it is applied as given, as Keras does."
            warnings.warn(text, UserWarning, stacklevel=4)
        elif rounded != value and (rounded in (0.0, 1.0) or math.isinf(rounded)):
            text = f"`{self.name}`={value} becomes {rounded} in float32, in which Keras keeps hyperparameters."
            warnings.warn(text, UserWarning, stacklevel=4)


def create(owner: HasHypers) -> None:
    """Turn every number into a live 0-d float32 tensor (once). None raises TypeError."""
    if owner._hypers_created:
        return
    with torch.inference_mode(False):  # an inference tensor could not be written in place later
        for name, value in owner._hyper.items():
            if isinstance(value, NUMBER):
                owner._hyper[name] = torch.tensor(float(value), dtype=torch.float32, device="cpu")
    owner._hypers_created = True


@contextlib.contextmanager
def restored_on_error(owner: HasHypers) -> Iterator[None]:
    """Hyperparameters that a failing step turned live are raw again after it."""
    before = dict(owner._hyper), owner._hypers_created
    try:
        yield
    except BaseException:
        owner._hyper, owner._hypers_created = before
        raise


def ieee() -> Any:
    """A context in which numpy divides by zero and overflows silently, as Keras's tensors do."""
    return np.errstate(all="ignore")


def serializable(value: Any) -> Any:
    """A hyperparameter for get_config: a number, or a schedule's serialized dict."""
    if is_schedule(value):
        from fused_kopt.optimizers import schedules

        return schedules.serialize(value)
    if isinstance(value, Tensor):
        return value.item()
    if isinstance(value, np.number):
        return float(value)
    return serializable(value()) if callable(value) else value


def _real(value: Any) -> Any:
    """The value; TypeError unless it is a real number. numpy would read None as NaN and "0.1" as 0.1."""
    if isinstance(value, NUMBER) or (isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "fiu"):
        return value
    raise TypeError(f"A hyperparameter must be, and a callable return, a real number or a 0-d tensor. Received: {value!r}.")


class Step:
    """What `scalars` derives a step's numbers from: numpy scalars of one dtype, so that every operation rounds as Keras's does.

    Attributes: `dtype` np.float32 or np.float64, `iterations` the count before this step, `t` the 1-based step in `dtype`,
    `multiplier` what a variable's learning rate is multiplied by, `rate` the learning rate once it has been asked for.
    """

    def __init__(self, iterations: int, dtype: torch.dtype, multiplier: float = 1.0) -> None:
        self.multiplier = multiplier
        self.dtype: Any = np.float64 if dtype == torch.float64 else np.float32
        self.torch_dtype = dtype
        self.iterations = iterations
        self.t = self.dtype(iterations + 1)
        self.rate: Any = math.nan  # what learning_rate returned
        self.cache: Any = None  # what a rule's scalars leave for its _commit

    def number(self, value: Any) -> Any:
        """A hyperparameter in `dtype`; Python numbers pass through float32, as Keras's do."""
        if isinstance(value, Tensor):
            if value.dtype is torch.float32 and value.is_cpu and value.numel() == 1:  # read from memory: item() takes up to 5 us
                return self.dtype(ctypes.c_float.from_address(value.data_ptr()).value)
            return self.dtype(value.item())
        return self.dtype(np.float32(_real(value)))

    def exact(self, value: float) -> Any:
        """A constant in `dtype` without the detour through float32 (epsilon)."""
        return self.dtype(_real(value))

    def sqrt(self, value: Any) -> Any:
        """Square root in `dtype`."""
        return np.sqrt(value)

    def power(self, base: Any, exponent: Any) -> Any:
        """base ** exponent by the C library, as TensorFlow's scalar power.

        `**` on numpy scalars calls `powf` or `pow`. The np.power ufunc has a vector version that is an ulp off now and
        then, and a rounded double power differs from `powf` in 1.2 % of (beta, t): beta_1 0.9 first at t = 685.
        """
        return self.dtype(base) ** self.dtype(exponent)

    def learning_rate(self, value: Any, decay: float) -> Any:
        """The learning rate of this step: schedule or value, divided by 1 + decay * iterations."""
        if is_schedule(value):
            value = value(torch.tensor(self.iterations, dtype=self.torch_dtype, device="cpu"))
        rate = self.number(value)
        if decay > 0:
            rate = rate / (1 + self.number(decay) * self.dtype(self.iterations))
        self.rate = rate if self.multiplier == 1.0 else rate * self.number(self.multiplier)
        return self.rate
