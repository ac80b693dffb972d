"""The part of Optimizer that knows how its state is stored: slots by name, precision policies, what variables were when they got slots."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fused_kopt import gradients, options, precision, slots, state
from fused_kopt.contract import Contract
from fused_kopt.errors import StaleVariableError
from fused_kopt.execute import Rule
from fused_kopt.precision import Precision
from fused_kopt.repeats import Repeats
from fused_kopt.slots import AVERAGE, Slot, SlotGroups


class Stored(Contract):
    """Slots, and the policies that say how they are kept."""

    @abstractmethod
    def rule(self) -> Rule:
        """The update rule of this configuration: a module-level function."""

    def _all_slots(self) -> SlotGroups:
        """The slots, and the average if there is one."""
        return self.slot_groups() if self.ema_momentum is None else (*self.slot_groups(), (AVERAGE,))

    def finalize_variable_values(self, var_list: Iterable[Tensor]) -> None:
        """Give variables the values of their averages, as after the last step of training. Sharded: every rank must call it.

        Source: Keras's method of the same name. Raises ValueError without `ema_momentum`, KeyError for a variable without slots.
        """
        if self.ema_momentum is None:
            raise ValueError("There are no averages. Construct the optimizer with ema_momentum=0.99, or another momentum in [0, 1].")
        with self._lock, torch.no_grad():
            # of a sharded variable there may be nothing here
            mine = [v for v in map(self._kept_for, var_list) if not self._stages or self._state.built_as(v) is not None]
            for variable, average in [(v, self.get_slot(v, AVERAGE.name)) for v in mine]:
                variable.copy_(average)
            for stage in reversed(self._stages):
                stage.publish(mine)

    def _kept_for(self, variable: Tensor) -> Tensor:
        """What has slots in place of a caller's variable."""
        for stage in self._stages:
            piece = stage.pieces().get(id(variable), (None, 0, 0))[0]
            variable = variable if piece is None else piece
        return variable

    def get_slot_names(self) -> list[str]:
        """The names of the slots that exist."""
        return self._state.slot_names()

    def get_slot(self, var: Tensor, slot_name: str) -> Tensor:
        """The slot of a variable, in its shape; float32 (float64 for float64 variables). KeyError if there is none.

        Where a precision policy stores it in parts, a copy of what they stand for; the parts are in `weights`.
        """
        var = self._kept_for(var)
        slot = self._state.slot(var, slot_name)
        if slot is None:
            raise KeyError(f"No slot {slot_name!r} for this variable {tuple(var.shape)}. Slots: {self.get_slot_names()}.")
        return self._read(var)[1][slot_name] if slot.dtype == torch.uint8 else slot

    def get_master(self, var: Tensor) -> Tensor:
        """What a variable stands for under its precision policy, float32, in its shape; the variable itself if it has no master.

        KeyError before its first step.
        """
        var = self._kept_for(var)
        if self._state.built_as(var) is None:
            raise KeyError(f"This variable {tuple(var.shape)} has no slots yet. Take a step, or build() first.")
        return self._read(var)[0]

    def _read(self, var: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        bucket = self._state.bucket(var)
        parts = {name: view for name, views in bucket.views.items() if (view := views[bucket.index[id(var)]]) is not None}
        return bucket.policy.read(self._all_slots(), var, parts)  # type: ignore[no-any-return]

    def set_precision(self, variables: Iterable[Tensor], policy: str | Precision) -> None:
        """Give some variables a precision policy of their own: a name, or a `fused_kopt.Precision`. They are then a bucket of their own.

        Raises ValueError where the policy has no meaning for a variable, or the variable has slots already; TypeError for other types.
        """
        wanted, given = precision.get(policy), list(variables)
        for position, variable in enumerate(given):
            wanted.check(variable.dtype, slots.flatten(self._all_slots()), f"variable {position} {tuple(variable.shape)}")
            if self._state.built_as(self._kept_for(variable)) is not None:
                raise ValueError(
                    f"Variable {position} {tuple(variable.shape)} has slots already. Call set_precision() before its first step."
                )
        with self._lock:
            self._state.policies |= {id(variable): (variable, wanted) for variable in given}
            self._repeats, self._replays = Repeats(), None

    def add_slot(self, var: Tensor, slot_name: str, initializer: state.Initializer = "zeros", shape: Sequence[int] | None = None) -> Tensor:
        """The slot of a variable, created if it does not exist and appended to `weights`.

        initializer: "zeros", "ones", a number, a tensor or a callable of (shape, dtype=). shape: default the variable's.
        """
        with self._lock, torch.inference_mode(False):
            return self._state.add_slot(self._kept_for(var), Slot(slot_name), shape, initializer)

    def _check_known(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        for position, (_, variable) in enumerate(pairs):
            was = self._state.built_as(variable)
            now = (tuple(variable.shape), variable.dtype, variable.device)
            if was not in (None, now):
                what = gradients.name(variable, position)
                raise StaleVariableError(f"{what} was {was} when its slots were made and is {now} now. Use a new optimizer for it.")

    def _check_precision(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Raises ValueError for a policy without meaning for a variable, TypeError for a sparse gradient that it cannot serve."""
        for position, (gradient, variable) in enumerate(pairs):
            policy, what = self._state.key(variable)[2], gradients.name(variable, position)
            policy.check(variable.dtype, slots.flatten(self._all_slots()), what)
            if gradient.layout != torch.strided and policy.groups(variable.dtype, self._all_slots()) != self._all_slots():
                raise TypeError(
                    f"The gradient of {what} is sparse, which {policy} does not serve. Use precision='float32' for this variable."
                )
            if gradient.layout != torch.strided and self.ema_momentum is not None:
                raise TypeError(f"The gradient of {what} is sparse, and an average moves all rows. Use Embedding(sparse=False).")

    def _stored_rule(self, dtype: torch.dtype, policy: Precision) -> Rule:
        """The rule on what a policy stores."""
        rule = self.rule() if self.ema_momentum is None else options.around(options.averaged, self.rule())
        return policy.rule(dtype, slots.flatten(self._all_slots()), rule)
