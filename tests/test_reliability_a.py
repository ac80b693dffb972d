"""Catalogue A: gradient values and arithmetic."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support import DTYPES, EXECUTORS, RULES, assert_same, bits, build, outcome, randn, run, small_blocks, state
from torch import Tensor

from fused_kopt import Adagrad, Adam, RMSprop, execute
from fused_kopt.buffers import Bucket

LARGE_COUNTS = (2**24 - 1, 2**31 - 1, 2**40, 10**12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_A1_non_finite_gradients_give_the_ieee_result(rule: str, dtype: torch.dtype) -> None:
    initial, clean = [randn(37, dtype=dtype)], randn(37, seed=1, dtype=dtype)
    bad = clean.clone()
    where = [0, 7, 15, 16, 35, 36]  # first and last of a block, inside, last of the tail
    bad[where] = torch.tensor([math.nan, math.inf, -math.inf, math.inf, -math.inf, math.nan], dtype=dtype)
    steps = [[bad], [clean]]
    with small_blocks(16):
        expected, actual = (outcome(rule, executor, initial, steps) for executor in EXECUTORS)
    assert_same(expected, actual)
    others = np.delete(np.arange(37), where)
    undisturbed = outcome(rule, "reference", initial, [[clean], [clean]])
    for first, second in zip(actual, undisturbed, strict=True):
        if first.shape:
            assert np.array_equal(first[others], second[others])


@pytest.mark.parametrize("executor", EXECUTORS)
def test_A5_unscaling_leaves_the_gradients_as_they_are(executor: str) -> None:
    scaled = randn(100, seed=1, dtype=torch.float16)
    before = bits(scaled)
    optimizer, variable = build("adam", executor), randn(100)
    optimizer.grad_scale = 2.0**-24  # in float16 every product would be subnormal
    optimizer.apply_gradients([(scaled, variable)])
    assert np.array_equal(bits(scaled), before)
    expected = outcome("adam", "reference", [randn(100)], [[scaled.float() * 2.0**-24]])
    assert_same(state(optimizer, [variable]), expected)


@pytest.mark.parametrize("clip", ["clipvalue", "clipnorm", "global_clipnorm"])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_A6_clipping_sees_the_unscaled_gradient(executor: str, clip: str) -> None:
    optimizer, variable = build("sgd", executor, **{clip: 0.5}), randn(100)
    optimizer.grad_scale = 2.0**-100
    optimizer.apply_gradients([(randn(100, seed=1) * 2.0**100, variable)])  # the scaled norm overflows float32
    assert_same(state(optimizer, [variable]), outcome("sgd", "reference", [randn(100)], [[randn(100, seed=1)]], **{clip: 0.5}))


@pytest.mark.parametrize(
    ("clip", "size", "limit"),
    [("clipnorm", 3e19, 1.0), ("global_clipnorm", 3e19, 1.0), ("clipnorm", 3e-20, 5e-19), ("global_clipnorm", 1e-30, 1e-33)],
)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_A7_norms_neither_overflow_nor_underflow(executor: str, clip: str, size: float, limit: float) -> None:
    variable = torch.zeros(1000)
    build("sgd", executor, learning_rate=1.0, **{clip: limit}).apply_gradients([(torch.full((1000,), size), variable)])
    assert np.allclose(variable.numpy(), -limit / math.sqrt(1000), rtol=1e-6, atol=0)


def test_A8_the_norm_is_the_same_in_every_run() -> None:
    initial = [randn(n, seed=n) for n in (1, 70_000, 3, 40_001)]
    gradients = [randn(v.numel(), seed=7 + i) * 10**i for i, v in enumerate(initial)]
    threads = torch.get_num_threads()
    try:
        expected = outcome("sgd", "reference", initial, [gradients], global_clipnorm=0.1)
        for run_ in range(20):
            torch.set_num_threads(1 + run_ % 2)
            assert_same(outcome("sgd", "reference", initial, [gradients], global_clipnorm=0.1), expected)
    finally:
        torch.set_num_threads(threads)


def test_A9_underflowing_squares_give_the_ieee_result() -> None:
    steps = [[torch.full((5,), 1e-23)]]
    expected, actual = (outcome("adam", executor, [torch.zeros(5)], steps, epsilon=1e-30) for executor in EXECUTORS)
    assert_same(expected, actual)
    optimizer, (variable,) = run("adam", "triton", [torch.zeros(5)], steps, epsilon=1e-30)
    assert (optimizer.get_slot(variable, "v") == 0).all()
    assert (variable < -300).all()  # as in Keras: epsilon is all that is left to divide by


@pytest.mark.parametrize("executor", EXECUTORS)
def test_A10_half_precision_variables_keep_float32_slots_and_epsilon(executor: str) -> None:
    gradient = torch.full((5,), 1e-4, dtype=torch.float16)  # squared it is 0 in float16
    optimizer, (variable,) = run("adam", executor, [torch.ones(5, dtype=torch.float16)], [[gradient]] * 3)
    assert all(w.dtype == torch.float32 for w in optimizer.weights[1:])
    exact = torch.ones(5)
    wide = build("adam")
    for _ in range(3):
        wide.apply_gradients([(gradient.float(), exact)])
        exact.copy_(exact.half())
    assert np.array_equal(bits(variable), bits(exact.half()))


@pytest.mark.parametrize("cls", [Adam, RMSprop, Adagrad])
def test_A11_epsilon_of_zero_means_the_default_and_a_vanishing_one_divides_zero_by_zero(cls: Any) -> None:
    for executor in EXECUTORS:
        extra = {"initial_accumulator_value": 0.0} if cls is Adagrad else {}
        variable, other = torch.ones(3), torch.ones(3)
        cls(epsilon=0, executor=executor, **extra).apply_gradients([(torch.zeros(3), variable)])
        assert torch.equal(variable, torch.ones(3))
        cls(epsilon=1e-60, executor=executor, **extra).apply_gradients([(torch.tensor([0.0, 1.0, 0.0]), other)])
        assert other.isnan().tolist() == [True, False, True]


def flushes_denormals() -> bool:
    return bool(np.float32(1e-45) * np.float32(1) == 0 or torch.tensor(1e-45).mul(1).item() == 0)


def test_A12_results_of_normal_size_do_not_depend_on_flushing_of_denormals() -> None:
    """Bits are promised where operands and results are at least 2**-126; TensorFlow on CPU always flushes what is smaller."""
    assert not flushes_denormals(), "something in this process switched flush-to-zero on"
    initial, threads = [randn(70_000)], torch.get_num_threads()
    steps = [[randn(70_000, seed=s)] for s in (1, 2)]
    expected = outcome("adam", "reference", initial, steps)
    try:
        assert torch.set_flush_denormal(True)
        assert flushes_denormals()
        for executor in EXECUTORS:
            for count in (1, 2):
                torch.set_num_threads(count)
                assert_same(outcome("adam", executor, initial, steps), expected)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


class NoScalars(NamedTuple):
    nothing: float


def store_gradient(p, g, slots, s):
    return g, ()


def stored(gradient: Tensor, dtype: torch.dtype, executor: Any) -> Tensor:
    """The gradient rounded to `dtype` by an executor's store."""
    bucket = Bucket(gradient.device, dtype)
    variable = torch.zeros(gradient.shape, dtype=dtype, device=gradient.device)
    bucket.adopt(*bucket.grown([variable], ()))
    execute.run(execute.Update(bucket, [variable], [gradient], (), store_gradient, NoScalars(0.0)), executor)
    return variable


