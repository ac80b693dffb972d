"""Learning-rate schedules: `tf.keras.optimizers.schedules` for PyTorch.

`schedule(step)` takes a number or a 0-d tensor (one on an accelerator is read back, which synchronises) and returns a 0-d CPU tensor in
the dtype of `initial_learning_rate`: float32 for a Python float, float64 for `np.float64`; an integer is refused (in Keras every call
fails). As in Keras, `decay_steps=0` silently means inf or NaN. bfloat16 is widened to float32.
Each operation is one numpy scalar operation in that dtype, in Keras's order. `+ - * /`, floor and ceil are exact; scalar `**` is the pow
or powf of the C library, as in TensorFlow (numpy's array power is not). So with glibc every bit is TensorFlow's, but: subnormal values
are kept (TensorFlow: 0), and a float32 log is the rounded double, which can shift by a step a restart of CosineDecayRestarts that
falls on a step exactly (t_mul=1.1: restart 50, 1.25: restart 31; none for 1.2, 1.5, 2, 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

Scalar: TypeAlias = "int | float | np.integer[Any] | np.floating[Any] | torch.Tensor"
Float: TypeAlias = "np.floating[Any]"


@np.errstate(over="ignore")  # a boundary of 1e300 is inf in float32
def _scalar(name: str, value: Any, python_float: type[Float] = np.float32, kinds: str = "iuf") -> Any:
    """Convert like `tf.convert_to_tensor`: Python floats become float32, Python integers int32 or, when too large, int64."""
    number = value
    if isinstance(value, torch.Tensor):
        number = (value.detach().float() if value.dtype is torch.bfloat16 else value.detach()).cpu().numpy()
    elif isinstance(value, float) and not isinstance(value, np.generic):
        number = python_float(value)
    elif type(value) is int and -(2**31) <= value < 2**31:
        number = np.int32(value)
    array = np.asarray(number if isinstance(number, int | np.generic | np.ndarray) else None)
    if array.ndim or array.dtype.kind not in kinds:
        allowed = "a float (1.0, not 1)" if kinds == "f" else "a float or a 64-bit integer"
        raise TypeError(f"`{name}` must be {allowed}, or a 0-d tensor of one. Received: {name}={value!r}.")
    return array[()]


def _cos(x: Float) -> Float:
    return x.dtype.type(np.cos(x + 0j).real)  # numpy's real float32 cos is another (AVX-512); the complex one calls the C library


def _log(x: Float) -> Float:
    return x.dtype.type(math.log(x) if x > 0 else -math.inf if x == 0 else math.nan)


class LearningRateSchedule:
    """Maps a step to a learning rate: define `__call__` and, unless the subclass is a dataclass, `get_config`."""

    def __call__(self, step: Scalar) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define `__call__(self, step)` and return the learning rate.")

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        cls: Any = type(self)
        if not is_dataclass(cls):
            raise NotImplementedError(f"{cls.__name__} must define `get_config(self)`: its constructor arguments, as a dict.")
        return {f.name: list(value) if isinstance(value := getattr(self, f.name), list) else value for f in fields(cls)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LearningRateSchedule:
        """A schedule from get_config's dict."""
        return cls(**config)


@dataclass(eq=False)
class _Decay(LearningRateSchedule):  # subclasses define `_decayed`, in the dtype of `rate`
    initial_learning_rate: Scalar

    def __post_init__(self) -> None:
        _scalar("initial_learning_rate", self.initial_learning_rate, kinds="f")

    def _cast(self, name: str, rate: Float, python_float: type[Float] = np.float32) -> Float:
        return rate.dtype.type(_scalar(name, getattr(self, name), python_float))

    def _decayed(self, rate: Float, step: Float) -> Float:
        raise NotImplementedError

    def __call__(self, step: Scalar) -> torch.Tensor:
        with np.errstate(all="ignore"):
            rate = _scalar("initial_learning_rate", self.initial_learning_rate, kinds="f")
            return torch.from_numpy(np.asarray(self._decayed(rate, _scalar("step", step).astype(rate.dtype))))


