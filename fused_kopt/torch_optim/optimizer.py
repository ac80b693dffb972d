"""The abstract Optimizer: steps of torch.optim.Optimizer's contract over the fused engine."""

import contextlib
from collections.abc import Callable, Sequence
from itertools import chain, repeat
from operator import is_not
from typing import Any

import torch
from torch import Tensor

from fused_kopt import borrowed, description, layout
from fused_kopt.borrowed import Borrowed, Borrower, Task
from fused_kopt.clipping import Clips
from fused_kopt.description import Description
from fused_kopt.replays import capturing
from fused_kopt.torch_optim import arguments, members, rows
from fused_kopt.torch_optim.contract import Contract
from fused_kopt.torch_optim.members import Counters, Members, Part, Sighting
from fused_kopt.torch_optim.rows import Rows

# Sets of parameters with gradients that are kept, as launches are (fused_kopt.repeats).
KEPT = 4


class Optimizer(Contract):
    """Base of the classes in fused_kopt.torch_optim. A subclass declares defaults, slots, scalars and a rule; all else is here.

    What every optimizer accepts besides its own arguments:
        learning_rate, beta_1, beta_2, epsilon, rho, decay, schedule_decay: Keras's words for lr, betas, eps, alpha, lr_decay and
            momentum_decay, where the class has these; also in parameter groups, whose keys are torch's.
        clipvalue, clipnorm, global_clipnorm: limits >= 0 on gradient elements, on each gradient's norm, on the norm of all;
            applied inside the launch. `.grad` stays as it is. Attributes of the same names may be changed between steps.
        executor: as for fused_kopt.Adam: "auto", "reference", "triton" or "compiled".
        amp: "fused" lets a GradScaler leave unscaling to the launch; default None, its usual way.
        foreach, fused: ignored. maximize, capturable, differentiable: refused unless False.

    State is made at the first step: for every parameter `step` (0-d float32 on the CPU; counting ends at 2^24), and the slots
    in float32 (float64 for float64 parameters), in the parameter's shape and layout. Steps of several threads queue.

    Raises TypeError for unknown arguments, a value in two spellings, parameters that are not floating; ValueError for values out
    of range and a parameter given twice.
    """

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient: one launch per device, dtype and rule, however many groups there are.

        closure: computes the loss and its gradients; called once, before anything else. Returns what it returns.

        Raises TypeError for sparse or integer gradients, ValueError for shapes or devices that differ and shared memory, each with
        the parameter's name; RuntimeError inside a CUDA graph capture. Nothing has been written then.
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
            if scale is not None:
                self._take(scale)
        return loss

    def describe(self) -> Description:
        """What a step on all trainable parameters does and costs: executors and why, launches, bytes. `print()` it.

        A parameter without `.grad` counts as if it had a dense one. Launches nothing and changes nothing. Raises what `step` raises.
        """
        with self._lock:
            parts: dict[Any, list[tuple[Tensor, Tensor, str]]] = {}
            slots: dict[Any, tuple[str, ...]] = {}
            for index, (group, rule) in enumerate(zip(self.param_groups, rows.rules(self)[0], strict=True)):
                slots[rule] = tuple(self.slots(group))
                for position, param in enumerate(group["params"]):
                    if param.requires_grad or param.grad is not None:
                        pair = members.local([param.detach() if param.grad is None else param.grad, param])
                        parts.setdefault(rule, []).append((*pair, arguments.name(group, index, position)))  # type: ignore[arg-type]
            clips = Clips(1.0, self.clipvalue, self.clipnorm, self.global_clipnorm)
            found = []
            for rule, mine in parts.items():
                pairs = borrowed.check([(g, p) for g, p, _ in mine], [name for _, _, name in mine])
                found.append(description.describe(type(self).__name__, pairs, slots[rule], self.executor, clips, alignment=1))
            return description.joined(found)

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
        found_rules, decaying = rows.rules(self)
        seen = Sighting(params, [len(group["params"]) for group in self.param_groups], absent, found_rules)
        found = self._members(seen, grads)
        if found is None:
            return
        if found.sharded:
            grads = members.local(members.placed(grads, found.params))
        clips = self._clips(scale, found)
        tasks = [self._task(part, found, decaying) for part in found.parts]
        launches = []
        for part, (task, given, _) in zip(found.parts, tasks, strict=True):
            borrower = self._borrowers.setdefault(part.rule, Borrower(self._executor))
            launches.append(borrower.prepare(task._replace(clips=clips), given._replace(gradients=part.select(grads))))
        for launch in launches:
            launch()
        for part, (_, _, numbers) in zip(found.parts, tasks, strict=True):
            self._count(part, found, numbers)

    def _members(self, seen: Sighting, grads: Sequence[Tensor]) -> Members | None:
        """Who takes part, with states; None where this is the dummy step that only makes them."""
        states = list(self.state.values())
        if self._counters is None or not self._counters.of(states):
            self._known, self._counters = [], None
        found = next((known for known in self._known if known.seen.same(seen)), None)
        if found is None:
            dummy = not states and self._dummy(grads)
            names = members.present(self._names(), seen.absent)
            self._make_states(seen, names, grads)
            self._counters = Counters(list(self.state.values()), self.counters)
            found = Members(seen, names, self.state)
            self._known = [found, *self._known[: KEPT - 1]]
            if dummy:
                return None
        return found

    def _dummy(self, grads: Sequence[Tensor]) -> bool:
        """Whether this is how torch.distributed.checkpoint makes states: lr 0, gradients 0, none there yet. It must not count."""
        still = all(float(group["lr"]) == 0 for group in self.param_groups)
        return still and not any(bool(grad.any()) for grad in members.local(grads))

    def _make_states(self, seen: Sighting, names: list[str], grads: Sequence[Tensor]) -> None:
        """Create what the states of the parameters with gradients lack, after a look at the gradients."""
        groups = [group for group in self.param_groups for _ in group["params"]]
        params = members.present(seen.params, seen.absent)
        lacking = []
        for param, group in zip(params, members.present(groups, seen.absent), strict=True):
            state = self.state.get(param)
            new = {name: value for name, value in self.slots(group).items() if state is None or name not in state}
            if new or state is None:
                lacking.append((param, new))
        if lacking:
            borrowed.check(list(zip(members.local(grads), members.local(params), strict=True)), names)
        for param, new in lacking:
            for name, value in new.items():
                self.state[param][name] = torch.full_like(param, value, dtype=layout.compute_dtype(param.dtype), requires_grad=False)
            self.state[param]  # a defaultdict: rules without slots count, too

    def _names(self) -> list[str]:
        return [arguments.name(group, i, k) for i, group in enumerate(self.param_groups) for k in range(len(group["params"]))]

    def _clips(self, scale: float, found: Members) -> Clips:
        clips = Clips(scale, self.clipvalue, self.clipnorm, self.global_clipnorm)
        if clips.by_norm and found.sharded:
            raise ValueError("Norms of sharded parameters need all ranks. Use torch.nn.utils.clip_grad_norm_ in place of clipnorm.")
        if clips.global_clipnorm is not None and len(found.parts) > 1:
            rules = sorted(part.rule.__name__ for part in found.parts)
            raise ValueError(f"`global_clipnorm` needs one rule for all groups; these have {rules}. Use torch.nn.utils.clip_grad_norm_.")
        return clips

    def _task(self, part: Part, found: Members, decaying: bool) -> tuple[Task, Borrowed, Rows]:
        assert self._counters is not None
        places = part.select(found.places(self._counters))
        numbers = Rows(self, part, {name: values[places] for name, values in self._counters.values.items()}, decaying)
        groups = [self.param_groups[i] for i in part.groups]
        states, variables = part.select(found.states), part.select(found.params)
        columns = [[state[name] for state in states] for name in self.slots(groups[0])]
        if found.sharded:
            variables, columns = members.local(variables), [members.local(column) for column in columns]
        given = Borrowed(variables, (), columns, part.select(found.names), numbers.which)
        return Task(part.rule, numbers.of, exact=all(map(self.exact, groups))), given, numbers

    def _count(self, part: Part, found: Members, numbers: Rows) -> None:
        assert self._counters is not None
        places, values = part.select(found.places(self._counters)), self._counters.values
        values["step"][places] += 1
        if "mu_product" in values:
            wide = part.select(found.wide)
            for dtype, products in numbers.products.items():
                mine = wide == (dtype == torch.float64)
                values["mu_product"][places[mine]] = products[numbers.which[mine]]
