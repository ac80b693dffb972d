"""A loss scale that lives where the gradients are: whether these are finite, which steps are left out, how the scale goes on.

Nothing here waits for a device, but for `Guard.finite`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_kopt.recording import Sums


class LossScale:
    """A scale, its counter and the number of skipped steps: 0-d tensors on the CPU until the first check, then beside the gradients.

    Attributes:
        scale: float32. counter: int64, steps with finite gradients since the scale changed. skipped: int64.
        growth_steps: after so many finite steps in a row the scale is doubled; None: it stays, and nothing is checked.
    """

    def __init__(self, initial: float, growth_steps: int | None) -> None:
        self.growth_steps = growth_steps
        with torch.inference_mode(False):
            self.scale = torch.tensor(initial, dtype=torch.float32, device="cpu")
            self.counter, self.skipped = (torch.zeros((), dtype=torch.int64, device="cpu") for _ in range(2))

    def settle(self, devices: Sequence[torch.device]) -> None:
        """Move to the first of the devices, unless at home on one of them."""
        if self.scale.device not in devices:
            for tensor in (self.scale, self.counter, self.skipped):
                tensor.data = tensor.data.to(devices[0], non_blocking=True)

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Count a step with finite gradients, or one without. finite: 0-d bool. Source: Keras's dynamic loss scale, a factor of 2."""
        assert self.growth_steps is not None
        full = self.counter + 1 >= self.growth_steps
        doubled = self.scale * 2
        grown = torch.where(full & (doubled < torch.inf), doubled, self.scale)
        self.scale.copy_(torch.where(finite, grown, (self.scale / 2).clamp_min_(1)))
        self.counter.copy_((self.counter + 1) * (finite & ~full))
        self.skipped.add_(~finite)


@torch.no_grad()
def times(gradients: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    """New gradients, multiplied in their own dtype by a 0-d tensor of any device, rounded to that dtype first."""
    return [gradient * factor.to(gradient.device, gradient.dtype, non_blocking=True) for gradient in gradients]


class Guard:
    """One step under a loss scale. `check` comes first, `commit` after the launches, which read `gate`.

    unscale: whether the gradients are still those of the scaled loss; as attribute what they are multiplied by then, or None.
    """

    def __init__(self, state: LossScale, unscale: bool) -> None:
        self.state = state
        self.unscale = state.scale.reciprocal() if unscale else None
        self._rest: Tensor | None = None  # 0 where all gradients are finite, else NaN
        self._finite: Tensor | None = None
        self._gates: dict[torch.device, Tensor] = {}

    @property
    def open(self) -> bool:
        """Whether gradients are still to be checked."""
        return self.state.growth_steps is not None and self._finite is None

    def check(self, squares: Sequence[Tensor]) -> None:
        """Look at the sums of the gradients' squares: float64 [n] for each device and dtypes, not finite where a gradient is not."""
        self.state.settle([s.device for s in squares] or [self.state.scale.device])
        home = self.state.scale.device
        total = torch.cat([torch.zeros(1, dtype=torch.float64, device=home), *(s.to(home, non_blocking=True) for s in squares)]).sum()
        self._rest = total - total
        self._finite = self._rest == 0

    def gate(self, device: torch.device) -> Tensor | None:
        """int64, 0-d: 1, or 0 where the step is left out; None where nothing was checked."""
        if self._finite is not None and device not in self._gates:
            self._gates[device] = self._finite.to(device, torch.int64, non_blocking=True)
        return self._gates.get(device)

    def finite(self) -> bool:
        """Whether the step is taken. Waits for the device."""
        return self._finite is None or bool(self._finite)

    def unscaled(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """New tensors without the loss scale, if it is still there: from here on it is not."""
        factor, self.unscale = self.unscale, None
        return list(gradients) if factor is None else times(gradients, factor)

    def spoil(self, sums: Sums) -> None:
        """Of a step that was left out, make the sums of gradients and of variables NaN: nothing was measured."""
        if self._rest is not None:
            sums.on(self._rest.device)[::2].add_(self._rest)

    def commit(self) -> None:
        """The step is over: the scale goes on."""
        if self._finite is not None:
            self.state.update(self._finite)