@dataclass(eq=False)
class ExponentialDecay(_Decay):
    """`initial_learning_rate * decay_rate ** (step / decay_steps)`; `staircase` floors the quotient."""

    decay_steps: Scalar
    decay_rate: Scalar
    staircase: bool = False
    name: str | None = None

    def _decayed(self, rate: Float, step: Float) -> Float:
        periods = step / self._cast("decay_steps", rate)
        return rate * self._cast("decay_rate", rate) ** (np.floor(periods) if self.staircase else periods)


@dataclass(eq=False)
class InverseTimeDecay(_Decay):
    """`initial_learning_rate / (1 + decay_rate * step / decay_steps)`; `staircase` floors the quotient."""

    decay_steps: Scalar
    decay_rate: Scalar
    staircase: bool = False
    name: str | None = None

    def _decayed(self, rate: Float, step: Float) -> Float:
        periods = step / self._cast("decay_steps", rate)
        return rate / (1 + self._cast("decay_rate", rate) * (np.floor(periods) if self.staircase else periods))


@dataclass(eq=False)
class PolynomialDecay(_Decay):
    """Falls to `end_learning_rate` like `(1 - step / decay_steps) ** power`; `cycle` stretches `decay_steps` to its multiple >= step."""

    decay_steps: Scalar
    end_learning_rate: Scalar = 0.0001
    power: Scalar = 1.0
    cycle: bool = False
    name: str | None = None

    def _decayed(self, rate: Float, step: Float) -> Float:
        end, period = self._cast("end_learning_rate", rate), self._cast("decay_steps", rate)
        if not self.cycle:
            step = np.minimum(step, period)
        elif step != 0:  # here Keras divides by the bare Python number, not by its float32
            period = period * np.ceil(step / self._cast("decay_steps", rate, rate.dtype.type))
        return (rate - end) * (1 - step / period) ** self._cast("power", rate) + end


@dataclass(eq=False)
class CosineDecay(_Decay):
    """Half a cosine down to `alpha` times the start; with `warmup_target`, a line of `warmup_steps` leads there first."""

    decay_steps: Scalar
    alpha: Scalar = 0.0
    name: str | None = None
    warmup_target: Scalar | None = None
    warmup_steps: Scalar = 0

    def _decayed(self, rate: Float, step: Float) -> Float:
        start, warmup, exact = rate, rate.dtype.type(0), rate.dtype.type
        if self.warmup_target is not None:
            start, warmup = self._cast("warmup_target", rate), self._cast("warmup_steps", rate)
        period = self._cast("decay_steps", rate)
        step = np.minimum(step, period + warmup)
        if self.warmup_target is not None and step < warmup:
            return (start - rate) * (step / warmup) + rate
        # alpha is a bare Python number in Keras: it and 1 - alpha are rounded separately
        alpha, rest = self._cast("alpha", rate, exact), exact(_scalar("alpha", 1 - self.alpha, exact))
        return start * (rest * (0.5 * (1 + _cos(exact(math.pi) * ((step - warmup) / period)))) + alpha)


@dataclass(eq=False)
class CosineDecayRestarts(_Decay):
    """Cosine decays to `alpha` times the start; each period is `t_mul` times as long and starts `m_mul` times as high as the last."""

    first_decay_steps: Scalar
    t_mul: Scalar = 2.0
    m_mul: Scalar = 1.0
    alpha: Scalar = 0.0
    name: str | None = None

    def _decayed(self, rate: Float, step: Float) -> Float:
        alpha, growth, lift = (self._cast(name, rate) for name in ("alpha", "t_mul", "m_mul"))
        fraction = step / self._cast("first_decay_steps", rate)
        if growth == 1:
            restarts = np.floor(fraction)
            fraction = fraction - restarts
        else:
            restarts = np.floor(_log(1 - fraction * (1 - growth)) / _log(growth))
            length = growth**restarts
            fraction = (fraction - (1 - length) / (1 - growth)) / length
        value: Float = rate * ((1 - alpha) * (0.5 * lift**restarts * (1 + _cos(rate.dtype.type(math.pi) * fraction))) + alpha)
        return value


