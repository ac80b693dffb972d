"""Every optimizer against what TensorFlow computed (tests/golden/make.py), bit for bit on every executor."""

import itertools
import json
import platform
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from golden.cases import CASES
from golden.draw import FOLDER, Case, Gradient, Slices, checksum, initial, path, steps
from torch import Tensor

from fused_kopt import optimizers
from fused_kopt.hyperparameters import Step
from fused_kopt.optimizer import Optimizer

SHORT = 10  # steps; the interpreter takes 35 ms a step, hence 8 minutes for all cases in full
STRIDE = 5  # every so many cases run in full in the interpreter too; odd, because the dtypes alternate


@pytest.mark.parametrize("executor", ["reference", "triton"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden(case: Case, executor: str, request: pytest.FixtureRequest) -> None:
    recorded = load(case)
    assert checksum(case) == recorded["inputs"], "the inputs are not those that were recorded"
    device = "cuda" if executor == "triton" and torch.cuda.is_available() else "cpu"
    optimizer = build(case, executor)
    variables = [torch.tensor(value, device=device) for value in initial(case)]
    last = last_step(case, executor, request.config.getoption("--slow", default=False))
    for step, pairs in enumerate(itertools.islice(steps(case), last), start=1):
        optimizer.apply_gradients([(tensor(gradient, device), variables[index]) for gradient, index in pairs])
        if step in case.snapshots:
            for index, variable in enumerate(variables):
                compare(case, f"variable/{step}/{index}", variable.cpu().numpy(), recorded)
    if last == case.steps:
        compare_weights(case, optimizer.get_weights(), recorded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.9, 0.95, 0.99, 0.999])
def test_A22_powers_of_beta_are_tensorflows(beta: float, dtype: torch.dtype) -> None:
    with np.load(FOLDER / "powers.npz") as file:
        recorded = file[f"{beta}/{str(dtype).removeprefix('torch.')}"]
    steps_of = [Step(iterations, dtype) for iterations in range(len(recorded))]
    got = np.array([step.power(step.number(beta), step.t) for step in steps_of])
    got[got < np.finfo(got.dtype).tiny] = 0  # TensorFlow flushes subnormals; 1 - beta ** t is 1 either way
    if platform.libc_ver()[0] == "glibc":
        assert np.array_equal(got, recorded)
    else:  # another C library may round powf the other way
        assert ulps(got, recorded) <= 1


def last_step(case: Case, executor: str, slow: bool) -> int:
    interpreted = executor == "triton" and not torch.cuda.is_available()
    full = slow or not interpreted or CASES.index(case) % STRIDE == 0
    return case.steps if full else SHORT


def compare_weights(case: Case, weights: Sequence[np.ndarray], recorded: dict[str, np.ndarray]) -> None:
    assert len(weights) == sum(key.startswith("weight/") for key in recorded)
    for position, weight in enumerate(weights):
        compare(case, f"weight/{position}", np.asarray(weight), recorded)


def load(case: Case) -> dict[str, np.ndarray]:
    """What TensorFlow computed: "variable/<step>/<index>", "weight/<position>" and "inputs" (the checksum of the inputs)."""
    prefix = case.name + "/"
    return {key.removeprefix(prefix): value for key, value in _unpack(case.optimizer).items() if key.startswith(prefix)}


@cache
def _unpack(optimizer: str) -> dict[str, np.ndarray]:
    """A file holds one flat pool per dtype and a table of contents: 5000 zip members would weigh as much as the numbers."""
    with np.load(path(optimizer)) as file:
        pools = {name: file[name] for name in file.files}
    contents = json.loads(str(pools["contents"]))
    return {key: pools[dtype][start : start + int(np.prod(shape))].reshape(shape) for key, dtype, start, shape in contents}


def build(case: Case, executor: str) -> Optimizer:
    config = dict(case.config)
    if isinstance(config.get("learning_rate"), dict):
        config["learning_rate"] = optimizers.schedules.deserialize(config["learning_rate"])
    return getattr(optimizers, case.optimizer)(**config, executor=executor)


def tensor(gradient: Gradient, device: str) -> Tensor | None:
    if gradient is None:
        return None
    if not isinstance(gradient, Slices):
        return torch.tensor(gradient, device=device)
    indices, values = (torch.tensor(part, device=device) for part in (gradient.indices, gradient.values))
    return torch.sparse_coo_tensor(indices[None], values, gradient.shape, check_invariants=True)


def compare(case: Case, key: str, got: np.ndarray, recorded: dict[str, np.ndarray]) -> None:
    expected = recorded[key]
    where = f"{case.name}: {key}"
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), where
    differing = int(np.sum(got != expected))
    if case.ulp == 0 or expected.dtype.kind != "f":
        assert differing == 0, f"{where}: {differing} of {expected.size} elements differ, the largest by {ulps(got, expected):g} ulp"
    else:
        assert ulps(got, expected) <= case.ulp, f"{where}: {ulps(got, expected):g} ulp, {differing} of {expected.size} elements differ"


def ulps(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference in ulps of the largest magnitude."""
    return float(np.max(np.abs(got - expected)) / np.spacing(np.max(np.abs(expected))))
