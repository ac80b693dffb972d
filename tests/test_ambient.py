"""What torch is set to around a call must not matter: modes, default dtypes and devices."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support import assert_same, randn, state
from test_weights import make

from fused_kopt import GradientTape


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


AMBIENT: dict[str, Callable[[], Any]] = {
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "tape": GradientTape,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "device context": lambda: torch.device("meta"),  # as `with torch.device("cuda")` would, it sends new tensors elsewhere
    "default device": lambda: default_device("meta"),
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "numpy errors": lambda: np.errstate(all="raise"),
}
RUNS = [("SGD momentum", "reference"), ("RMSprop centered", "reference"), ("Nadam", "reference"), ("Ftrl", "reference"), ("Adam", "triton")]


def outcome(key: str, executor: str, around: Any = None) -> list[np.ndarray]:
    """The bits after four steps: dense of three dtypes, sparse, clipped, with a late variable; `around` enters before step i."""
    optimizer = make(key, executor=executor, clipvalue=1.5, global_clipnorm=2.0, decay=0.1)
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float32]
    variables = [randn(5, 2, seed=i, dtype=dtype) for i, dtype in enumerate(dtypes)]
    given = [[randn(5, 2, seed=10 * i + j, dtype=dtype) for j, dtype in enumerate(dtypes)] for i in range(4)]
    for step in range(2, 4):
        given[step][0] = torch.sparse_coo_tensor([[1, 3, 1]], randn(3, 2, seed=step), (5, 2), check_invariants=True)
    for step in range(4):
        with (around or {}).get(step, contextlib.nullcontext)():
            pairs = list(zip(given[step], variables, strict=True))
            optimizer.apply_gradients(pairs if step else pairs[:3])
    return state(optimizer, variables)


_plain = functools.cache(outcome)


@pytest.mark.parametrize("steps", [(0,), (1, 3), (2,)], ids=str)
@pytest.mark.parametrize("mode", AMBIENT)
@pytest.mark.parametrize(("key", "executor"), RUNS)
def test_modes_and_defaults_change_no_bit(key: str, executor: str, mode: str, steps: tuple[int, ...]) -> None:
    assert_same(outcome(key, executor, dict.fromkeys(steps, AMBIENT[mode])), _plain(key, executor))


@pytest.mark.parametrize("mode", AMBIENT)
def test_what_is_made_on_first_read_belongs_to_no_mode(mode: str) -> None:
    optimizer, twin = make("Nadam"), make("Nadam")
    variable, same = randn(3), randn(3)
    with AMBIENT[mode]():
        made = [optimizer.iterations, optimizer.learning_rate, optimizer.beta_1, optimizer.add_slot(variable, "own", 2.0)]
    assert [(t.device.type, t.dtype, t.is_inference(), t.requires_grad) for t in made[1:]] == [("cpu", torch.float32, False, False)] * 3
    assert (optimizer.iterations.device.type, optimizer.iterations.dtype, optimizer.iterations.is_inference()) == (
        "cpu",
        torch.int64,
        False,
    )
    optimizer.learning_rate = twin.learning_rate = 0.5
    for o, v in ((optimizer, variable), (twin, same)):
        o.apply_gradients([(randn(3, seed=1), v)])
    assert torch.equal(variable, same)
