"""A step's course: what Optimizer's public methods call. From pairs to launches, their repetition, and the commit."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fused_kopt import aggregate, clipping, execute, gradients, hyperparameters, layout, updates, verification
from fused_kopt.clipping import Clips
from fused_kopt.declared import Declared
from fused_kopt.errors import TornStepError
from fused_kopt.execute import Chosen
from fused_kopt.flat import Flat
from fused_kopt.hyperparameters import Step
from fused_kopt.recording import Sums
from fused_kopt.repeat import Repeat
from fused_kopt.replays import Replays, capturing
from fused_kopt.state import Key
from fused_kopt.updates import Entry, Launch, Recipe, SparseRows


class Prepared(NamedTuple):
    """A step, worked out but not begun."""

    entries: list[Entry]
    variables: list[Tensor]  # distinct, in order of first appearance
    recipes: dict[Key, Recipe]
    executors: dict[torch.device, Chosen]
    steps: dict[torch.dtype, Step]


class Engine(Declared):
    """The part of Optimizer that takes steps."""

    sparse_rows: ClassVar[SparseRows] = "touched"

    def _new_weights(self, variables: Sequence[Tensor]) -> list[Tensor]:
        """Weights besides the slots that the first step creates, before them (Nadam's momentum cache)."""
        return []

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

    def _apply_flat(self, flat: Flat, aggregated: bool) -> Tensor | None:
        if aggregated and self._aggregator is aggregate.all_reduce_sum and aggregate.replicated():
            flat.gather()  # every rank must call the same collectives, whatever gradients it has
            aggregate.all_reduce_flat([buffer.gradients for buffer in flat.buffers])
            aggregated = False
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
            updates.run(launches, chosen, sums)
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
        repeat.run(scalars, sums)
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
        reduced = aggregated and (self._aggregator is not aggregate.all_reduce_sum or aggregate.replicated())
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
        if sums is not None:
            if guard is not None:
                guard.spoil(sums)
            self._recorder.finish(sums, float(next(iter(steps.values())).rate), self._state.steps_taken())
        return self.iterations

    def _prepare(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Prepared:
        """All that a step needs to know before anything is created."""
        self._check_precision(pairs)
        variables = list({id(v): v for _, v in pairs}.values())
        steps: dict[torch.dtype, Step] = {}
        recipes = {key: self._recipe(key, steps) for key in dict.fromkeys(map(self._state.key, variables))}
        executors = self._executors(variables)
        rows = clipping.rows(pairs, self._clipping(), executors, self._executor, self._guard)
        entries = [Entry(g, v, row) for (g, v), row in zip(pairs, rows, strict=True)]
        return Prepared(entries, variables, recipes, executors, steps)

    def _executors(self, variables: Iterable[Tensor]) -> dict[torch.device, Chosen]:
        """By device the executor of distinct variables."""
        sizes: dict[torch.device, list[int]] = {}
        for variable in variables:
            sizes.setdefault(variable.device, []).append(variable.numel())
        return {device: execute.choose(self._executor, device, sum(mine), len(mine)) for device, mine in sizes.items()}

    def _clipping(self) -> Clips:
        unscale = None if self._guard is None else self._guard.unscale
        return Clips(self.grad_scale, self.clipvalue, self.clipnorm, self.global_clipnorm, unscale=unscale)

    def _rounds(self, prepared: Prepared, sums: Sums | None = None) -> Iterator[list[Launch]]:
        for entries in updates.rounds(prepared.entries, self._state):
            with torch.no_grad():  # not around the yield: a traceback that keeps this frame would keep gradients off
                launches = updates.plan(entries, self._state, lambda b: prepared.recipes[(b.device, b.dtype, b.policy)], sums)
            for launch in launches:
                launch.update.gate = None if self._guard is None else self._guard.gate(launch.update.bucket.device)
            yield launches

    def _recipe(self, key: Key, steps: dict[torch.dtype, Step]) -> Recipe:
        hyperparameters.create(self)
        _, dtype, policy = key
        scalars, own = self._scalars((layout.compute_dtype(dtype), policy), steps)
        planes = policy.planes(dtype, self.slot_groups())
        rule = self._stored_rule(dtype, policy)
        return Recipe(planes, rule, self.sparse_rule, self.sparse_rows, scalars, self.exact, own)

    def _begin(self, variables: Sequence[Tensor]) -> None:
        """Create what the first step creates: hyperparameters, iterations, slots."""
        weights = self._new_weights(variables)
        hyperparameters.create(self)
        self._state.ensure(variables, self.slot_groups(), weights, counted=True)
