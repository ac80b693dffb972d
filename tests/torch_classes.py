"""What the tests of fused_kopt.torch_optim share: every class in its configurations, the same one with Keras's methods, models."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from support import bits, randn
from torch import Tensor

from fused_kopt import optimizers, torch_optim

SHAPES: Sequence[tuple[int, ...]] = ((), (0,), (1,), (33,), (4, 3, 5))


class Case(NamedTuple):
    """A class with arguments that change its rule, and those of fused_kopt.optimizers' class that compute the same."""

    cls: str
    keywords: dict[str, Any]
    keras: tuple[str, dict[str, Any]]


CASES = {
    "sgd": Case("SGD", {}, ("SGD", {})),
    "momentum": Case("SGD", {"momentum": 0.9}, ("SGD", {"momentum": 0.9})),
    "nesterov": Case("SGD", {"momentum": 0.9, "nesterov": True}, ("SGD", {"momentum": 0.9, "nesterov": True})),
    "rmsprop": Case("RMSprop", {"alpha": 0.8}, ("RMSprop", {"rho": 0.8})),
    "rmsprop_all": Case(
        "RMSprop",
        {"momentum": 0.9, "centered": True, "eps": 1e-3},
        ("RMSprop", {"momentum": 0.9, "centered": True, "epsilon": 1e-3}),
    ),
    "adam": Case("Adam", {"betas": (0.8, 0.99)}, ("Adam", {"beta_1": 0.8, "beta_2": 0.99})),
    "amsgrad": Case("Adam", {"amsgrad": True}, ("Adam", {"amsgrad": True})),
    "adamw": Case("AdamW", {"weight_decay": 0.0}, ("Adam", {})),
    "adadelta": Case("Adadelta", {"lr": 1.0}, ("Adadelta", {"learning_rate": 1.0})),
    "adagrad": Case("Adagrad", {"lr_decay": 0.1}, ("Adagrad", {"decay": 0.1})),
    "adamax": Case("Adamax", {}, ("Adamax", {})),
    "nadam": Case("Nadam", {}, ("Nadam", {})),
    "ftrl": Case("Ftrl", {"l1_regularization_strength": 0.01, "beta": 0.1}, ("Ftrl", {"l1_regularization_strength": 0.01, "beta": 0.1})),
    "lion": Case("Lion", {}, ("Lion", {})),
}
CLASSES = [name for name in torch_optim.__all__ if name != "Optimizer"]
ONE_EACH = {case.cls: name for name, case in CASES.items() if name not in ("sgd", "rmsprop", "amsgrad")}


def build(case: str, params: Any, **more: Any) -> torch_optim.Optimizer:
    chosen = CASES[case]
    made: torch_optim.Optimizer = getattr(torch_optim, chosen.cls)(params, **{**chosen.keywords, **more})
    return made


def keras(case: str, **more: Any) -> optimizers.Optimizer:
    name, keywords = CASES[case].keras
    made: optimizers.Optimizer = getattr(optimizers, name)(**keywords, **more)
    return made


def parameters(dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(randn(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(shapes)]


def give(params: Sequence[Tensor], step: int) -> None:
    """Gradients of a step, in new memory as after zero_grad()."""
    for i, param in enumerate(params):
        param.grad = randn(*param.shape, seed=1000 * step + i, dtype=param.dtype).to(param.device)


def steps(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], which: Sequence[int]) -> None:
    for step in which:
        give(params, step)
        optimizer.step()


def snapshot(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[Any]:
    """The bits of parameters and states."""
    states = [optimizer.state[p][name] for p in params for name in sorted(optimizer.state[p])]
    return [bits(tensor) for tensor in (*params, *states)]


def mlp(seed: int = 0) -> torch.nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def closure_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(randn(6, 4, seed=step)).square().mean()
        loss.backward()
        return loss

    return closure
