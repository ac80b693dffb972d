"""Catalogue A, continued: scalars, counters, special values, operations."""

import ast
import importlib
import inspect
import math
import pkgutil
import re
import types
from collections.abc import Callable, Iterator
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import offline
import pytest
import torch
from support import EXECUTORS, RULES, SOME_RULES, assert_same, bits, build, outcome, randn, run, state

from fused_kopt import SGD, Adam, Adamax, Ftrl, Lion, Nadam, op, optimizers
from fused_kopt.hyperparameters import Step
from fused_kopt.optimizers.schedules import PiecewiseConstantDecay

LARGE_COUNTS = (2**24 - 1, 2**31 - 1, 2**40, 10**12, 2**53 - 1)


def rule_functions() -> Iterator[types.FunctionType]:
    """Every update rule, and every function that rules call: module-level functions of the optimizers that take `p` first."""
    for module in pkgutil.iter_modules(optimizers.__path__):
        for function in vars(importlib.import_module(f"fused_kopt.optimizers.{module.name}")).values():
            if isinstance(function, types.FunctionType) and next(iter(inspect.signature(function).parameters), "") == "p":
                yield function


def scalar_arithmetic(source: str) -> list[str]:
    """The operations of a rule's text whose operands are all scalars (`s.x`, numbers, or such operations)."""

    def is_scalar(node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute):
            return isinstance(node.value, ast.Name) and node.value.id == "s"
        return isinstance(node, ast.Constant) or (isinstance(node, operations) and all(map(is_scalar, operands(node))))

    def operands(node: Any) -> list[ast.AST]:
        if isinstance(node, ast.BinOp):
            return [node.left, node.right]
        return [node.operand] if isinstance(node, ast.UnaryOp) else list(node.args)

    operations = (ast.BinOp, ast.UnaryOp, ast.Call)
    return [ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, operations) and is_scalar(node)]


def test_A17_no_rule_computes_with_scalars_alone() -> None:
    """In a kernel they are float32, in the interpreter float64: derived scalars come from the host."""
    rules = list(rule_functions())
    assert {build(rule).rule() for rule in RULES} <= set(rules)
    assert len(rules) >= 22
    assert {rule.__qualname__: found for rule in rules if (found := scalar_arithmetic(inspect.getsource(rule)))} == {}


@pytest.mark.parametrize("text", ["1 - s.beta_2", "g * (s.lr * s.rho)", "-s.lr * g", "g / op.sqrt(s.epsilon)", "g * (s.a + 1.0)"])
def test_A17_the_lint_finds_scalar_arithmetic(text: str) -> None:
    assert scalar_arithmetic(text)
    assert not scalar_arithmetic("op.div(m * s.alpha, op.sqrt(v) + s.epsilon) - 1.0 * g")


@pytest.mark.parametrize(
    ("make", "becomes"),
    [
        (lambda **e: SGD(1e-46, **e), "0.0"),
        (lambda **e: SGD(1e39, **e), "inf"),
        (lambda **e: Adam(beta_2=0.99999999, **e), "1.0"),
    ],
)
def test_A18_a_value_that_float32_cannot_tell_from_0_1_or_infinity_warns(make: Callable[..., Any], becomes: str) -> None:
    results = []
    for executor in EXECUTORS:
        with pytest.warns(UserWarning, match=f"becomes {becomes} in float32"):
            optimizer = make(executor=executor)
        variable = randn(9)
        optimizer.apply_gradients([(randn(9, seed=1), variable)])  # applied as Keras applies it
        results.append(state(optimizer, [variable]))
    assert_same(*results)


@pytest.mark.parametrize("options", [{"learning_rate": -0.1}, {"learning_rate": math.nan}, {"beta_1": 2.0}, {"beta_2": -0.5}])
def test_A19_values_out_of_range_warn_and_are_applied_as_keras_applies_them(options: dict[str, float]) -> None:
    name = next(iter(options))
    with pytest.warns(UserWarning, match=f"`{name}`=.* lies outside"):
        optimizer = Adam(**options)  # type: ignore[arg-type]
    optimizer.apply_gradients([(torch.ones(3), torch.ones(3))])


@pytest.mark.parametrize("option", ["clipnorm", "clipvalue", "global_clipnorm", "decay", "lr"])
def test_A19_negative_options_are_refused_as_in_keras(option: str) -> None:
    with pytest.raises(ValueError, match=f"Expected {option} >= 0, received: -1"):
        Adam(**{option: -1.0})  # type: ignore[arg-type]


@pytest.mark.parametrize("count", LARGE_COUNTS)
@pytest.mark.parametrize("cls", [Adam, Adamax, Nadam])
def test_A20_large_step_counts_stay_exact(cls: Any, count: int) -> None:
    results = []
    for executor in EXECUTORS:
        optimizer, variables = cls(executor=executor), [randn(5), randn(5, dtype=torch.float64)]
        optimizer.iterations = count
        optimizer.apply_gradients([(randn(5, seed=1, dtype=v.dtype), v) for v in variables])
        assert int(optimizer.iterations) == count + 1
        assert all(v.isfinite().all() for v in variables)
        results.append(state(optimizer, variables))
    assert_same(*results)


@pytest.mark.parametrize("count", LARGE_COUNTS)
def test_A21_iterations_are_64_bit_integers_everywhere(count: int) -> None:
    optimizer, (variable,) = run("adam", "reference", [randn(5)], [[randn(5, seed=1)]])
    weights = optimizer.get_weights()
    assert type(weights[0]) is np.int64
    optimizer.set_weights([np.int64(count), *weights[1:]])
    assert optimizer.iterations.dtype == torch.int64
    assert int(optimizer.apply_gradients([(randn(5, seed=2), variable)])) == count + 1  # type: ignore[arg-type]
    assert optimizer.get_weights()[0] == count + 1
    assert variable.isfinite().all()


