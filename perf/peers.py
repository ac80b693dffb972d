"""The peers, each used as its own documentation shows. What is not installed is skipped with that reason."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from perf import keras3
from perf.cases import RATE, SLOTS, Case, Runner, Tensors
from perf.providers import Cost, Provider

COMPILED_TENSORS = {"cpu": 30, "cuda": 64}  # beyond, torch.compile builds for minutes
WARM_STEPS = 3  # a CUDA graph is captured after so many steps

TORCH: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "adam": (torch.optim.Adam, {}),
    "adadelta": (torch.optim.Adadelta, {}),
    "adagrad": (torch.optim.Adagrad, {}),
    "adamax": (torch.optim.Adamax, {}),
    "nadam": (torch.optim.NAdam, {}),
}
FUSED = ("sgd", "momentum", "adam", "adagrad")
# what makes torch's steps capturable; Adagrad is not
CAPTURED: dict[str, dict[str, Any]] = {
    "sgd": {"fused": True},
    "momentum": {"fused": True},
    "adam": {"fused": True, "capturable": True},
    **{name: {"foreach": True, "capturable": True} for name in ("rmsprop", "adadelta", "adamax", "nadam")},
}
OPTIMI: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {}),
    "momentum": ("SGD", {"momentum": 0.9}),
    "adam": ("Adam", {"betas": (0.9, 0.999)}),
    "lion": ("Lion", {}),
}
FLASH: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("FlashSGD", {}),
    "momentum": ("FlashSGD", {"momentum": 0.9}),
    "adam": ("FlashAdam", {}),
    "lion": ("FlashLion", {}),
}


def clipped(case: Case, tensors: Tensors, step: Callable[[], object]) -> Runner:
    """A step of the torch.optim kind, after torch's clipping where the case wants it."""
    limit = case.clip
    if limit is None:
        return tensors.runner(step)

    def both() -> None:
        clip_grad_norm_(tensors.variables, limit)
        step()

    return tensors.runner(both)


def missing(package: str, case: Case, covered: dict[str, Any]) -> str | None:
    """Why a package that may not be installed does not serve the case, or None."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    return None if case.optimizer in covered else f"{package} has no {case.optimizer}"


class Torch(Provider):
    """torch.optim: foreach, fused, torch.compile'd, or replayed as a CUDA graph."""

    name = "torch"

    def unsuitable(self, case: Case) -> str | None:
        if case.optimizer not in TORCH:
            return f"torch.optim has no {case.optimizer}"
        if self.executor == "fused" and case.optimizer not in FUSED:
            return f"torch's fused optimizers are {', '.join(FUSED)}"
        limit = COMPILED_TENSORS.get(case.device.type, 0)
        if self.executor == "compile" and len(case.shapes) > limit:
            return f"torch.compile builds for minutes beyond {limit} tensors"
        return self._why_not_graph(case) if self.executor == "graph" else None

    def _why_not_graph(self, case: Case) -> str | None:
        if case.device.type != "cuda":
            return "CUDA graphs need a GPU"
        if case.variant != "plain":
            return "the captured step is the plain one"
        return None if case.optimizer in CAPTURED else f"torch's {case.optimizer} cannot be captured"

    def slot_bytes(self, case: Case) -> float:
        return case.dtype.itemsize

    def make(self, case: Case, tensors: Tensors) -> Runner:
        cls, options = TORCH[case.optimizer]
        build: Any = cls
        if self.executor == "graph":
            return tensors.runner(captured(build(tensors.variables, lr=RATE, **options, **CAPTURED[case.optimizer])))
        if self.executor == "compile":
            torch.compiler.reset()  # variants are counted per code object, which all optimizers share
            optimizer = build(tensors.variables, lr=torch.tensor(RATE), **options)
            return clipped(case, tensors, torch.compile(optimizer.step))
        mode = {"fused": True} if self.executor == "fused" else {"foreach": True}
        return clipped(case, tensors, build(tensors.variables, lr=RATE, **options, **mode).step)


def captured(optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    """The replay of one step, captured after the steps that create its state on a side stream, as torch's notes ask."""
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_STEPS):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()

    def replay() -> torch.optim.Optimizer:
        graph.replay()
        return optimizer  # the graph writes its state, which must live as long

    return replay


class Optimi(Provider):
    """optimi, tensor by tensor in torch or Triton; without its Kahan sums, which would be one more slot.

    Its foreach, which is to go, is left out: it overwrites the gradients that all providers share.
    """

    name = "optimi"

    def unsuitable(self, case: Case) -> str | None:
        if self.executor == "triton" and case.device.type == "cpu":
            return "optimi's Triton kernels need a GPU"
        return missing("optimi", case, OPTIMI)

    def slot_bytes(self, case: Case) -> float:
        return case.dtype.itemsize

    def make(self, case: Case, tensors: Tensors) -> Runner:
        name, options = OPTIMI[case.optimizer]
        cls: Any = getattr(importlib.import_module("optimi"), name)
        optimizer = cls(tensors.variables, lr=RATE, kahan_sum=False, foreach=False, triton=self.executor == "triton", **options)
        return clipped(case, tensors, optimizer.step)


class Flash(Provider):
    """flashoptim: 8-bit slots in blocks of 32, and 24-bit variables where they are stored as bfloat16."""

    name = "flashoptim"

    def unsuitable(self, case: Case) -> str | None:
        return missing("flashoptim", case, FLASH) or (None if case.device.type == "cuda" else "flashoptim needs a GPU")

    def slot_bytes(self, case: Case) -> float:
        remainder = 0 if case.dtype == torch.float32 else 1 / max(1, SLOTS[case.optimizer])
        return 1 + 2 / 32 + remainder

    def make(self, case: Case, tensors: Tensors) -> Runner:
        name, options = FLASH[case.optimizer]
        cls: Any = getattr(importlib.import_module("flashoptim"), name)
        bits = None if case.dtype == torch.float32 else 24
        return clipped(case, tensors, cls(tensors.variables, lr=RATE, master_weight_bits=bits, **options).step)


# nanoseconds per element, microseconds per tensor, bytes of temporaries per element: see Cost
PEERS: tuple[Provider, ...] = (
    Torch("foreach", Cost(9, 10, 8)),
    Torch("fused", Cost(1.3, 3)),
    Torch("compile", Cost(1.3, 30)),
    Torch("graph", Cost(1.3, 3)),
    keras3.STOCK,
    keras3.SUBCLASS,
    Optimi("loop", Cost(9, 20, 4)),
    Optimi("triton", Cost(1.3, 30)),
    Flash("triton", Cost(1.3, 30)),
)
