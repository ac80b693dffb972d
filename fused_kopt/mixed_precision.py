"""Training in fewer bits: loss scaling, and gradients added up in float32. Storage is `fused_kopt.Precision`'s."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor
from typing_extensions import Self

from fused_kopt import optimizers
from fused_kopt.accumulation import GradientBuffers
from fused_kopt.loss_scale import Guard, LossScale, times
from fused_kopt.optimizer import Optimizer

__all__ = ["GradientBuffers", "LossScaleOptimizer"]

logger = logging.getLogger("fused_kopt")

INITIAL_SCALE, GROWTH_STEPS = 2.0**15, 2000


@Optimizer.register
class LossScaleOptimizer:
    """An optimizer around another: it scales the loss, unscales the gradients, and leaves out steps whose gradients are not finite.

        optimizer = LossScaleOptimizer(fused_kopt.Adam())
        loss = optimizer.get_scaled_loss(loss_of(model, batch))
        gradients = optimizer.get_unscaled_gradients(torch.autograd.grad(loss, variables))
        optimizer.apply_gradients(zip(gradients, variables))

    `apply_scaled_gradients` unscales inside the launch instead, which saves a pass over the gradients; `minimize` does everything.
    A dynamic scale is halved, but never to less than 1, in a step with an infinite or NaN gradient, which changes neither variables nor
    slots but counts in `iterations`. After `dynamic_growth_steps` finite steps in a row it is doubled, unless float32 ends there.
    Check, skip and scale stay on the device and the host waits for none of them, except with Nadam inside, whose momentum cache depends
    on which steps were taken, and on executors other than triton. Float64 gradients above 1e154 count as infinite: so do their squares.

    Everything else, reading or writing an attribute included, goes to the inner optimizer; isinstance(..., Optimizer) holds. `weights` are
    the inner optimizer's alone; scale and counter travel in checkpoints and pickles. Clipping acts on the unscaled gradients, aggregation
    comes before the check. `gradient_transformers` run in steps that are left out too.

    Args:
        inner_optimizer: any optimizer of this package.
        dynamic: whether the scale changes. A fixed one checks nothing, and leaves out no step.
        initial_scale: of the loss, finite and > 0. Default 2^15; required unless dynamic.
        dynamic_growth_steps: default 2000; None unless dynamic.

    Raises TypeError for an inner optimizer that is none or another LossScaleOptimizer, or a `dynamic` that is no bool; ValueError for an
    inner optimizer that has a LossScaleOptimizer around it already, and for numbers that do not fit.
    Source: Keras's mixed_precision.LossScaleOptimizer for OptimizerV2.
    """

    _inner: Optimizer
    _initial: float
    _scale: LossScale
    _called: set[str]  # of its methods, those that a user should call
    _unscaling: bool  # in the last step

    def __init__(
        self,
        inner_optimizer: Optimizer,
        dynamic: bool = True,
        initial_scale: float | None = None,
        dynamic_growth_steps: int | None = None,
    ) -> None:
        _check(inner_optimizer, dynamic, initial_scale, dynamic_growth_steps)
        growth = GROWTH_STEPS if dynamic_growth_steps is None else dynamic_growth_steps
        initial = INITIAL_SCALE if initial_scale is None else float(initial_scale)
        self._adopt(inner_optimizer, initial, LossScale(initial, int(growth) if dynamic else None))

    def _adopt(self, inner: Optimizer, initial: float, state: LossScale) -> None:
        own = {"_inner": inner, "_initial": initial, "_scale": state, "_called": set(), "_unscaling": False}
        self.__dict__.update(own)
        inner._scaled = True
        if state.growth_steps is not None:
            inner._recorder.skipped = state.skipped

    # The scale.

    @property
    def inner_optimizer(self) -> Optimizer:
        """The optimizer that takes the steps."""
        return self._inner

    @property
    def dynamic(self) -> bool:
        """Whether the scale changes."""
        return self._scale.growth_steps is not None

    @property
    def loss_scale(self) -> Tensor:
        """The scale as it is now: a 0-d float32 tensor of its own, on the CPU before the first step and on the gradients' device then."""
        return self._scale.scale.clone()

    @property
    def dynamic_counter(self) -> Tensor | None:
        """Finite steps since the scale changed: the live 0-d int64 tensor. None for a fixed scale."""
        return self._scale.counter if self.dynamic else None

    @property
    def initial_scale(self) -> float:
        """What the scale was at first."""
        return self._initial

    @property
    def dynamic_growth_steps(self) -> int | None:
        """After so many finite steps in a row the scale is doubled. None for a fixed scale."""
        return self._scale.growth_steps

    def get_scaled_loss(self, loss: Any) -> Any:
        """The loss times the scale, in the loss's dtype; of a callable that returns a loss, one that returns a scaled loss.

        A float16 loss overflows where it passes 65504: compute the loss itself in float32.
        """
        self._called.add("get_scaled_loss")
        return (lambda: self._times_scale(loss())) if callable(loss) else self._times_scale(loss)

    def _times_scale(self, loss: Tensor) -> Tensor:
        # a copy: autograd keeps it, and a step may come before the backward pass
        scale = self._scale.scale.to(loss.device, loss.dtype, non_blocking=True, copy=True)
        return loss * scale

    def get_unscaled_gradients(self, grads: Iterable[Tensor | None]) -> list[Tensor | None]:
        """New gradients without the scale, in their own dtype; None stays None."""
        self._called.add("get_unscaled_gradients")
        given = list(grads)
        unscaled = iter(times([g for g in given if g is not None], self._scale.scale.reciprocal()))
        return [None if g is None else next(unscaled) for g in given]

    # Steps.

    def apply_gradients(
        self, grads_and_vars: Iterable[tuple[Any, Tensor]], name: str | None = None, experimental_aggregate_gradients: bool = True
    ) -> Tensor | None:
        """Take a step with unscaled gradients, or leave it out. Arguments, result, errors: the inner optimizer's `apply_gradients`.

        Logs a warning, at every call, until `get_scaled_loss` and `get_unscaled_gradients` have been called once.
        """
        missing = [method for method in ("get_scaled_loss", "get_unscaled_gradients") if method not in self._called]
        if missing:
            logger.warning(
                "apply_gradients() of a LossScaleOptimizer, but %s was never called: the scale has no effect.", " and ".join(missing)
            )
        with self._guarded(False):
            return self._inner.apply_gradients(grads_and_vars, name, experimental_aggregate_gradients)

    def apply_scaled_gradients(
        self, grads_and_vars: Iterable[tuple[Any, Tensor]], name: str | None = None, experimental_aggregate_gradients: bool = True
    ) -> Tensor | None:
        """`apply_gradients` for the gradients of a scaled loss: the launch unscales them, in float32 whatever their dtype."""
        with self._guarded(True):
            return self._inner.apply_gradients(grads_and_vars, name, experimental_aggregate_gradients)

    @contextmanager
    def _guarded(self, unscale: bool) -> Iterator[None]:
        with self._inner._lock:
            self.__dict__["_unscaling"] = unscale
            self._inner._guard = Guard(self._scale, unscale)
            try:
                yield
            finally:
                self._inner._guard = None

    def minimize(
        self, loss: Tensor | Callable[[], Tensor], var_list: Any, grad_loss: Tensor | None = None, name: str | None = None, tape: Any = None
    ) -> Tensor | None:
        """Compute gradients of the scaled loss, unscale and apply them. Arguments and errors: the inner optimizer's `minimize`."""
        return self.apply_scaled_gradients(self._inner._compute_gradients(self.get_scaled_loss(loss), var_list, grad_loss, tape), name)

    def _compute_gradients(
        self, loss: Any, var_list: Any, grad_loss: Any = None, recorded: Any = None
    ) -> list[tuple[Tensor | None, Tensor]]:
        pairs = self._inner._compute_gradients(self.get_scaled_loss(loss), var_list, grad_loss, recorded)
        return list(zip(self.get_unscaled_gradients(g for g, _ in pairs), (v for _, v in pairs), strict=True))

    def get_gradients(self, loss: Tensor, params: Any) -> list[Tensor | None]:
        """The gradients of `loss`, through the scaled loss; ValueError where a variable has none."""
        return self.get_unscaled_gradients(self._inner.get_gradients(self.get_scaled_loss(loss), params))

    def prepare_replays(self, grads_and_vars: Any, steps: int = 1024) -> None:
        """The inner optimizer's `prepare_replays`, for steps like the last one. Scale and skips go on inside the graph.

        Raises RuntimeError for a dynamic scale around Nadam, besides what that raises.
        """
        if self.dynamic and self._inner.carries:
            raise RuntimeError(
                f"A graph cannot tell {type(self._inner).__name__} which steps it left out. Use a fixed scale or another optimizer."
            )
        with self._guarded(self._unscaling):
            self._inner.prepare_replays(grads_and_vars, steps)

    # The contract.

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON-able values, the inner optimizer serialized."""
        config = {"inner_optimizer": optimizers.serialize(self._inner), "dynamic": self.dynamic, "initial_scale": self._initial}
        return {**config, "dynamic_growth_steps": self.dynamic_growth_steps}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Self:
        """An optimizer from get_config's dict, whose `inner_optimizer` may also be an optimizer."""
        config = dict(config)
        inner = config.pop("inner_optimizer")
        return cls(inner if isinstance(inner, Optimizer) else optimizers.deserialize(inner, custom_objects), **config)

    def __getattr__(self, name: str) -> Any:
        if "_inner" not in self.__dict__:  # a copy in the making
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(type(self), name):
            object.__setattr__(self, name, value)
        else:
            setattr(self._inner, name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._inner)})

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in ("_inner", "_initial", "_scale", "_called")}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self._adopt(values["_inner"], values["_initial"], values["_scale"])
        self.__dict__["_called"] = values["_called"]