@dataclass(eq=False)
class PiecewiseConstantDecay(LearningRateSchedule):
    """`values[i]` while `boundaries[i - 1] < step <= boundaries[i]`: exact if `step` is an integer, else in the dtype of `step`."""

    boundaries: Sequence[Scalar]
    values: Sequence[Scalar]
    name: str | None = None

    def __post_init__(self) -> None:
        self.boundaries, self.values = list(self.boundaries), list(self.values)
        if len(self.values) != len(self.boundaries) + 1:
            raise ValueError(f"`values` must be one more than `boundaries`. Received: {len(self.values)} for {len(self.boundaries)}.")

    def __call__(self, step: Scalar) -> torch.Tensor:
        now, last = _scalar("step", step), len(self.boundaries)
        given = [_scalar("boundaries", end, np.float32 if now.dtype.kind == "f" else np.float64) for end in self.boundaries]
        ends = [(end.astype(now.dtype) if now.dtype.kind == "f" else end).item() for end in given]  # Python numbers compare exactly
        found = [i for i in range(last + 1) if (i == 0 or now.item() > ends[i - 1]) and (i == last or now.item() <= ends[i])]
        if len(found) > 1:
            raise ValueError(f"`boundaries` must increase. Received: boundaries={ends}, where step {now} is in {len(found)} intervals.")
        return torch.from_numpy(np.asarray(_scalar("values", self.values[found[0] if found else 0])))  # NaN: values[0], as in Keras


_REGISTRY: dict[str, type[LearningRateSchedule]] = {cls.__name__: cls for cls in (*_Decay.__subclasses__(), PiecewiseConstantDecay)}


def serialize(schedule: LearningRateSchedule) -> dict[str, Any]:
    """Return a JSON-able dict in Keras's form."""
    cls, name = type(schedule), type(schedule).__name__
    if not isinstance(schedule, LearningRateSchedule):
        raise TypeError(f"`schedule` must be a LearningRateSchedule. Received: {schedule!r}.")
    if _REGISTRY.get(name, cls) is not cls:
        raise ValueError(f"The name {name!r} would bring back {_REGISTRY[name]}, not {cls}. Rename your class.")
    config = {key: _encode(value) for key, value in schedule.get_config().items()}
    return {"module": "fused_kopt.optimizers.schedules", "class_name": name, "config": config, "registered_name": None}


def deserialize(config: Mapping[str, Any], custom_objects: Mapping[str, type[LearningRateSchedule]] | None = None) -> LearningRateSchedule:
    """Rebuild what `serialize`, here or in Keras, returned; `class_name` and `config` suffice. Nothing is ever imported."""
    if isinstance(schedule := _decode(config, {**_REGISTRY, **(custom_objects or {})}), LearningRateSchedule):
        return schedule
    raise ValueError(f"`config` must describe a LearningRateSchedule by `class_name` and a dict `config`. Received: {config!r}.")


def _encode(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if not isinstance(value, torch.Tensor | np.number):
        return serialize(value) if isinstance(value, LearningRateSchedule) else value
    number = _scalar("config", value)
    tagged = {"class_name": "__tensor__", "config": {"value": number.item(), "dtype": number.dtype.name}}
    return tagged if number.dtype.kind == "f" else number.item()  # Keras's form of a tensor; a bare float would come back as float32


def _decode(value: Any, classes: Mapping[str, type[LearningRateSchedule]], depth: int = 0) -> Any:
    if depth > 8:  # a warm-up around a decay needs 2; unbounded data would end in a RecursionError
        raise ValueError("`config` nests more than 8 schedules or lists.")
    if isinstance(value, list | tuple):
        return [_decode(item, classes, depth + 1) for item in value]
    if not (isinstance(value, Mapping) and isinstance(value.get("config"), Mapping) and "class_name" in value):
        return value
    config = {key: _decode(item, classes, depth + 1) for key, item in value["config"].items()}
    name = str(value.get("registered_name") or value["class_name"])
    if name in ("__tensor__", "__numpy__") and config.get("dtype") in ("float16", "float32", "float64", "int32", "int64"):
        return np.asarray(config.get("value", ()), config["dtype"])[()]
    if name not in classes:
        raise ValueError(f"Unknown schedule: {name!r}. Known: {sorted(classes)}. Register it or pass `custom_objects={{name: class}}`.")
    return classes[name].from_config(config)
