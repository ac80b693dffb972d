"""The abstract Optimizer: steps of torch.optim.Optimizer's contract over the fused engine."""

import contextlib
from collections.abc import Callable, Sequence
from itertools import chain, repeat
from operator import is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kopt import borrowed, description, precision
from fused_kopt.borrowed import Borrowed, Borrower, Task
from fused_kopt.clipping import Clips
from fused_kopt.description import Description
from fused_kopt.recording import StepStats, Sums
from fused_kopt.replays import capturing
from fused_kopt.torch_optim import arguments, members, rows, shards, stored
from fused_kopt.torch_optim.contract import Contract
from fused_kopt.torch_optim.members import Counters, Members, Part, Sighting
from fused_kopt.torch_optim.rows import Rows

# Sets of parameters with gradients that are kept, as launches are (fused_kopt.repeats).
KEPT = 4


class Job(NamedTuple):
    """One part's share of a step."""

    part: Part
    places: Any
    """int64, where its counters lie."""
    numbers: Rows
    launch: Callable[[], None]


class Optimizer(Contract):
    """Base of the classes in fused_kopt.torch_optim. A subclass declares defaults, slots, scalars and a rule; all else is here.

    What every optimizer accepts besides its own arguments:
        learning_rate, beta_1, beta_2, epsilon, rho, decay, schedule_decay: Keras's words for lr, betas, eps, alpha, lr_decay and
            momentum_decay, where the class has these; also in parameter groups, whose keys are torch's.
        clipvalue, clipnorm, global_clipnorm: limits >= 0 on gradient elements, on each gradient's norm, on the norm of all; those of
            DTensors over all ranks. In the launch; `.grad` stays as it is. Attributes of the same names may be changed between steps.
        executor: as for fused_kopt.Adam: "auto", "reference", "triton" or "compiled".
        precision: how parameters, their masters and their slots are stored, as for fused_kopt.Adam: a name or a `fused_kopt.Precision`;
            also in parameter groups, which keep a name or a dict. Fixed by the first step. Default "float32".
        amp: "fused" lets a GradScaler leave unscaling to the launch; default None, its usual way.
        stats_every: every so many steps, the launch adds up what `last_stats` returns. Default 0: never.
        foreach, fused: ignored. maximize, capturable, differentiable: refused unless False.

    State is made at the first step: for every parameter `step` (0-d float32 on the CPU; counting ends at 2^24), and the slots
    in float32 (float64 for float64 parameters), in the parameter's shape and layout; under another `precision` the parts in which they
    are stored, and the master's. Steps of several threads queue.

    Raises TypeError for unknown arguments, a value in two spellings, parameters that are not floating; ValueError for values out
    of range and a parameter given twice.
    """

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient: one launch per device, dtype and rule, however many groups there are.

        closure: computes the loss and its gradients; called once, before anything else. Returns what it returns.

        Raises TypeError for sparse or integer gradients, ValueError for shapes or devices that differ and shared memory, each with
        the parameter's name; RuntimeError inside a CUDA graph capture; errors.PeerError where a norm needs a rank that is gone. Nothing
        has been written then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        normal = torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()
        with self._lock, normal, torch.no_grad():
            if capturing():
                raise RuntimeError(
                    "A step in a CUDA graph would replay this step's scalars for ever. See prepare_replays() of fused_kopt.Adam."
                )
            scale = self._unscaling()
            if scale is None:
                self._recorder.skipped += 1
            else:
                self._take(scale)
        return loss

    def last_stats(self) -> StepStats | None:
        """Norms, learning rate and iterations of the last step that `stats_every` chose; None before there is one.

        The launches that update add the numbers up; no step waits for them. On a GPU this call waits for the device to have taken
        that step. The learning rate is the first group's; `iterations` the largest `step` of the parameters; `skipped_steps`
        counts those that a GradScaler with `amp="fused"` skipped; sharded parameters count with this rank's part.

        Raises RuntimeError where `stats_every` is 0 and no step was measured.
        """
        return self._recorder.last()

    def describe(self) -> Description:
        """What a step on all trainable parameters does and costs: executors and why, launches, bytes. `print()` it.

        A parameter without `.grad` counts as if it had a dense one. Launches nothing and changes nothing. Raises what `step` raises.
        """
        with self._lock:
            parts: dict[Any, list[tuple[Tensor, Tensor, str]]] = {}
            kept: dict[Any, Any] = {}
            for index, (group, rule) in enumerate(zip(self.param_groups, rows.rules(self)[0], strict=True)):
                kept[rule] = stored.kept(self, group)
                for position, param in enumerate(group["params"]):
                    if param.requires_grad or param.grad is not None:
                        pair = shards.local([param.detach() if param.grad is None else param.grad, param])
                        parts.setdefault(rule, []).append((*pair, arguments.name(group, index, position)))
                        stored.check(self, group, param, parts[rule][-1][2])
            clips = Clips(1.0, self.clipvalue, self.clipnorm, self.global_clipnorm)
            found = []
            for rule, mine in parts.items():
                pairs = borrowed.check([(g, p) for g, p, _ in mine], [name for _, _, name in mine])
                found.append(description.describe(type(self).__name__, pairs, kept[rule], self.executor, clips, alignment=1))
            return description.joined(found)

    def get_master(self, param: Tensor) -> Tensor:
        """What a parameter stands for under its group's precision policy, float32 (float64 for float64), in its shape.

        The parameter itself, detached, where nothing is kept besides; of a sharded one this rank's part. KeyError before its first step.
        """
        group = next((group for group in self.param_groups if any(p is param for p in group["params"])), None)
        if group is None or param not in self.state:
            raise KeyError(f"This parameter {tuple(param.shape)} has no state yet. Take a step with a gradient for it first.")
        return stored.master(self, group, param, self.state[param])

    def _unscaling(self) -> float | None:
        """What gradients are multiplied by; None where a GradScaler found them infinite."""
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is None:
            return 1.0
        both = torch.stack([torch.as_tensor(x).float().reshape(()) for x in (found_inf, 1.0 if scale is None else scale)])  # one wait
        infinite, scale = both.tolist()
        return None if infinite else 1.0 / scale

    def _take(self, scale: float) -> None:
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        grads = [param.grad for param in params]
        absent = None
        if not all(map(is_not, grads, repeat(None))):
            absent = [grad is None for grad in grads]
            grads = members.present(grads, absent)
        if not grads:
            return
        seen = Sighting(params, [len(group["params"]) for group in self.param_groups], absent, *rows.rules(self))
        found, new = self._members(seen)
        if found.sharded:
            grads = found.local(grads)
        if new and not self._begin(found, grads):
            return
        number = self._number(found) if self._recorder.every else 0
        clips, sums = self._clips(scale, found), self._recorder.start(number)
        jobs = [self._job(part, found, grads, clips, sums) for part in found.parts]
        for job in jobs:
            job.launch()
        for job in jobs:
            self._count(job, found)
        if sums is not None:
            self._recorder.finish(sums, float(self.param_groups[0]["lr"]), number)

    def _number(self, found: Members) -> int:
        """Which step this is, by the parameter that has taken most."""
        assert self._counters is not None
        return int(self._counters.values["step"][found.places(self._counters)].max()) + 1

    def _members(self, seen: Sighting) -> tuple[Members, bool]:
        """Who takes part, and whether they are new here and states may be missing."""
        if self._counters is None or not self._counters.of(self.state):
            self._known, self._counters = [], None
        found = next((known for known in self._known if known.seen.same(seen)), None)
        if found is not None:
            return found, False
        stored.check_same(self, self._known[0].seen.rules if self._known else [], seen.rules)
        return Members(seen, members.present(self._names(), seen.absent)), True

    def _begin(self, found: Members, grads: Sequence[Tensor]) -> bool:
        """Make the states of new members. False where this is the dummy step that does no more."""
        dummy = not self.state and self._dummy(found, grads)
        self._make_states(found, grads)
        self._known = [found, *self._known[: KEPT - 1]]
        return not dummy

    def _dummy(self, found: Members, grads: Sequence[Tensor]) -> bool:
        """Whether this is how torch.distributed.checkpoint makes states: lr 0, gradients 0, none there yet. It must not count."""
        return all(float(group["lr"]) == 0 for group in self.param_groups) and not found.moves(grads)

    def _make_states(self, found: Members, grads: Sequence[Tensor]) -> None:
        """Create what the states of the parameters with gradients lack, after a look at the gradients."""
        groups = members.present([group for group in self.param_groups for _ in group["params"]], found.seen.absent)
        lacking = []
        kinds = {(id(group), param.dtype): group for param, group in zip(found.params, groups, strict=True)}
        known = {(key, dtype): stored.planes(self, group, dtype) for (key, dtype), group in kinds.items()}
        for param, group, what in zip(found.params, groups, found.names, strict=True):
            state, planes = self.state.get(param), known[id(group), param.dtype]
            stored.check(self, group, param, what)
            new = {name: plane for name, plane in planes.items() if state is None or name not in state}
            if new or state is None:
                lacking.append((param, new))
        if lacking:
            borrowed.check(list(zip(grads, shards.local(found.params), strict=True)), found.names)
        for param, new in lacking:
            for name, plane in new.items():
                self.state[param][name] = stored.new(plane, param)
            self.state[param]  # a defaultdict: rules without slots count, too
        if lacking or self._counters is None:
            self._counters = Counters(self.state, self.counters)

    def _names(self) -> list[str]:
        return [arguments.name(group, i, k) for i, group in enumerate(self.param_groups) for k in range(len(group["params"]))]

    def _clips(self, scale: float, found: Members) -> Clips:
        clips = Clips(scale, self.clipvalue, self.clipnorm, self.global_clipnorm)
        arguments.check_clips(clips)
        if clips.global_clipnorm is not None and len(found.parts) > 1:
            rules = sorted(f"{part.rule.__name__} in {precision.title(part.policy)}" for part in found.parts)
            raise ValueError(
                f"`global_clipnorm` needs one rule for all groups, and one precision; these have {rules}. "
                "Use torch.nn.utils.clip_grad_norm_."
            )
        return clips

    def _job(self, part: Part, found: Members, grads: list[Tensor], clips: Clips, sums: Sums | None) -> Job:
        """One part's launch, prepared: nothing has been written, and nothing more can be wrong with what it was given."""
        assert self._counters is not None
        places, states = part.select(found.places(self._counters)), list(self.state.values())
        numbers = Rows(self, part, {name: values[places] for name, values in self._counters.values.items()}, found.seen.decaying)
        groups = [self.param_groups[i] for i in part.groups]
        mine, grads, variables = [states[i] for i in places.tolist()], part.select(grads), part.select(found.params)
        slots = [[state[name] for state in mine] for name in stored.planes(self, groups[0], variables[0].dtype)]
        if found.sharded:
            variables, slots = shards.local(variables), [shards.local(column) for column in slots]
        clips = found.clips(part, clips, grads, variables)
        task = Task(part.rule, numbers.of, clips, all(map(self.exact, groups)), sums, part.policy, stored.slots(self, groups[0]))
        positions = None if found.positions is None else part.select(found.positions)
        given = Borrowed(variables, grads, slots, part.select(found.names), numbers.which, positions)
        borrower = self._borrowers.setdefault((part.rule, part.policy), Borrower(self._executor))
        return Job(part, places, numbers, borrower.prepare(task, given))

    def _count(self, job: Job, found: Members) -> None:
        assert self._counters is not None
        values, which = self._counters.values, job.numbers.which
        values["step"][job.places] += 1
        if "mu_product" in values:
            wide = job.part.select(found.wide)
            for dtype, products in job.numbers.products.items():
                mine = wide == (dtype == torch.float64)
                values["mu_product"][job.places[mine]] = products[which[mine]]
