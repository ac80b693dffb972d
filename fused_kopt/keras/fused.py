"""What the optimizer classes add to Keras's."""

import functools
from collections.abc import Iterable
from typing import Any, ClassVar

import keras

from fused_kopt.description import Description
from fused_kopt.execute import Executor
from fused_kopt.keras.declaration import Declaration
from fused_kopt.keras.state import Stateful
from fused_kopt.keras.stepper import Stepper
from fused_kopt.recording import StepStats

# What a subclass may override to change a step: where it does, the steps are Keras's own.
HOOKS = (
    "update_step",
    "_backend_apply_gradients",
    "_backend_update_step",
    "_backend_increment_gradient_accumulators",
    "_backend_reset_gradient_accumulators",
    "_apply_weight_decay",
    "_clip_gradients",
    "_clip_by_norm",
    "_filter_empty_gradients",
    "_update_model_variables_moving_average",
    "_overwrite_model_variables_with_average_value",
)

registered = keras.saving.register_keras_serializable(package="fused_kopt")


@functools.cache
def _overridden(cls: Any) -> bool:
    own = next(c for c in cls.__mro__ if "declaration" in vars(c))
    return any(getattr(cls, hook) is not getattr(own, hook) for hook in HOOKS)


class Fused(Stateful):
    """Comes before a stock Keras class. A subclass that overrides a part of the step (`update_step`, say) gets Keras's steps."""

    declaration: ClassVar[Declaration]
    executor: Executor = "auto"
    """ "auto", "reference", "triton" or "compiled"; may be set between steps, and is not saved."""
    stats_every: int = 0
    """Every so many updates, the launch adds up what `last_stats` returns; 0: never. May be set between steps, and is not saved."""
    _stepper: Any = None

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Update the variables, one gradient for each; see `keras.optimizers.Optimizer.apply`."""
        if self._is_overridden():
            super().apply(grads, trainable_variables)  # type: ignore[misc]
        else:
            self._steps().apply(grads, trainable_variables)

    def describe(self, variables: Iterable[Any] | None = None) -> Description:
        """What a step does and costs: executors and why, launches, bytes. `print()` it. Launches nothing and changes nothing.

        variables: Keras variables. Default: those that the optimizer was built with; ValueError where it was not.
        """
        return self._steps().describe(variables)

    def last_stats(self) -> StepStats | None:
        """Norms, learning rate and iterations of the last update that `stats_every` chose; None before there is one.

        The launches that update add the numbers up; no step waits for them. On a GPU this call waits for the device to have taken
        that step. What constraints and `ema_overwrite_frequency` do after an update does not count, nor do steps that are Keras's
        own. Raises RuntimeError where `stats_every` is 0 and no update was measured.
        """
        recorder = self._steps().recorder
        recorder.every = self.stats_every
        return recorder.last()

    def _is_overridden(self) -> bool:
        cls: Any = type(self)
        return _overridden(cls)

    def _steps(self) -> Stepper:
        if self._stepper is None:
            self._stepper = Stepper(self, self.declaration, super().apply)  # type: ignore[misc]
        return self._stepper  # type: ignore[no-any-return]

    def _apply_weight_decay(self, variables: Iterable[Any]) -> None:
        # Keras's raises RuntimeError where no variable decays
        decaying = [v for v in variables if self.weight_decay is not None and self._use_weight_decay(v)]  # type: ignore[attr-defined]
        if decaying:
            super()._apply_weight_decay(decaying)  # type: ignore[misc]


def stepper(optimizer: Any) -> Stepper | None:
    """What takes the fused steps of an optimizer of ours, or of a stock one after `fuse`; None for others."""
    if not isinstance(optimizer, Fused):
        fused: Stepper | None = vars(optimizer).get("_stepper")
        return fused
    own = type(optimizer).apply is Fused.apply and not optimizer._is_overridden()
    return optimizer._steps() if own else None
