"""A step's course: what Optimizer's public methods call. From pairs to launches, their repetition, and the commit."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_kopt import clipping, gradients, hyperparameters, updates, verification
from fused_kopt.aggregate import AllReduce, Reduction
from fused_kopt.clipping import Clips
from fused_kopt.errors import TornStepError
from fused_kopt.flat import Flat
from fused_kopt.hyperparameters import Step
from fused_kopt.planned import Planned
from fused_kopt.recording import Sums
from fused_kopt.repeat import Repeat
from fused_kopt.replays import Replays, capturing
from fused_kopt.stages import Stage


class Engine(Planned):
    """The part of Optimizer that takes steps."""

    def _commit(self, steps: Mapping[torch.dtype, Step]) -> None:
        """Called once after all launches of a step, before `iterations` grows; `steps` by compute dtype."""

    @contextlib.contextmanager
    def _one_step(self) -> Iterator[None]:
        with self._lock, torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
            if self._stepping:
                raise RuntimeError("re-entrant apply_gradients: something called it during a step of the same optimizer.")
            if self._torn:
                raise TornStepError("An earlier step was interrupted between launches. Restore the variables, then call set_weights().")
            if capturing() and self._replays is None:
                raise RuntimeError(
                    "A step in a CUDA graph would replay this step's scalars for ever. Call prepare_replays() first, or step outside."
                )
            self._stepping, recording = True, torch.is_grad_enabled()
            try:
                yield
            finally:
                self._stepping = False
                if torch.is_grad_enabled() != recording:  # Ctrl-C between no_grad's entry and its block
                    torch.set_grad_enabled(recording)

    def _transform(self, pairs: list[tuple[Tensor, Tensor]], aggregated: bool) -> list[tuple[Tensor, Tensor]]:
        """Aggregation, a guard's look if there are transformers, then these; what they return is checked like what the caller passed."""
        given: Iterable[Any] = pairs
        looks = [self._unscaled] * bool(self._transformers and self._guard)
        for transform in [*[self._aggregator] * aggregated, *looks, *self._transformers]:
            given = transform(given)
        if given is pairs:
            return pairs
        pairs = gradients.check(gradients.present(given))
        self._check_known(pairs)
        return pairs

    def _unscaled(self, given: Iterable[Any]) -> list[tuple[Tensor, Tensor]]:
        """The pairs without the loss scale, once the guard has seen them: what transformers get."""
        assert self._guard is not None
        pairs = gradients.check(gradients.present(given))
        unscale = Clips(1.0, None, None, None, unscale=self._guard.unscale)
        clipping.rows(pairs, unscale, self._executors(v for _, v in pairs), self._executor, self._guard)
        return [(g, v) for g, (_, v) in zip(self._guard.unscaled([g for g, _ in pairs]), pairs, strict=True)]

    def _at_work(self, aggregated: bool) -> list[Stage]:
        """What the step goes through; empty where it is this process's own."""
        if not aggregated or not isinstance(self._aggregator, AllReduce) or not self._aggregator.replicated():
            return self._stages
        if any(stage.aggregates for stage in self._stages):
            return self._stages
        if self._reduction is None or self._reduction.settings is not self._aggregator:
            self._reduction = Reduction(self._aggregator)
        return [self._reduction, *self._stages]

    def _through(self, stages: Sequence[Stage], given: Any, aggregated: bool) -> Tensor | None:
        with contextlib.ExitStack() as reporting:
            for stage in stages:
                reporting.enter_context(stage.reported())
            with self._one_step():
                for stage in stages:
                    given = stage.enter(self, given, aggregated)
                    aggregated = False
                done = self._local(given, aggregated)
                self._torn = bool(stages)  # what fails from here on leaves variables that others have not got, or have not sent
                for stage in reversed(stages):
                    stage.leave()
                self._torn = False
                return done

    def _local(self, given: Any, aggregated: bool) -> Tensor | None:
        if isinstance(given, Flat):
            return self._apply_flat(given, aggregated)
        pairs, tensors = gradients.flattened(given)
        done = self._again(tensors, aggregated) if tensors else None
        return self._apply_pairs(pairs, aggregated) if done is None else done

    def _apply_flat(self, flat: Flat, aggregated: bool) -> Tensor | None:
        done = self._again(flat, aggregated)
        if done is None:
            done = self._apply_pairs(list(flat), aggregated)
            self._repeats.remember(flat)
        return done

    def _apply_pairs(self, given: Iterable[Any], aggregated: bool) -> Tensor | None:
        if capturing():
            raise RuntimeError("This is not the step that prepare_replays() prepared: the same gradients and variables, in the same order.")
        pairs = gradients.check(gradients.present(given))
        self._check_known(pairs)
        pairs = self._transform(pairs, aggregated) if pairs else pairs
        if not pairs:
            self._begin([])
            if self._guard is not None and self._guard.open:  # Keras counts it for the scale
                self._guard.check([])
                self._guard.commit()
            return None
        return self._apply(pairs)

    def _apply(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        with hyperparameters.restored_on_error(self):
            prepared = self._prepare(pairs)
            verifying, sums = self._verifying(), self._measuring()
            self._begin(prepared.variables)
        for number, launches in enumerate(self._rounds(prepared, sums)):
            jobs = [(launch.update, prepared.executors[launch.update.bucket.device]) for launch in launches]
            jobs = [(update, verification.proven(update, executor, self._executor)) for update, executor in jobs]
            if verifying:
                verification.check(jobs, "Earlier gradients of this call were applied." if self._torn else "Nothing was written.")
            self._torn = True
            chosen = [executor for _, executor in jobs]
            updates.run(launches, chosen, sums, self._stages)
            if not number:
                self._repeats.learn(pairs, launches, chosen, self._executor)
        return self._finish(prepared.variables, prepared.steps, sums)

    def _again(self, given: Flat | Sequence[Any], aggregated: bool) -> Tensor | None:
        """The step of a Flat, or of gradients and variables in turn, by the launches of an earlier one like it; None if there is none."""
        sums = self._measuring()
        repeat = self._known(given, aggregated, sums)
        if repeat is None:
            return None
        repeat.clip(self._clipping(), self._guard)
        if self._replays is not None and self._replays.repeat is repeat:
            return self._step_of(self._replays)
        steps: dict[torch.dtype, Step] = {}
        scalars = self._scalars_of(repeat.updates, steps)
        self._torn = True
        repeat.run(scalars, sums, self._stages)
        return self._finish(repeat.variables, steps, sums)

    def _step_of(self, replays: Replays) -> Tensor:
        self._torn = not capturing()
        replays.step()
        if self._guard is not None:
            self._guard.commit()
        if not capturing():
            torch.autograd.graph.increment_version(replays.repeat.variables)
            replays.count(1)
        self._torn = False
        return self.iterations

    def _known(self, given: Flat | Sequence[Any], aggregated: bool, sums: Sums | None = None) -> Repeat | None:
        """The launches of an earlier step like this one."""
        reduced = aggregated and not (isinstance(self._aggregator, AllReduce) and not self._aggregator.replicated())
        if self._transformers or self._verifying() or reduced:
            return None
        clips = self._clipping()
        if isinstance(given, Flat):
            # what lies between the variables of a Flat would be measured too, and is NaN where an epsilon is 0
            together = clips.clipnorm is None and not self._multipliers and sums is None
            repeat = self._repeats.of(given, together, self._executor)
        else:
            repeat = self._repeats.find(given, self._executor)
        if repeat is None:
            return None
        rules = [self._stored_rule(update.bucket.dtype, update.bucket.policy) for update in repeat.updates]
        return repeat if repeat.applies(rules, clips, sums) else None

    def _verifying(self) -> bool:
        return bool(self.verify_every) and (self._state.steps_taken() + 1) % self.verify_every == 0

    def _measuring(self) -> Sums | None:
        """Where this step is measured; None if it is not. A captured step would be at every replay, and nobody told."""
        return None if self._replays is not None else self._recorder.start(self._state.steps_taken() + 1)

    def _finish(self, variables: Sequence[Tensor], steps: Mapping[torch.dtype, Step], sums: Sums | None) -> Tensor:
        torch.autograd.graph.increment_version(variables)
        guard = self._guard
        if guard is not None:
            guard.commit()
        if guard is None or not self.carries or guard.finite():
            self._commit(steps)
        self._state.count()
        self._torn = False
        self._last_rate = float(next(iter(steps.values())).rate)
        if sums is not None:
            if self._across is not None:
                self._across.add(sums)
            if guard is not None:
                guard.spoil(sums)
            self._recorder.finish(sums, self._last_rate, self._state.steps_taken())
        return self.iterations