@pytest.mark.parametrize("beta", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_A22_powers_of_beta_keep_their_precision_at_every_step(beta: float, dtype: torch.dtype) -> None:
    """Against decimals: the C library's powf is within 0.82 ulp, its pow within 1. numpy's float32 power strays in 20 %."""
    step = Step(0, dtype)
    base, info = step.number(beta), np.finfo(step.dtype)
    with localcontext() as context:
        context.prec = 60
        for t in (*range(1, 2001, 1 if dtype == torch.float32 else 7), 2**24, 10**9):
            exact = Decimal(float(base)) ** t
            got = step.power(base, step.dtype(t))
            ulp = max(np.spacing(np.abs(got)), info.smallest_subnormal)
            assert abs(Decimal(float(got)) - exact) <= Decimal(float(ulp)) * Decimal("0.82" if dtype == torch.float32 else "1"), t


@pytest.mark.parametrize("boundary", [2**24, 2**31, 2**53 - 1])
def test_A23_schedules_meet_boundaries_exactly(boundary: int) -> None:
    schedule = PiecewiseConstantDecay([boundary], [1.0, 0.5])
    assert [float(schedule(boundary + i)) for i in (-1, 0, 1)] == [1.0, 1.0, 0.5]
    for i, rate in ((-1, 1.0), (0, 1.0), (1, 0.5)):
        optimizer, variable = SGD(schedule), torch.zeros(1, dtype=torch.float64)
        optimizer.iterations = boundary + i
        optimizer.apply_gradients([(torch.ones(1), variable)])
        assert variable.item() == -rate


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("rule", "slot"), [("amsgrad", "vhat"), ("amsgrad", "v"), ("adamax", "v")])
def test_A25_maxima_keep_nan_from_either_operand(rule: str, slot: str, executor: str) -> None:
    optimizer, (variable,) = run(rule, executor, [torch.ones(4)], [[torch.ones(4)]])
    optimizer.get_slot(variable, slot)[1] = math.nan
    optimizer.apply_gradients([(torch.tensor([1.0, 1.0, math.nan, 1.0]), variable)])
    expected = [False, True, True, False]
    assert optimizer.get_slot(variable, "vhat" if rule == "amsgrad" else "v").isnan().tolist() == expected
    assert variable.isnan().tolist() == expected


@pytest.mark.parametrize("executor", EXECUTORS)
def test_A26_the_sign_of_zeros_is_zero_and_of_nan_is_nan(executor: Any) -> None:
    gradient = torch.tensor([0.0, -0.0, math.nan, 1e-45, -1e-45, math.inf])
    variable = torch.full((6,), 2.0)
    Lion(learning_rate=1.0, beta_1=1.0, executor=executor).apply_gradients([(gradient, variable)])  # the direction is sign(m = 0)
    assert torch.equal(variable[[0, 1, 3, 4]], torch.full((4,), 2.0))
    assert variable[2].isnan()
    variable = torch.full((6,), 2.0)
    Lion(learning_rate=1.0, beta_1=1e-6, executor=executor).apply_gradients([(gradient, variable)])
    assert variable[[0, 1]].tolist() == [2.0, 2.0]
    assert variable[[2]].isnan().all()
    assert variable[[3, 4, 5]].tolist() == [1.0, 3.0, 1.0]
    variable = torch.full((2,), 0.0)
    Ftrl(initial_accumulator_value=1.0, executor=executor).apply_gradients([(torch.tensor([0.0, math.nan]), variable)])
    assert variable[0] == 0


def test_A26_the_reference_sign_of_special_values() -> None:
    signs = op.sign(torch.tensor([0.0, -0.0, math.nan, -math.inf, 1e-45]))
    assert np.array_equal(bits(signs.abs()), bits(torch.tensor([0.0, 0.0, math.nan, 1.0, 1.0])))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("rule", SOME_RULES)
def test_A27_neither_default_dtype_nor_autocast_changes_a_bit(rule: str, executor: str) -> None:
    initial, steps = [randn(33), randn(3, dtype=torch.bfloat16)], [[randn(33, seed=1), randn(3, seed=2)]] * 2
    expected = outcome(rule, executor, initial, steps, clipnorm=0.5)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        torch.set_default_dtype(dtype)
        try:
            assert_same(outcome(rule, executor, initial, steps, clipnorm=0.5), expected)
        finally:
            torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(outcome(rule, executor, initial, steps, clipnorm=0.5), expected)


INEXACT = re.compile(r"\b(?:rsqrt|rcp|ex2|lg2|fma|mad\.rn|div\.full)\b\S*|\.approx\S*|\.ftz\S*")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["adam", "adadelta", "centered_with_momentum", "ftrl"])
def test_A28_kernels_divide_and_take_roots_correctly_rounded(rule: str, dtype: torch.dtype) -> None:
    optimizer = build(rule)
    scalars = type(optimizer.scalars(Step(0, torch.float32)))
    slots = sum(len(group) for group in optimizer.slot_groups())
    ptx = offline.compile_rule(optimizer.rule(), scalars, slots, "sm_90", (dtype, dtype), True).intermediate
    assert "div.rn" in ptx
    assert "sqrt.rn" in ptx
    assert INEXACT.findall(ptx) == []
