"""What the reliability tests share: an optimizer per rule, variables between guard bytes, bits, subprocesses."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fused_kopt
from fused_kopt import execute, optimizers
from fused_kopt.kernels import launch
from fused_kopt.optimizer import Optimizer

EXECUTORS = ("reference", "triton")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

# One configuration per rule. Epsilons and regularization are large enough to show in the bits.
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {}),
    "momentum": ("SGD", {"momentum": 0.9}),
    "nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "rmsprop": ("RMSprop", {}),
    "centered": ("RMSprop", {"centered": True, "epsilon": 1e-3}),
    "with_momentum": ("RMSprop", {"momentum": 0.9}),
    "centered_with_momentum": ("RMSprop", {"momentum": 0.9, "centered": True, "epsilon": 1e-3}),
    "adam": ("Adam", {}),
    "amsgrad": ("Adam", {"amsgrad": True}),
    "adadelta": ("Adadelta", {"learning_rate": 1.0}),
    "adagrad": ("Adagrad", {}),
    "adamax": ("Adamax", {}),
    "nadam": ("Nadam", {}),
    "ftrl": ("Ftrl", {"l1_regularization_strength": 0.01, "l2_regularization_strength": 0.1}),
    "ftrl_shrunk": ("Ftrl", {"l2_shrinkage_regularization_strength": 0.1, "beta": 0.1}),
    "ftrl_power": ("Ftrl", {"learning_rate_power": -0.4}),
    "ftrl_power_shrunk": ("Ftrl", {"learning_rate_power": -0.4, "l2_shrinkage_regularization_strength": 0.1}),
    "lion": ("Lion", {"learning_rate": 0.01}),
}
SOME_RULES = ("momentum", "amsgrad", "ftrl")  # one, three and interleaved slots


def build(rule: str, executor: str = "reference", **options: Any) -> Optimizer:
    cls, config = RULES[rule]
    optimizer: Optimizer = getattr(optimizers, cls)(**{**config, **options}, executor=executor)
    return optimizer


def bits(tensor: Any) -> np.ndarray:
    """The bit patterns of a tensor or array in logical order, every NaN as the same one."""
    tensor = torch.as_tensor(tensor).detach()
    tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor)  # an empty tensor may have strange strides
    patterns = tensor.reshape(-1).view(torch.uint8).numpy().view(BITS[tensor.element_size()]).reshape(tensor.shape).copy()
    if tensor.dtype.is_floating_point:
        patterns[tensor.isnan().numpy()] = np.iinfo(patterns.dtype).max
    return patterns


def state(optimizer: Optimizer, variables: Sequence[Tensor]) -> list[np.ndarray]:
    """The bits of all variables and weights."""
    return [bits(t) for t in (*variables, *optimizer.weights)]


def assert_same(first: Sequence[np.ndarray], second: Sequence[np.ndarray], what: object = "") -> None:
    assert len(first) == len(second), what
    for position, (a, b) in enumerate(zip(first, second, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), (what, position)
        assert np.array_equal(a, b), f"{what} tensor {position}: {np.sum(a != b)} of {a.size} elements differ"


def run(
    rule: str, executor: str, initial: Sequence[Tensor], gradients: Sequence[Sequence[Any]], **options: Any
) -> tuple[Optimizer, list[Tensor]]:
    """The optimizer and the variables (copies of `initial`) after one step per entry of `gradients`."""
    optimizer = build(rule, executor, **options)
    variables = [v.clone() for v in initial]
    for step in gradients:
        optimizer.apply_gradients(list(zip(step, variables, strict=True)))
    return optimizer, variables


def outcome(rule: str, executor: str, initial: Sequence[Tensor], gradients: Sequence[Sequence[Any]], **options: Any) -> list[np.ndarray]:
    """The bits after `run`."""
    return state(*run(rule, executor, initial, gradients, **options))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Guarded:
    """A variable in the middle of a larger buffer whose other bytes must never change."""

    def __init__(self, value: Tensor, offset: int = 0, band: int = 64) -> None:
        # offset: elements past a 64-byte boundary
        size = value.element_size()
        self.raw = torch.full((2 * band + 64 + (value.numel() + offset) * size,), 0xA5, dtype=torch.uint8, device=value.device)
        self.start = band + (-(self.raw.data_ptr() + band)) % 64 + offset * size
        self.end = self.start + value.numel() * size
        self.variable = self.raw[self.start : self.end].view(value.dtype).view(value.shape)
        self.variable.copy_(value)

    def intact(self) -> bool:
        return bool((self.raw[: self.start] == 0xA5).all() and (self.raw[self.end :] == 0xA5).all())


@contextmanager
def small_blocks(block: int = 16) -> Iterator[int]:
    """Interpreter programs of `block` elements, so that a few elements make several programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "INTERPRETER_BLOCK", block)
        yield block


def after_each(patch: pytest.MonkeyPatch, damage: Callable[[Any], object]) -> None:
    """Launches of every executor but the reference are followed by `damage` to their update."""
    honest = execute.bind

    def bind(update: Any, executor: Any) -> Any:
        launch = honest(update, executor)
        return lambda scalars, factors: (launch(scalars, factors), damage(update))

    patch.setattr(execute, "bind", bind)


@contextmanager
def launches(expected: int) -> Iterator[None]:
    """Asserts how many kernels are launched inside."""
    before = fused_kopt.stats().launches
    yield
    assert fused_kopt.stats().launches - before == expected


def python(code: str, *arguments: str, **environment: str) -> str:
    """What a fresh interpreter prints when it runs `code`; fails with its errors."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), **environment}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout


def in_threads(work: Callable[[int], None], count: int = 8) -> None:
    """Run `work` of 0 to `count` - 1 at once; fails where one raises or hangs."""
    errors: list[BaseException] = []
    start = threading.Barrier(count)

    def guarded(index: int) -> None:
        try:
            start.wait(60)
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == []
    assert not any(thread.is_alive() for thread in threads)
