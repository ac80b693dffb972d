"""The part of torch.optim.Optimizer's contract that takes no step: arguments, groups, pickling, state dicts."""

import threading
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from fused_kopt.borrowed import Borrower
from fused_kopt.execute import EXECUTORS, Executor, Rule
from fused_kopt.hyperparameters import Step
from fused_kopt.precision import Precision
from fused_kopt.recording import Recorder
from fused_kopt.torch_optim import arguments, loading
from fused_kopt.torch_optim.members import Counters, Members


class Contract(torch.optim.Optimizer):
    """Arguments, parameter groups and state of an optimizer."""

    counters: ClassVar[Mapping[str, tuple[torch.dtype, float]]] = {"step": (torch.float32, 0.0)}
    """Numbers that a state holds per parameter: their dtypes and first values."""
    momentum_sign: ClassVar[int] = 0
    """The slot `momentum` is so many times lr * torch.optim's momentum_buffer; 0: there is none."""
    clipvalue: float | None
    clipnorm: float | None
    global_clipnorm: float | None
    amp: str | None
    _executor: Executor

    def __init__(self, params: Iterable[Any], defaults: Mapping[str, Any], keywords: Mapping[str, Any]) -> None:
        cls = type(self).__name__
        spelled, own = arguments.split(cls, keywords)
        self._start(own)
        defaults = {**defaults, "precision": keywords.get("precision", "float32")}
        super().__init__(params, arguments.respelled(cls, {**defaults, **spelled}, defaults))

    # What a subclass declares, of a parameter group.

    @abstractmethod
    def slots(self, group: Mapping[str, Any]) -> dict[str, float]:
        """The slots by their names in `state`, in the rule's order, with the number that every element starts from."""

    @abstractmethod
    def rule(self, group: Mapping[str, Any]) -> Rule:
        """The update rule: a module-level function."""

    @abstractmethod
    def scalars(self, group: Mapping[str, Any], step: Step) -> Any:
        """A NamedTuple of a step's scalars, computed in `step.dtype`."""

    def exact(self, group: Mapping[str, Any]) -> bool:
        """Whether executors owe each other equal bits."""
        return True

    def decoupled(self, group: Mapping[str, Any]) -> bool:
        """Whether `weight_decay` shrinks the parameter instead of adding to the gradient."""
        return False

    # Groups, pickling, state dicts.

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with settings of its own in torch's or Keras's words. Raises what construction raises."""
        cls = type(self).__name__
        if not isinstance(param_group, dict):
            raise TypeError(f"A parameter group must be a dict. Received: {type(param_group).__name__}.")
        arguments.refuse(cls, param_group)
        group = arguments.respelled(cls, param_group, self.defaults)
        group["params"] = arguments.check_parameters(group["params"], len(self.param_groups))
        super().add_param_group(group)

    @property
    def executor(self) -> Executor:
        """ "auto", "reference", "triton" or "compiled"; may be changed between steps."""
        return self._executor

    @executor.setter
    def executor(self, value: Executor) -> None:
        if value not in EXECUTORS:
            raise ValueError(f"`executor` must be one of {EXECUTORS}. Received: executor={value!r}.")
        self._executor = value
        self._borrowers: dict[tuple[Rule, Precision], Borrower] = {}

    @property
    def stats_every(self) -> int:
        """So many steps apart are steps that `last_stats` knows; 0 for none. May be changed between steps."""
        return self._recorder.every

    @stats_every.setter
    def stats_every(self, value: int) -> None:
        self._recorder.every = value

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What a GradScaler asks: whether `step` reads its `grad_scale` and `found_inf`."""
        return self.amp == "fused"

    def _start(self, own: Mapping[str, Any]) -> None:
        """Our own attributes. What is kept between steps is made anew from `state` and `param_groups`."""
        self._lock = threading.RLock()
        self._known: list[Members] = []
        self._counters: Counters | None = None
        self._recorder = Recorder()
        for name in arguments.OWN:
            setattr(self, name, own[name])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in arguments.OWN}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = {name: state.get(name, getattr(self, name, value)) for name, value in arguments.OWN.items()}
        state = {name: value for name, value in state.items() if name not in arguments.OWN}
        states = {p: s.state if isinstance(s, loading.Kept) else s for p, s in state["state"].items()}
        super().__setstate__({**state, "state": defaultdict(dict, states)})
        self.defaults.pop("differentiable", None)  # which torch adds here, so that groups would differ after loading
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._start(own)

    def state_dict(self) -> dict[str, Any]:
        """Settings and state, as torch.optim's; numpy's numbers, which schedules leave in groups, as Python's."""
        found: dict[str, Any] = super().state_dict()
        groups = [{k: v.item() if isinstance(v, np.generic) else v for k, v in group.items()} for group in found["param_groups"]]
        return {**found, "param_groups": groups}

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an optimizer of this class, or of torch.optim's class of the same name.

        Tensors are copied into this optimizer's dtypes (float32 for bfloat16 parameters, too), devices and layouts. The saved
        groups' settings replace the present ones, as in torch.optim; ours that they lack keep their defaults. SGD's and RMSprop's
        `momentum_buffer` becomes `momentum`, with the learning rate in it.

        Raises ValueError or TypeError, and changes nothing, for other groups, other shapes, another optimizer's state, groups of another
        `precision`, and settings that no step here has (`maximize`, `dampening`).
        """
        handle = self.register_load_state_dict_pre_hook(loading.kept)  # after the user's hooks
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
