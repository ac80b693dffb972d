"""The schedules against what TensorFlow computed (tests/golden/make_schedules.py), their configs and their errors."""

import json
import platform
from pathlib import Path

import numpy as np
import pytest
import torch

from fused_kopt.optimizers import schedules
from fused_kopt.optimizers.schedules import (
    CosineDecay,
    CosineDecayRestarts,
    ExponentialDecay,
    InverseTimeDecay,
    PiecewiseConstantDecay,
    PolynomialDecay,
)

with np.load(Path(__file__).parent / "golden" / "schedules.npz") as file:
    GOLDEN = {name: file[name] for name in file.files}
ABOUT = json.loads(str(GOLDEN.pop("about")))
STEP = {
    "float32": lambda step: torch.tensor(step, dtype=torch.float32),
    "float64": lambda step: torch.tensor(step, dtype=torch.float64),
    "int": int,
}
CASES = [pytest.param(index, dtype, id=f"{index}-{name}-{dtype}") for index, (name, _) in enumerate(ABOUT["configs"]) for dtype in GOLDEN]
COSINES = [
    case for case in CASES if "Cosine" in case.id and "float16" not in case.id
]  # in float16, 10**7 steps are inf: alpha has no effect


def build(index, dtype, **changes):
    name, config = ABOUT["configs"][index]
    kind = np.dtype(dtype).type
    if name == "PiecewiseConstantDecay":
        config = {**config, "values": [kind(value) for value in config["values"]]}
    else:
        config = {**config, "initial_learning_rate": kind(ABOUT["initial"])}
    return getattr(schedules, name)(**{**config, **changes})


def errors(index, dtype, schedule, offset=0):
    """The largest error over all steps and kinds of step, in ulp of the rate (cosines: of the largest rate of the schedule)."""
    want = GOLDEN[dtype][index]
    got = np.array([[schedule(STEP[kind](step + offset)).numpy() for step in ABOUT["steps"]] for kind in ABOUT["kinds"]])
    assert got.dtype == want.dtype
    if dtype != "float16":  # TensorFlow computes float16 in float32 and keeps its subnormals, and flushes all others
        got[np.abs(got) < np.finfo(dtype).tiny] = 0
    scale = np.abs(want)
    if "Cosine" in ABOUT["configs"][index][0]:
        scale = np.full_like(scale, scale[np.isfinite(scale)].max())
    with np.errstate(all="ignore"):
        units = np.abs(got.astype(np.float64) - want) / np.spacing(scale)
    units[np.isnan(units)] = np.inf
    units[(got == want) | (np.isnan(got) & np.isnan(want))] = 0
    return units.max()


def is_exact(index):
    name, config = ABOUT["configs"][index]
    return name in ("InverseTimeDecay", "PiecewiseConstantDecay") or (name == "PolynomialDecay" and config.get("power", 1.0) == 1.0)


@pytest.mark.parametrize(("index", "dtype"), CASES)
def test_golden(index, dtype):
    """Equal: 92,000 values of random schedules were. With another C library than glibc, pow, cos and log may differ in the last bit.

    For the cosines that is the last bit of the largest rate, because 1 + cos cancels.
    """
    glibc = platform.libc_ver()[0] == "glibc"
    assert errors(index, dtype, build(index, dtype)) <= (0 if is_exact(index) or glibc else 1)


@pytest.mark.parametrize(("index", "dtype"), CASES)
def test_control_one_step_off_fails_the_bound(index, dtype):
    assert errors(index, dtype, build(index, dtype), offset=1) > 1


@pytest.mark.parametrize(("index", "dtype"), COSINES)
def test_control_wrong_alpha_fails_the_bound(index, dtype):
    assert errors(index, dtype, build(index, dtype, alpha=ABOUT["configs"][index][1].get("alpha", 0.0) + 0.01)) > 1


@pytest.mark.parametrize("index", [i for i in range(len(ABOUT["configs"])) if is_exact(i) and ABOUT["configs"][i][0] == "InverseTimeDecay"])
def test_control_one_rounding_at_the_end_is_not_equal(index):
    double = build(index, np.float64)
    wrong = [[np.float32(double(STEP[kind](step)).item()) for step in ABOUT["steps"]] for kind in ABOUT["kinds"]]
    assert ABOUT["configs"][index][1]["decay_steps"] == 0 or (np.array(wrong) != GOLDEN["float32"][index]).any()


