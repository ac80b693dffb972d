"""What an optimizer declares, a rule and its scalars, and what a step makes of these."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from fused_kopt import hyperparameters, options
from fused_kopt.execute import Rule, Update
from fused_kopt.hyperparameters import Step
from fused_kopt.precision import Precision
from fused_kopt.repeat import Scalars
from fused_kopt.stored import Stored


class Declared(Stored):
    """The part of Optimizer that subclasses fill, and what a step's numbers are."""

    exact: ClassVar[bool] = True  # False where the rule has a general power, in which executors differ by up to 2 ulp
    carries: ClassVar[bool] = False  # whether scalars depend on more of earlier steps than their number

    def sparse_rule(self, rank: int) -> Rule:
        """The rule for sparse gradients of a variable of `rank` dimensions, where Keras's operation order differs there."""
        return self.rule()

    @abstractmethod
    def scalars(self, step: Step) -> Sequence[Any]:
        """A NamedTuple of the step's scalars, computed in `step.dtype`."""

    def _rate(self, step: Step) -> Any:
        """This step's learning rate: schedule or value, divided by 1 + decay * iterations."""
        return step.learning_rate(self.learning_rate, self._initial_decay)

    def _scalars(self, key: tuple[torch.dtype, Precision], steps: dict[torch.dtype, Step]) -> tuple[Any, dict[int, Any]]:
        """This step's scalars in a compute dtype under a policy, and by id those of variables with a learning rate of their own.

        `steps` receives what they were derived in.
        """
        compute, policy = key
        count = self._state.steps_taken()
        found: dict[float, Any] = {}
        with hyperparameters.ieee():
            for multiplier in dict.fromkeys([1.0, *(m for _, m in self._multipliers.values())]):
                step = Step(count, compute, multiplier)
                scalars: Any = self.scalars(step)
                found[multiplier] = policy.extended(self._averaging(scalars._make(map(float, scalars)), step), count)
                steps.setdefault(compute, step)
        return found[1.0], {key: found[m] for key, (_, m) in self._multipliers.items()}

    def _averaging(self, scalars: Any, step: Step) -> Any:
        """The scalars, with those of the average."""
        if self.ema_momentum is None:
            return scalars
        momentum = step.number(self.ema_momentum)
        kind: Any = type(scalars)
        return options.extended(kind, "average", "one_minus_average")(*scalars, float(momentum), float(1 - momentum))

    def _scalars_of(self, updates: Sequence[Update], steps: dict[torch.dtype, Step]) -> Callable[[Update], Scalars]:
        """A function that gives an update's scalars in this step."""
        found = {key: self._scalars(key, steps) for key in dict.fromkeys((u.bucket.compute, u.bucket.policy) for u in updates)}

        def scalars(update: Update) -> Scalars:
            common, own = found[(update.bucket.compute, update.bucket.policy)]
            return common, [own.get(id(v), common) for v in update.bucket.variables] if update.rows is not None else None

        return scalars
