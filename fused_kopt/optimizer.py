"""The abstract Optimizer: OptimizerV2's public methods over the fused engine."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from fused_kopt import description, execute, gradients, planes, tape, updates, verification
from fused_kopt.description import Description
from fused_kopt.engine import Engine
from fused_kopt.execute import Executor
from fused_kopt.flat import Flat
from fused_kopt.recording import StepStats
from fused_kopt.repeats import Repeats
from fused_kopt.replays import Replays


class Optimizer(Engine):
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
        precision: how variables, their masters and their slots are stored: a name ("float32", "bf16_master", "bf16_split", "bf16_kahan",
            "bf16_stochastic", "bf16_8bit") or a `fused_kopt.Precision`. Default "float32"; `set_precision` for single variables.
        verify_every: every so many steps, run the step on copies through the reference as well and raise
            FusedMismatchError on any difference, before anything is written. Default 0: never.
        stats_every: every so many steps, the launch adds up what `last_stats` returns. Default 0: never.
        ema_momentum: in [0, 1]; the launch keeps an exponential average of every variable as its last slot, `average`, which
            starts as a copy of the variable and is `finalize_variable_values`'s. Default None: no average.

    Raises TypeError for unknown options, ValueError for negative or contradictory ones. Steps of several threads queue.
    """

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
            RankMismatchError, PeerError: ranks are about to take different steps; one of them failed.
            StaleVariableError, TornStepError, FusedMismatchError: see fused_kopt.errors.

        No value has changed after any of these, except what a TornStepError reports. Slots of a first step may exist after
        a FusedMismatchError or a kernel that does not build, at their initial values.
        """
        stages = self._at_work(experimental_aggregate_gradients)
        return self._through(stages, grads_and_vars, experimental_aggregate_gradients)

    def flatten(self, variables: Iterable[Tensor]) -> Flat:
        """Move variables and their gradients into flat buffers, as views: a step updates each buffer as one segment.

            flat = optimizer.flatten(model.parameters())
            for x, y in batches:
                flat.zero_grad()
                loss(model(x), y).backward()
                optimizer.apply_gradients(flat)

        The price: gradients are always there, so that autograd adds to them instead of handing over its own (16 bytes more per
        float32 element; none where gradients are accumulated anyway). After `zero_grad(set_to_none=True)` a step borrows what
        autograd made. What `torch.save` writes of a part of the model contains the whole buffer. A variable that is moved
        (`.data =`, `.to()`) keeps training from its new memory, and one warning says so. `flat.restore()` undoes it all.

        Raises what `apply_gradients` raises for a variable, and ValueError for one whose memory is shared with anything else:
        other processes, another tensor, a second Flat.
        """
        return Flat(tape.flatten(variables))

    def scale_learning_rate(self, variables: Iterable[Tensor], multiplier: float) -> None:
        """Multiply the learning rate of some variables, for layer-wise rates; 0 lets SGD rest. No launch is added.

        Keras has no counterpart; `get_config` does not contain it. Raises ValueError unless `multiplier` is finite and >= 0.
        """
        if not 0 <= multiplier < math.inf:
            raise ValueError(f"`multiplier` must be a finite number >= 0. Received: multiplier={multiplier!r}.")
        with self._lock:
            self._multipliers |= {id(v): (v, float(multiplier)) for v in tape.flatten(variables)}
            self._repeats, self._replays = Repeats(), None

    def prepare_replays(self, grads_and_vars: Flat | Iterable[tuple[Tensor, Tensor]], steps: int = 1024) -> None:
        """Let a CUDA graph capture `apply_gradients(grads_and_vars)`: the scalars of the next `steps` steps go to the device.

        Take at least one step with these gradients and variables first, which must keep their memory. A captured step takes
        the next scalars at every replay; schedules, decay and bias corrections go on, bit for bit as in steps outside a graph.
        Tell the optimizer about replays with `replayed`. A hyperparameter that changes counts from the next `replayed` on.
        With global_clipnorm or clipnorm, the norms are part of the graph.

        Raises ValueError unless `steps` is at least 1; RuntimeError where no such step has been taken, or one that cannot be
        repeated (sparse gradients, transformers, a gradient aggregator at work, `verify_every`, the reference executor).
        """
        if steps < 1:
            raise ValueError(f"`steps` must be at least 1. Received: steps={steps}.")
        with self._one_step():
            given = grads_and_vars if isinstance(grads_and_vars, Flat) else gradients.flattened(grads_and_vars)[1]
            repeat = self._known(given, aggregated=True)
            if repeat is None:
                raise RuntimeError(
                    "No step like this one can be repeated. Take one with these gradients and variables first, on a fused executor."
                )
            self._replays = Replays(self, repeat, steps)

    def replayed(self, count: int = 1) -> None:
        """Count `count` replays of a captured step, and upload the scalars of later ones before they run out.

        With 0: upload them anew, after a hyperparameter has changed. Raises RuntimeError without `prepare_replays`, and where
        more were replayed than its `steps`: the others repeated the last one's scalars.
        """
        with self._one_step():
            if self._replays is None or count > self._replays.left:
                left = 0 if self._replays is None else self._replays.left
                raise RuntimeError(f"{count} replays, but scalars for {left} were prepared. Call prepare_replays() with more steps.")
            self._replays.count(count)

    def build(self, variables: Iterable[Tensor]) -> None:
        """Create iterations, hyperparameters and the slots of `variables` before the first step, so that set_weights can run.

        The weights are then those of a first step on `variables` in this order. Source: Keras's `_create_all_weights`.
        Raises what `apply_gradients` raises for a variable.
        """
        with self._one_step():
            pairs = gradients.check([(v.detach(), v) for v in tape.flatten(variables)])
            self._check_known(pairs)
            self._check_precision(pairs)
            mine: Sequence[Tensor] = list({id(v): v for _, v in pairs}.values())
            for stage in self._stages:
                mine = stage.settle(self, mine)
            self._begin(mine)

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
                chosen = execute.choose(executor, launch.update.bucket.device, *launch.update.bucket.size)
                found += verification.compare_updates(launch.update, chosen)
            updates.run(launches, ["reference"] * len(launches))
        return found

    def describe(self, grads_and_vars: Iterable[Any] | None = None) -> Description:
        """What a step does and costs: executors and why, launches, bytes, what keeps it from one launch. `print()` it.

        grads_and_vars: pairs as for `apply_gradients`, of which those without gradient are left out; or variables, whose `.grad`
            counts, or where there is none a dense gradient of the variable's dtype. Default: the variables of the steps so far.

        Launches nothing and changes nothing. Raises ValueError where nothing is given and no step was taken, and what
        `apply_gradients` raises for gradients and variables.
        """
        with self._lock:
            if grads_and_vars is None:
                grads_and_vars = [v for bucket in self._state.buckets.values() for v in bucket.variables]
                if not grads_and_vars:
                    raise ValueError("There is nothing to describe before the first step. Pass variables: describe(model.parameters()).")
            given = [(v.detach() if v.grad is None else v.grad, v) if isinstance(v, Tensor) else v for v in grads_and_vars]
            pairs = gradients.check([(g, v) for g, v in given if g is not None])
            self._check_precision(pairs)
            kept = planes.owned(self._state, self._all_slots())
            return description.describe(self._name, pairs, kept, self._executor, self._clipping())

    @property
    def stats_every(self) -> int:
        """So many steps apart are steps that `last_stats` knows; 0 for none. May be changed between steps."""
        return self._recorder.every

    @stats_every.setter
    def stats_every(self, value: int) -> None:
        self._recorder.every = value

    def last_stats(self) -> StepStats | None:
        """Norms, learning rate and iterations of the last step that `stats_every` chose; None before there is one.

        The launches that update add the numbers up; no step waits for them. On a GPU this call waits for the device to have
        taken that step. Steps of a CUDA graph are not measured. Of a sparse gradient's variable the rows that move count.

        Raises RuntimeError where `stats_every` is 0 and no step was measured.
        """
        return self._recorder.last()

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
