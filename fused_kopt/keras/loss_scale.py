"""Keras 3's dynamic loss scale, with the unscaling inside the inner optimizer's launch."""

from collections.abc import Sequence
from typing import Any

import keras
import torch
from torch import Tensor

from fused_kopt.keras.fused import registered, stepper
from fused_kopt.keras.host import Host
from fused_kopt.keras.plan import tensors_of
from fused_kopt.keras.state import Stateful

LARGEST = 2.0**127  # of float32's powers of two


@registered
class LossScaleOptimizer(Stateful, keras.optimizers.LossScaleOptimizer):
    """`keras.optimizers.LossScaleOptimizer`: halves the scale and skips the step where a gradient is not finite.

    The check is one reduction over all gradients and one read of its result. With an optimizer of this package (or one after
    `fuse`) inside, the unscaling is part of its launch. Unlike Keras's, the scale never falls below `minimum_scale`, from which
    it could not rise again if it reached 0, and it does not grow to infinity. Arguments, config, variables and files: Keras's.
    """

    minimum_scale = 2.0**-14

    _host: Host

    def build(self, var_list: Any) -> None:
        """Create the scale, its counter and the inner optimizer's slots."""
        self._host = Host()
        super().build(var_list)

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Update the variables from scaled gradients, or skip. Raises ValueError where an unbuilt optimizer gets no variables."""
        if not self.built and trainable_variables is None:
            raise ValueError(
                "The optimizer is not built: pass `trainable_variables`, or call `optimizer.build(trainable_variables)` first."
            )
        super().apply(grads, trainable_variables)

    @torch.compiler.disable
    def check_finite(self, grads: Sequence[Any]) -> Tensor:
        """Whether all elements of all gradients are finite: 0-d bool."""
        tensors = [tensor for tensor in tensors_of([g for g in grads if g is not None]) if tensor.numel()]
        if not tensors:
            return torch.tensor(True)
        with torch.no_grad():
            largest = torch._foreach_norm(tensors, float("inf"))
        return torch.stack([norm.to(largest[0]) for norm in largest]).isfinite().all()

    @torch.compiler.disable
    def _stateful_handle_finite_grads(self, grads: Any, trainable_variables: Any) -> None:
        inner, scale = stepper(self.inner_optimizer), self._host.read(self.dynamic_scale)
        variables = self._trainable_variables if trainable_variables is None else trainable_variables
        if inner is None:
            overwrites = self._overwrite_variable_with_gradient
            grads = [g if g is None or overwrites(v) else g / scale for g, v in zip(grads, variables, strict=True)]
            self.inner_optimizer.apply(grads, variables)
        else:
            inner.apply(grads, variables, scale)
        steps = self._host.read(self.step_counter) + 1
        if steps >= self.dynamic_growth_steps:
            self._host.write(self.dynamic_scale, min(scale * 2, LARGEST))
        self._host.write(self.step_counter, steps % self.dynamic_growth_steps)

    @torch.compiler.disable
    def _stateful_handle_non_finite_grads(self) -> None:
        inner, scale = stepper(self.inner_optimizer), self._host.read(self.dynamic_scale)
        if inner is not None:
            inner.recorder.skipped += 1
        self._host.write(self.step_counter, 0)
        self._host.write(self.dynamic_scale, max(scale / 2, min(scale, self.minimum_scale)))
