"""Nadam."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self, Unpack

from fused_kopt import layout, op
from fused_kopt.execute import Rule
from fused_kopt.hyperparameters import Hyperparameter, Options, Step, fuzz, is_schedule
from fused_kopt.optimizer import Optimizer
from fused_kopt.slots import Slot, SlotGroups


class Scalars(NamedTuple):
    learning_rate: float
    beta_1: float
    beta_2: float
    one_minus_beta_1: float
    one_minus_beta_2: float
    one_minus_momentum: float
    next_momentum: float
    one_minus_cache: float
    one_minus_next_cache: float
    one_minus_beta_2_power: float
    epsilon: float


def nadam(p, g, slots, s):
    m, v = slots
    m = m * s.beta_1 + g * s.one_minus_beta_1
    v = v * s.beta_2 + g * g * s.one_minus_beta_2
    mean = op.div(g, s.one_minus_cache) * s.one_minus_momentum + op.div(m, s.one_minus_next_cache) * s.next_momentum
    return p - op.div(mean * s.learning_rate, op.sqrt(op.div(v, s.one_minus_beta_2_power)) + s.epsilon), (m, v)


class Momenta(NamedTuple):
    """The momenta mu of a step and of the next, and the product of all so far, in the step's dtype."""

    now: Any
    following: Any
    cache: Any


def momenta(step: Step, beta_1: Any, decay: float, cache: Any) -> Momenta:
    """A step's momenta. cache: the product before it, in the step's dtype."""
    beta_1, base, decay = step.number(beta_1), step.number(0.96), step.exact(decay)
    now, following = (beta_1 * (1 - step.exact(0.5) * step.power(base, decay * (step.t + i))) for i in (0, 1))
    return Momenta(now, following, cache * now)


def derive(step: Step, rate: Any, betas: tuple[Any, Any], epsilon: float, momenta: Momenta) -> Scalars:
    """A step's scalars. rate: its learning rate, in the step's dtype."""
    beta_1, beta_2 = map(step.number, betas)
    return Scalars(
        learning_rate=rate,
        beta_1=beta_1,
        beta_2=beta_2,
        one_minus_beta_1=1 - beta_1,
        one_minus_beta_2=1 - beta_2,
        one_minus_momentum=1 - momenta.now,
        next_momentum=momenta.following,
        one_minus_cache=1 - momenta.cache,
        one_minus_next_cache=1 - momenta.cache * momenta.following,
        one_minus_beta_2_power=1 - step.power(beta_2, step.t),
        epsilon=step.exact(epsilon),
    )


class Nadam(Optimizer):
    """Adam with Nesterov momentum and a momentum schedule `mu_t = beta_1 * (1 - 0.5 * 0.96^(schedule_decay * t))`.

    With `cache` the product of all mu so far: `w -= lr * ((1 - mu_t) * g / (1 - cache) + mu_{t+1} * m / (1 - cache *
    mu_{t+1})) / (sqrt(v / (1 - beta_2^t)) + epsilon)`. The cache is one scalar, `weights[1]`, in the compute dtype of the
    first call's first variable; a call without a variable of that dtype leaves it. A sparse gradient decays the slots of
    all rows and moves the touched ones. Slots: `m` (0), `v` (0).

    Args:
        learning_rate: number, 0-d tensor or callable; a schedule raises ValueError, and `decay` has no effect, as in
            Keras. Default 0.001.
        beta_1, beta_2: decay of the averages, in [0, 1). Defaults 0.9, 0.999.
        epsilon: default 1e-7, which 0 and None mean as well.
        name: default "Nadam".
        schedule_decay: default 0.004. get_config calls it `decay`, as Keras's does; from_config restores it, Keras's does not.
        **options: see fused_kopt.optimizer.Optimizer.

    Source: Keras OptimizerV2; Dozat, Incorporating Nesterov momentum into Adam, 2015.
    """

    sparse_rows = "state"
    carries = True
    beta_1 = Hyperparameter(0.0, 1.0)
    beta_2 = Hyperparameter(0.0, 1.0)

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: float | None = 1e-7,
        name: str | None = "Nadam",
        *,
        schedule_decay: float = 0.004,
        **options: Unpack[Options],
    ) -> None:
        _refuse_schedule(learning_rate)
        options["decay"] = schedule_decay  # a user's decay is discarded, as in Keras
        super().__init__(name, learning_rate, options)
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = fuzz(epsilon)
        self._cache: Tensor | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Self:
        """An optimizer from get_config's dict; its `decay` is `schedule_decay`."""
        config = dict(config)
        if "decay" in config:
            config["schedule_decay"] = config.pop("decay")
        return super().from_config(config, custom_objects)

    def slot_groups(self) -> SlotGroups:
        return ((Slot("m"),), (Slot("v", positive=True),))

    def rule(self) -> Rule:
        return nadam

    def _new_weights(self, variables: Sequence[Tensor]) -> list[Tensor]:
        if self._cache is not None and any(weight is self._cache for weight in self.weights):
            return []
        # IndexError for an empty first call, as in Keras
        self._cache = torch.ones((), dtype=layout.compute_dtype(variables[0].dtype), device="cpu")
        return [self._cache]

    def scalars(self, step: Step) -> Scalars:
        rate = self.learning_rate
        _refuse_schedule(rate)
        beta_1 = self.beta_1
        found = momenta(step, beta_1, self._initial_decay, step.number(1.0 if self._cache is None else self._cache))
        step.cache = found.cache
        return derive(step, step.learning_rate(rate, 0.0), (beta_1, self.beta_2), self.epsilon, found)

    def _commit(self, steps: Mapping[torch.dtype, Step]) -> None:
        if self._cache is not None and self._cache.dtype in steps:
            self._cache.fill_(float(steps[self._cache.dtype].cache))

    def get_config(self) -> dict[str, Any]:
        return self._config(beta_1=self._value("beta_1"), beta_2=self._value("beta_2"), epsilon=self.epsilon)


def _refuse_schedule(learning_rate: Any) -> None:
    if is_schedule(learning_rate):
        raise ValueError(f"Nadam does not support schedules as learning rate. Received: {type(learning_rate).__name__}. Use a callable.")
