"""The step that all optimizers share: Keras's order of operations, in fused launches."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import torch
from torch import Tensor

from fused_kopt import description, gradients, options
from fused_kopt.borrowed import Borrowed, Borrower
from fused_kopt.clipping import Clips
from fused_kopt.description import Description
from fused_kopt.execute import EXECUTORS, Executor
from fused_kopt.keras import plan as plans
from fused_kopt.keras.declaration import Declaration, Step, constant, divide
from fused_kopt.keras.host import Host, in_stateless_scope
from fused_kopt.keras.plan import Averages, Plan, values
from fused_kopt.recording import Recorder

LAST = 2**31 - 1  # Keras counts steps in int32
KEPT = 8  # plans: the whole model, and subsets that come again


class Momentum(NamedTuple):
    average: float
    one_minus_average: float


class Nothing(NamedTuple):
    one: float


def average(p, g, slots, s):
    """p is the average, g the variable."""
    return p * s.average + g * s.one_minus_average, ()


def accumulate(p, g, slots, s):
    """p is the accumulator."""
    return p + g, ()


class Stepper:
    """Steps of one Keras optimizer.

    stock: the `apply` of the class below, for what fused launches cannot do: steps under a StatelessScope, and variables that
    are not plain local tensors of floating-point dtypes (meta, DTensor, complex).
    """

    def __init__(self, optimizer: Any, declaration: Declaration, stock: Callable[[Any, Any], None]) -> None:
        self.optimizer, self.declaration, self._stock = optimizer, declaration, stock
        self._host, self.recorder = Host(), Recorder()
        self._updates, self._accumulation, self._averaging = Borrower(), Borrower(), Borrower()
        self._plans: dict[Any, Plan] = {}
        self._overwrites: bool | None = None  # whether any variable takes its gradient as its value (fp8 scales)

    @torch.compiler.disable
    def apply(self, grads: Any, trainable_variables: Any = None, unscale: float | None = None) -> None:
        """`Optimizer.apply`. unscale: what the gradients are divided by, if not by the optimizer's loss_scale_factor."""
        if len(grads) == 0:
            return
        variables = self._variables(grads, trainable_variables)
        self._executor()
        if in_stateless_scope():
            return self._apply_stock(grads, variables, unscale)
        given, present = _present(grads, variables)
        if self._overwrites is None:
            self._overwrites = any(map(self.optimizer._overwrite_variable_with_gradient, self.optimizer._trainable_variables))
        if self._overwrites:
            given, present = self.optimizer._overwrite_variables_directly_with_gradients(given, present)
        if given:
            plan = self._plan(present)
            if not plan.supported:
                return self._apply_stock(grads, variables, unscale)
            self._step(plan, plans.tensors_of(given), self.optimizer.loss_scale_factor if unscale is None else unscale)
            for variable in [v for v in present if v._constraint is not None]:
                variable.assign(variable.constraint(variable))
        self._host.write(self.optimizer._iterations, self._count() + 1)

    def describe(self, variables: Any = None) -> Description:
        """See `Fused.describe`."""
        optimizer = self.optimizer
        chosen = list(optimizer._trainable_variables if variables is None else variables)
        if not chosen:
            raise ValueError(
                "There is nothing to describe before the optimizer is built. Pass variables: describe(model.trainable_variables)."
            )
        self._executor()
        given = values(v for v in chosen if not optimizer._overwrite_variable_with_gradient(v))
        pairs = gradients.check([(v.detach() if v.grad is None else v.grad, v) for v in given])
        slots = tuple(name.strip("_") for name in self.declaration.slots(optimizer)) + ("averages",) * optimizer.use_ema
        return description.describe(optimizer.name, pairs, slots, self._updates.executor, self._clips(1.0), alignment=1)

    def _variables(self, grads: Sequence[Any], given: Any) -> list[Any]:
        """The variables of a call; builds the optimizer on its first. Raises ValueError where there are not as many as gradients."""
        optimizer = self.optimizer
        if given is None:
            if not optimizer.built:
                raise ValueError(
                    "When passing `grads` without `variables`, the optimizer must already be built on a list of variables. "
                    "Call `optimizer.build(trainable_variables)` first."
                )
            variables = optimizer._trainable_variables
        else:
            variables = list(given)
        if len(grads) != len(variables):
            raise ValueError(f"The gradients must match the variables one-to-one. Received: {len(grads)} for {len(variables)} variables.")
        if not optimizer.built:
            with keras.name_scope(optimizer.name, caller=optimizer):
                optimizer.build(variables)
            optimizer.built = True
        return list(variables)

    def _executor(self) -> None:
        executor: Executor = getattr(self.optimizer, "executor", "auto")
        if executor not in EXECUTORS:
            raise ValueError(f"`executor` must be one of {EXECUTORS}. Received: executor={executor!r}.")
        self.recorder.every = getattr(self.optimizer, "stats_every", 0)
        for borrower in (self._updates, self._accumulation, self._averaging):
            borrower.executor = executor

    def _apply_stock(self, grads: Any, variables: Any, unscale: float | None) -> None:
        if unscale is not None:
            overwrites = self.optimizer._overwrite_variable_with_gradient
            grads = [g if g is None or overwrites(v) else g / unscale for g, v in zip(grads, variables, strict=True)]
        self._stock(grads, variables)

    def _plan(self, variables: Sequence[Any]) -> Plan:
        optimizer = self.optimizer
        slots = self.declaration.slots(optimizer)
        key = tuple(map(id, variables)), slots, optimizer.use_ema, bool(optimizer.weight_decay)
        plan = self._plans.get(key)
        if plan is None or plan.exclusions is not getattr(optimizer, "_exclude_from_weight_decay_cache", None):
            plan = plans.make(optimizer, variables, slots)
            if len(self._plans) >= KEPT:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def _count(self) -> int:
        """Calls so far. Raises OverflowError where Keras's counter ends; stock Keras goes on with negative numbers and NaN."""
        count = int(self._host.read(self.optimizer._iterations))
        if count >= LAST:
            raise OverflowError(
                f"The optimizer {self.optimizer.name!r} has counted {LAST:,} steps: there Keras's int32 ends. Nothing was updated. "
                "Set a lower count, optimizer.iterations.assign(n): from n = 100,000 on only schedules depend on it."
            )
        return count

    def _step(self, plan: Plan, grads: list[Tensor], scale: Any) -> None:
        """Accumulate, or clip, decay, update and average."""
        optimizer, count = self.optimizer, self._count()
        every = optimizer.gradient_accumulation_steps or 1
        step = Step(self._rate(), count // every + 1, self._host.read)
        unscale = 1.0 if scale is None else divide(1.0, float(scale))
        targets = plan.absent
        if every == 1:
            self._update(plan, grads, step, self._clips(unscale))
        else:
            sums = values(plan.accumulators)
            given = Borrowed(sums, grads, [], plan.names)
            self._accumulation.step(accumulate, given, constant(Nothing(1.0)), Clips(unscale, None, None, None))
            if (count + 1) % every == 0:
                self._update(plan, [total.detach() for total in sums], step, self._clips(1.0 / every))
                with torch.no_grad():
                    torch._foreach_zero_(values(a for a in optimizer._accumulated_gradients if a is not None))
            else:
                targets = plans.averaged(optimizer, set())
        if optimizer.use_ema:
            self._average(targets, step)

    def _update(self, plan: Plan, grads: list[Tensor], step: Step, clips: Clips) -> None:
        """The rule, with decay before it and the average behind it: one launch per device and dtypes."""
        optimizer, declaration = self.optimizer, self.declaration
        scalars, rule = declaration.scalars(optimizer, step), declaration.rule(optimizer)
        carried = declaration.carried(optimizer, step)
        names: list[str] = []
        rows: Sequence[tuple[float, ...]] = [()]
        if plan.decays:
            rule, names = options.around(options.decayed, rule), ["decay"]
            rows = [(1 - optimizer.weight_decay * step.rate,), (1.0,)][: 1 if plan.which is None else 2]
        if optimizer.use_ema:
            rule, names = options.around(options.averaged, rule), [*names, *Momentum._fields]
            rows = [row + self._momentum(step) for row in rows]
        plain: Any = type(scalars)
        kind = options.extended(plain, *names) if names else plain
        given = Borrowed(values(plan.variables), grads, [values(column) for column in plan.slots], plan.names, plan.which)
        sums = self.recorder.start(step.t)
        self._updates.step(rule, given, constant(*(kind(*scalars, *row) for row in rows)), clips, declaration.exact(optimizer), sums)
        if sums is not None:
            self.recorder.finish(sums, step.rate, self._count() + 1)
        for variable, value in carried:
            self._host.write(variable, value)

    def _average(self, targets: Averages, step: Step) -> None:
        """Average what no update averaged; overwrite the variables with their averages when it is time."""
        optimizer = self.optimizer
        if targets.variables:
            given = Borrowed(values(targets.averages), [v.detach() for v in values(targets.variables)], [])
            self._averaging.step(average, given, constant(self._momentum(step)))
        if optimizer.ema_overwrite_frequency and step.t % optimizer.ema_overwrite_frequency == 0:
            all_ = plans.averaged(optimizer, set())
            with torch.no_grad():
                torch._foreach_copy_(values(all_.variables), values(all_.averages))

    def _momentum(self, step: Step) -> Momentum:
        """Keras's average starts as a copy of the variable."""
        momentum = self.optimizer.ema_momentum if step.t > 1 else 0.0
        return Momentum(momentum, 1 - momentum)

    def _rate(self) -> float:
        rate = self.optimizer._learning_rate
        return self._host.read(rate) if isinstance(rate, keras.Variable) else float(self.optimizer.learning_rate)

    def _clips(self, scale: float) -> Clips:
        """Keras's one branch: a limit that is None, NaN or not positive is off."""
        optimizer = self.optimizer
        limits = (optimizer.clipnorm, optimizer.global_clipnorm, optimizer.clipvalue)
        norm, together, value = (float(limit) if limit and limit > 0 else None for limit in limits)
        if norm is not None:
            return Clips(scale, None, norm, None)
        return Clips(scale, None, None, together) if together is not None else Clips(scale, value, None, None)


def _present(grads: Sequence[Any], variables: list[Any]) -> tuple[Sequence[Any], list[Any]]:
    """Those with a gradient. Raises ValueError where there is none, warns where some are missing, in Keras's words."""
    missing = [v.path for g, v in zip(grads, variables, strict=True) if g is None]
    if not missing:
        return grads, variables
    if len(missing) == len(grads):
        raise ValueError(f"No gradients provided for any variable: {missing}.")
    warnings.warn(
        f"Gradients do not exist for variables {missing} when minimizing the loss. If using `model.compile()`, did you forget to "
        "provide a `loss` argument?",
        stacklevel=4,
    )
    kept = [(g, v) for g, v in zip(grads, variables, strict=True) if g is not None]
    return [g for g, _ in kept], [v for _, v in kept]