def round_to_bfloat16(patterns: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even, on integers: truncate, then add one where the dropped half says so. NaN becomes 0xFFFF."""
    high, low = patterns >> 16, patterns & 0xFFFF
    up = (low > 0x8000) | ((low == 0x8000) & (high % 2 == 1))
    rounded = (high + up).astype(np.uint16)
    rounded[(patterns & 0x7FFFFFFF) > 0x7F800000] = 0xFFFF
    return rounded


def float32_patterns(slow: bool) -> Iterator[np.ndarray]:
    """Every upper half with the lower halves around a tie; with --slow all 2**32 patterns."""
    high = np.arange(2**16, dtype=np.uint32) << 16
    if slow:
        yield from ((np.arange(2**16, dtype=np.uint32)[:, None] + high[None, i : i + 64]).reshape(-1) for i in range(0, 2**16, 64))
    else:
        yield (high[:, None] + np.array([0, 1, 0x1234, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)).reshape(-1)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_A13_bfloat16_stores_round_to_nearest_even(executor: str, slow: bool) -> None:
    for patterns in float32_patterns(slow):
        rounded = bits(stored(torch.from_numpy(patterns.view(np.float32)), torch.bfloat16, executor))
        assert np.array_equal(rounded, round_to_bfloat16(patterns))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_A13_half_precision_loads_and_stores_are_exact_in_between(dtype: torch.dtype, executor: str) -> None:
    every = torch.arange(2**16).to(torch.uint16).view(dtype)
    assert np.array_equal(bits(stored(every, torch.float32, executor)), bits(every.float()))
    assert np.array_equal(bits(stored(every, dtype, executor)), bits(every))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_A13_float16_stores_round_to_nearest_even(executor: str) -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    near = (halves[:, None] + np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF], np.uint32)).reshape(-1).view(np.float32)
    with np.errstate(over="ignore"):
        assert np.array_equal(bits(stored(torch.from_numpy(near), torch.float16, executor)), bits(near.astype(np.float16)))
