"""The abstract Optimizer: OptimizerV2's steps over the fused engine."""

import contextlib
import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fused_kopt import execute, gradients, hyperparameters, slots, tape, updates, verification
from fused_kopt.buffers import Bucket
from fused_kopt.contract import Contract
from fused_kopt.errors import StaleVariableError, TornStepError
from fused_kopt.execute import Chosen, Executor, Rule
from fused_kopt.hyperparameters import Step
from fused_kopt.updates import Entry, Launch, Recipe, SparseRows


class Prepared(NamedTuple):
    """A step, worked out but not begun."""

    entries: list[Entry]
    variables: list[Tensor]  # distinct, in order of first appearance
    recipes: dict[tuple[torch.device, torch.dtype], Recipe]
    executors: dict[torch.device, Chosen]
    steps: dict[torch.dtype, Step]


class Optimizer(Contract):
    """Base of all optimizers. A subclass declares hyperparameters, slots, scalars and one rule; all else is here.

    Options that every optimizer accepts, besides its own arguments (OptimizerV2's, then ours):
        clipvalue, clipnorm, global_clipnorm: limits >= 0 on gradient elements, on each gradient's norm, on the norm of
            all; applied inside the launch, in this order. `clipnorm` and `global_clipnorm` exclude each other.
        decay: the learning rate is divided by `1 + decay * iterations`. Default 0.
        lr: old name of `learning_rate`; wins over it.
        gradient_aggregator: function of the (gradient, variable) pairs that returns them summed over the replicas.
            Default: the sum over torch.distributed's ranks.
        gradient_transformers: functions from pairs to pairs, applied after aggregation.
        executor: "auto" (triton on a GPU; on CPU compiled for large variables, else the reference), "reference", "triton"
            or "compiled".
        verify_every: every so many steps, run the step on copies through the reference as well and raise
            FusedMismatchError on any difference, before anything is written. Default 0: never.

    Raises TypeError for unknown options, ValueError for negative or contradictory ones. Steps of several threads queue.
    """

    sparse_rows: ClassVar[SparseRows] = "touched"
    exact: ClassVar[bool] = True  # False where the rule has a general power, in which executors differ by up to 2 ulp

    @abstractmethod
    def rule(self) -> Rule:
        """The update rule of this configuration: a module-level function."""

    def sparse_rule(self, rank: int) -> Rule:
        """The rule for sparse gradients of a variable of `rank` dimensions, where Keras's operation order differs there."""
        return self.rule()

    @abstractmethod
    def scalars(self, step: Step) -> Sequence[Any]:
        """A NamedTuple of the step's scalars, computed in `step.dtype`."""

    def _rate(self, step: Step) -> Any:
        """This step's learning rate: schedule or value, divided by 1 + decay * iterations."""
        return step.learning_rate(self.learning_rate, self._initial_decay)

    def _new_weights(self, variables: Sequence[Tensor]) -> list[Tensor]:
        """Weights besides the slots that the first step creates, before them (Nadam's momentum cache)."""
        return []

    def _commit(self, steps: Mapping[torch.dtype, Step]) -> None:
        """Called once after all launches of a step, before `iterations` grows; `steps` by compute dtype."""

    def apply_gradients(
        self,
        grads_and_vars: Iterable[tuple[Any, Tensor]],
        name: str | None = None,
        experimental_aggregate_gradients: bool = True,
    ) -> Tensor | None:
        """Update variables in place; one fused launch per device and dtype.

        Args:
            grads_and_vars: (gradient, variable) pairs. Gradients: tensors (strided, or sparse COO over rows), arrays or
                None. Variables: float16, bfloat16, float32 or float64 leaves. Pairs without gradient are skipped with a
                logged warning. The same variable twice is updated twice, in order.
            name: ignored, as in Keras's eager mode.
            experimental_aggregate_gradients: whether to call the gradient aggregator first.

        Returns:
            `iterations` after the step; None for an empty list, which is no step.

        Raises:
            ValueError: all gradients are None; shapes or devices differ; memory overlaps.
            TypeError: malformed pairs, dtypes that are not floating, tensors without storage.
            RuntimeError: the call cannot aggregate here, runs inside another step or a CUDA graph capture.
            StaleVariableError, TornStepError, FusedMismatchError: see fused_kopt.errors.
            No value has changed after any of these, except what a TornStepError reports. Slots of a first step may exist after
            a FusedMismatchError or a kernel that does not build, at their initial values.
        """
        with self._one_step():
            pairs = gradients.check(gradients.present(grads_and_vars))
            self._check_known(pairs)
            pairs = self._transform(pairs, experimental_aggregate_gradients) if pairs else pairs
            if not pairs:
                self._begin([])
                return None
            return self._apply(pairs)

    def build(self, variables: Iterable[Tensor]) -> None:
        """Create iterations, hyperparameters and the slots of `variables` before the first step, so that set_weights can run.

        The weights are then those of a first step on `variables` in this order. Source: Keras's `_create_all_weights`.
        Raises what `apply_gradients` raises for a variable.
        """
        with self._one_step():
            pairs = gradients.check([(v.detach(), v) for v in tape.flatten(variables)])
            self._check_known(pairs)
            self._begin(list({id(v): v for _, v in pairs}.values()))

    def minimize(
        self,
        loss: Tensor | Callable[[], Tensor],
        var_list: Any,
        grad_loss: Tensor | None = None,
        name: str | None = None,
        tape: "tape.GradientTape | None" = None,
    ) -> Tensor | None:
        """Compute gradients of `loss` with respect to `var_list` and apply them.

        Args:
            loss: a callable without arguments that returns the loss, or the loss itself, which needs its `tape`.
            var_list: a variable, a nested list of them, or a callable that returns one.
            grad_loss: what the backward pass starts from, in the loss's shape. Default: ones.
            tape: the GradientTape that recorded `loss`.

        Raises ValueError where `var_list` is None, a tensor loss lacks its tape, or no variable has a gradient.
        """
        return self.apply_gradients(self._compute_gradients(loss, var_list, grad_loss, tape), name=name)

    def _compute_gradients(
        self, loss: Any, var_list: Any, grad_loss: Any = None, recorded: Any = None
    ) -> list[tuple[Tensor | None, Tensor]]:
        return tape.gradients_of(loss, var_list, grad_loss, recorded)

    def get_gradients(self, loss: Tensor, params: Any) -> list[Tensor]:
        """The gradients of `loss`; ValueError where a variable has none."""
        variables = tape.flatten(params)
        return tape.required_gradients(loss, variables)

    @contextlib.contextmanager
    def _one_step(self) -> Iterator[None]:
        with self._lock, torch.inference_mode(False):
            if self._stepping:
                raise RuntimeError("re-entrant apply_gradients: something called it during a step of the same optimizer.")
            if self._torn:
                raise TornStepError("An earlier step was interrupted between launches. Restore the variables, then call set_weights().")
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("A step in a CUDA graph would replay this step's scalars for ever. Call it outside the capture.")
            self._stepping = True
            try:
                yield
            finally:
                self._stepping = False

    def _check_known(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        for position, (_, variable) in enumerate(pairs):
            was = self._state.built_as(variable)
            now = (tuple(variable.shape), variable.dtype, variable.device)
            if was not in (None, now):
                what = gradients.name(variable, position)
                raise StaleVariableError(f"{what} was {was} when its slots were made and is {now} now. Use a new optimizer for it.")

    def _transform(self, pairs: list[tuple[Tensor, Tensor]], aggregated: bool) -> list[tuple[Tensor, Tensor]]:
        """Aggregation, then the transformers; what they return is checked like what the caller passed."""
        given: Iterable[Any] = pairs
        for transform in [self._aggregator] * aggregated + self._transformers:
            given = transform(given)
        if given is pairs:
            return pairs
        pairs = gradients.check(gradients.present(given))
        self._check_known(pairs)
        return pairs

    def _apply(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        with hyperparameters.restored_on_error(self):
            prepared = self._prepare(pairs)
            verifying = self.verify_every and (self._state.steps_taken() + 1) % self.verify_every == 0
            self._begin(prepared.variables)
        for launches in self._rounds(prepared):
            jobs = [(launch.update, prepared.executors[launch.update.bucket.device]) for launch in launches]
            jobs = [(update, verification.proven(update, executor, self._executor)) for update, executor in jobs]
            if verifying:
                verification.check(jobs, "Earlier gradients of this call were applied." if self._torn else "Nothing was written.")
            self._torn = True
            updates.run(launches, [executor for _, executor in jobs])
        torch.autograd.graph.increment_version(prepared.variables)
        self._commit(prepared.steps)
        self.iterations.add_(1)
        self._torn = False
        return self.iterations

    def _compare(self, pairs: Sequence[tuple[Any, Tensor]], executor: Executor, aggregated: bool) -> list[verification.Comparison]:
        """What `fused_kopt.verify` reports: this step's launches on a copy of the optimizer and the variables."""
        memo: dict[int, Any] = {}
        with self._one_step():
            checked = gradients.check(gradients.present(pairs))
            self._check_known(checked)
            twin = copy.deepcopy(self, memo)
        checked = [(g, copy.deepcopy(v, memo)) for g, v in checked]
        prepared = twin._prepare(twin._transform(checked, aggregated))
        twin._begin(prepared.variables)
        found = []
        for launches in twin._rounds(prepared):
            for launch in launches:
                chosen = execute.choose(executor, launch.update.bucket.device, launch.update.bucket.segments[-1].end)
                found += verification.compare_updates(launch.update, chosen)
            updates.run(launches, ["reference"] * len(launches))
        return found

    def _prepare(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Prepared:
        """All that a step needs to know before anything is created."""
        rows = gradients.clip_factors(pairs, self._clips, self.grad_scale)
        entries = [Entry(g, v, row) for (g, v), row in zip(pairs, rows, strict=True)]
        variables = list({id(v): v for _, v in pairs}.values())
        steps: dict[torch.dtype, Step] = {}
        recipes = {key: self._recipe(key, steps) for key in dict.fromkeys((v.device, v.dtype) for v in variables)}
        executors = {device: execute.choose(self._executor, device, sum(v.numel() for v in variables)) for device, _ in recipes}
        return Prepared(entries, variables, recipes, executors, steps)

    def _rounds(self, prepared: Prepared) -> Iterator[list[Launch]]:
        with torch.no_grad():
            for entries in updates.rounds(prepared.entries, self._state):
                yield updates.plan(entries, self._state, lambda bucket: prepared.recipes[(bucket.device, bucket.dtype)])

    def _recipe(self, key: tuple[torch.device, torch.dtype], steps: dict[torch.dtype, Step]) -> Recipe:
        hyperparameters.create(self)
        compute = Bucket(*key).compute
        step = steps[compute] = Step(self._state.steps_taken(), compute)
        with hyperparameters.ieee():
            scalars = self.scalars(step)
        floats = type(scalars)(*(float(x) for x in scalars))
        return Recipe(slots.flatten(self.slot_groups()), self.rule(), self.sparse_rule, self.sparse_rows, floats, self.exact)

    def _begin(self, variables: Sequence[Tensor]) -> None:
        """Create what the first step creates: hyperparameters, iterations, slots."""
        weights = self._new_weights(variables)
        hyperparameters.create(self)
        self._state.ensure(variables, self.slot_groups(), weights, counted=True)