optimizers.register(cast("type[Optimizer]", LossScaleOptimizer))  # isinstance and issubclass hold, mypy does not know it


def _check(inner: Any, dynamic: Any, initial_scale: Any, growth_steps: Any) -> None:
    """The constructor's checks, in Keras's order."""
    if not isinstance(inner, Optimizer):
        raise TypeError(f"`inner_optimizer` must be an optimizer of fused_kopt. Received: {type(inner).__name__}.")
    if not isinstance(dynamic, bool):
        raise TypeError(f"`dynamic` must be a bool. Received: dynamic={dynamic!r}.")
    if issubclass(type(inner), LossScaleOptimizer):
        raise TypeError("A LossScaleOptimizer cannot be put around another LossScaleOptimizer. Pass an optimizer that has none around it.")
    if inner._scaled:
        raise ValueError("`inner_optimizer` has a LossScaleOptimizer around it already. Make a new optimizer, or use that one.")
    if not dynamic and initial_scale is None:
        raise ValueError("`initial_scale` must be given where dynamic=False. Received: initial_scale=None.")
    if not dynamic and growth_steps is not None:
        raise ValueError(f"`dynamic_growth_steps` must be None where dynamic=False. Received: dynamic_growth_steps={growth_steps!r}.")
    if initial_scale is not None and not (isinstance(initial_scale, (int, float)) and 0 < initial_scale < math.inf):
        raise ValueError(f"`initial_scale` must be a finite number > 0. Received: initial_scale={initial_scale!r}.")