# what TensorFlow 2.15.1 returned
@pytest.mark.parametrize(
    ("schedule", "step", "value"),
    [
        (ExponentialDecay(np.float64(0.1), 10, 0.96), 10, 0.0959999978542328),  # 0.96 passes through float32
        (InverseTimeDecay(np.float64(1), 1, 1.0), 0.1, 0.9090909078594082),  # and so does a Python float step
        (PolynomialDecay(np.float64(0.1), 0.1, 0.01, cycle=True), np.float64(0.1), 0.010000001117587073),  # 0.1 / 0.1 is 1, not 0.99..
        (PolynomialDecay(np.float64(0.1), 0.1, 0.01, cycle=True), 0.1, 0.054999999888241294),
        (CosineDecay(np.float64(1), 10, alpha=0.1), 10, 0.1),  # alpha does not pass through float32 here
        (CosineDecayRestarts(np.float64(1), 10, alpha=0.1), 5, 0.5500000007450581),  # but here it does
        (CosineDecay(1.0, 10, alpha=np.float32(0.1)), 5, np.float32(0.54999995)),
        (ExponentialDecay(1.0, 0, 0.5), 0, np.nan),
        (ExponentialDecay(1.0, 0, 0.5), 1, 0.0),
        (InverseTimeDecay(1.0, -5, 0.5), 7, np.float32(3.3333333)),
        (PolynomialDecay(1.0, 0, cycle=True), 7, np.nan),
        (PolynomialDecay(1.0, -5, power=0.5), 7, np.float32(1e-4)),
        (PolynomialDecay(1.0, -5, cycle=True), 1, -np.inf),
        (PolynomialDecay(1.0, 5), float("nan"), np.nan),
        (CosineDecay(1.0, 0), 0, np.nan),
        (CosineDecay(1.0, -5), 7, 0.0),
        (CosineDecayRestarts(1.0, -5, t_mul=1.0), 7, np.float32(0.3454914)),
        (CosineDecayRestarts(1.0, -5), 7, np.nan),
        (CosineDecayRestarts(1.0, 10, t_mul=0.0), 5, np.float32(0.49999997)),
        (PiecewiseConstantDecay([5.7], [1.0, 2.0]), 6, 2.0),
        (PiecewiseConstantDecay([5], [1, 2]), 6, np.int32(2)),
        (PiecewiseConstantDecay([5], [1, 2**40]), 6, np.int64(2**40)),
        (PiecewiseConstantDecay([20, 10], [1.0, 2.0, 3.0]), 5, 1.0),  # unsorted boundaries matter only where intervals overlap
        (PiecewiseConstantDecay([20, 10], [1.0, 2.0, 3.0]), 25, 3.0),
        (PiecewiseConstantDecay([10, 10], [1.0, 2.0, 3.0]), 11, 3.0),
        (PiecewiseConstantDecay([5], [1.0, 2.0]), float("nan"), 1.0),
        (PiecewiseConstantDecay([0.1], [1.0, 2.0]), torch.tensor(0.1, dtype=torch.float64), 1.0),  # the boundary is float32(0.1) > 0.1
        (PiecewiseConstantDecay([2049], [1.0, 2.0]), torch.tensor(2049, dtype=torch.float16), 1.0),
    ],
)
def test_measured(schedule, step, value):
    result = schedule(step)
    expected = np.asarray(value if isinstance(value, np.generic) or result.dtype == torch.float64 else np.float32(value))
    np.testing.assert_array_equal(result.numpy(), expected, strict=True)


def test_accepts_boundaries_on_which_keras_fails():
    assert PiecewiseConstantDecay([], [0.5])(3) == 0.5  # IndexError
    assert PiecewiseConstantDecay([1e300], [1.0, 2.0])(1e30) == 1.0  # ValueError: no float32


@pytest.mark.parametrize("boundary", [2**24, 2**31, 2**53 - 1])
@pytest.mark.parametrize("kind", [int, np.int64, lambda step: torch.tensor(step, dtype=torch.int64)])
@pytest.mark.parametrize("given_as", [int, float])  # Keras rounds a float boundary to float32 even for an integer step; we do not
def test_A23_boundaries_are_exact_for_integer_steps(boundary, kind, given_as):
    schedule = PiecewiseConstantDecay([given_as(boundary)], [1.0, 2.0])
    assert [schedule(kind(boundary + near)).item() for near in (-1, 0, 1)] == [1.0, 1.0, 2.0]


@pytest.mark.parametrize("boundary", [2**24, 2**31, 2**53 - 1])
def test_A23_integer_boundaries_are_exact_for_float64_steps(boundary):
    schedule = PiecewiseConstantDecay([boundary], [1.0, 2.0])
    assert [schedule(STEP["float64"](boundary + near)).item() for near in (-1, 0, 1)] == [1.0, 1.0, 2.0]


def test_A23_a_float32_step_keeps_the_contract_of_keras():
    schedule = PiecewiseConstantDecay([2**24], [1.0, 2.0])
    assert [schedule(STEP["float32"](2**24 + near)).item() for near in (0, 1, 2)] == [1.0, 1.0, 2.0]


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("rate", "dtype"),
    [
        (0.5, torch.float32),
        (np.float16(0.5), torch.float16),
        (np.float32(0.5), torch.float32),
        (np.float64(0.5), torch.float64),
        (torch.tensor(0.5, dtype=torch.float32, requires_grad=True), torch.float32),
        (torch.tensor(0.5, dtype=torch.float64), torch.float64),
        (torch.tensor(0.5, dtype=torch.bfloat16), torch.float32),
    ],
)
def test_result_is_a_cpu_scalar_of_the_initial_dtype(rate, dtype, default):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        results = [InverseTimeDecay(rate, 2, 1.0)(2), PiecewiseConstantDecay([1], [1.0, rate])(2)]
    finally:
        torch.set_default_dtype(before)
    assert [result.dtype for result in results] == [dtype, dtype]
    assert all(result.ndim == 0 and result.device.type == "cpu" and not result.requires_grad for result in results)
    assert results[0] == 0.25


@pytest.mark.parametrize(
    "kind", [float, np.int32, np.float64, np.array, lambda step: torch.tensor(step, dtype=torch.bfloat16), torch.tensor]
)
def test_every_kind_of_step(kind):
    schedule = ExponentialDecay(0.1, 7, 0.9)
    assert [schedule(kind(step)) for step in range(20)] == [schedule(step) for step in range(20)]
