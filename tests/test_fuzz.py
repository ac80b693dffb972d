"""Random calls of apply_gradients: the fused kernel against the reference, bit for bit, and the same errors from both."""

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from support import DTYPES, EXECUTORS, RULES, assert_same, build, small_blocks, state
from torch import Tensor

SHAPES = [(), (1,), (0,), (3,), (4,), (5,), (16,), (33,), (2, 3), (3, 0, 2), (5, 1), (2, 2, 3), (4, 9)]
LAYOUTS = ["plain", "transposed", "gaps", "offset"]
GRADIENTS = [*LAYOUTS, "none", "expanded", "sparse", "array", "variable", "other variable"]
FAULTS = ["shape", "integers", "meta", "overlap", "not a tensor"]
SPECIAL = np.array([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, -1e-40, 3e38, 1.0, -1.0])


@dataclass(frozen=True)
class Variable:
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    gradients: tuple[str, ...]  # per step
    gradient_dtype: torch.dtype
    scale: int  # gradients are around 10 ** scale
    special: bool


@dataclass(frozen=True)
class Call:
    """A few steps. `order` may repeat variables and leave some out."""

    rule: str
    options: dict[str, float]
    variables: tuple[Variable, ...]
    order: tuple[int, ...]
    fault: str | None
    block: int
    seed: int


STEPS = 2
variables = st.builds(
    Variable,
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    gradients=st.tuples(*[st.sampled_from(GRADIENTS)] * STEPS),
    gradient_dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0, 0, -3, 3, -12, 15, -22]),
    special=st.booleans(),
)
calls = st.integers(1, 5).flatmap(
    lambda count: st.builds(
        Call,
        rule=st.sampled_from(list(RULES)),
        options=st.sampled_from(
            [{}, {}, {"clipvalue": 0.5}, {"clipnorm": 0.5}, {"global_clipnorm": 0.5}, {"clipvalue": 0.1, "clipnorm": 0.2}]
        ),
        variables=st.tuples(*[variables] * count),
        order=st.lists(st.integers(0, count - 1), min_size=1, max_size=count + 2).map(tuple),
        fault=st.one_of(st.none(), st.none(), st.none(), st.sampled_from(FAULTS)),
        block=st.sampled_from([1, 4, 16]),
        seed=st.integers(0, 2**32 - 1),
    )
)


def laid_out(value: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        order = list(reversed(range(value.dim())))
        return value.permute(order).contiguous().permute(order)
    if layout == "gaps" and value.dim():
        return value.repeat_interleave(2, -1)[..., ::2]
    if layout == "offset":
        return torch.cat([value.new_zeros(3), value.reshape(-1)])[3:].view(value.shape)
    return value.clone()


def drawn(random: np.random.Generator, shape: tuple[int, ...], scale: int, special: bool) -> Tensor:
    values = random.standard_normal(shape) * 10.0**scale
    if special:
        values = np.where(random.random(shape) < 0.2, random.choice(SPECIAL, shape), values)
    return torch.tensor(values, dtype=torch.float64)


def gradient(spec: Variable, kind: str, random: np.random.Generator, mine: Tensor, other: Tensor) -> Any:
    value = drawn(random, spec.shape, spec.scale, spec.special).to(spec.gradient_dtype)
    if kind in LAYOUTS:
        return laid_out(value, kind)
    if kind == "expanded":
        return value.reshape(-1)[:1].sum().expand(spec.shape)
    if kind == "sparse" and spec.shape:
        rows = random.integers(0, spec.shape[0], 3) if spec.shape[0] else np.zeros(0, np.int64)
        return torch.sparse_coo_tensor(torch.tensor(rows)[None], value[rows], spec.shape, check_invariants=True)
    if kind == "variable" or (kind == "other variable" and other.shape != mine.shape):
        return mine
    return {"none": None, "array": value.double().numpy(), "other variable": other}.get(kind, value)


def spoiled(pairs: list[tuple[Any, Any]], fault: str, position: int) -> None:
    given, variable = pairs[position]
    pairs[position] = {
        "shape": (torch.ones(7, 7), variable),
        "integers": (torch.ones(variable.shape, dtype=torch.int32), variable),
        "meta": (given, variable.to("meta")),
        "overlap": (torch.ones(3, 3), torch.ones(3).expand(3, 3)),
        "not a tensor": (given, "variable"),
    }[fault]


def outcome(call: Call, executor: str) -> tuple[list[np.ndarray], list[str]]:
    """The bits after all steps, and the errors on the way."""
    random = np.random.default_rng(call.seed)
    tensors = [laid_out(drawn(random, v.shape, 0, False).to(v.dtype), v.layout) for v in call.variables]
    optimizer, errors = build(call.rule, executor, **call.options), []
    for step in range(STEPS):
        pairs: list[tuple[Any, Any]] = []
        for index in call.order:
            spec, other = call.variables[index], tensors[index - 1]
            pairs.append((gradient(spec, spec.gradients[step], random, tensors[index], other), tensors[index]))
        if call.fault and step == 1:
            spoiled(pairs, call.fault, call.seed % len(pairs))
        before = state(optimizer, tensors)
        try:
            optimizer.apply_gradients(pairs)
        except (TypeError, ValueError) as error:
            errors.append(f"step {step}: {type(error).__name__}: {error}")
            assert_same(state(optimizer, tensors), before, "after an error")
    return state(optimizer, tensors), errors


def test_fuzz_apply_gradients(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("fused_kopt"), "disabled", True)

    @settings(
        max_examples=5000 if slow else 300,
        deadline=None,
        derandomize=not slow,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(calls)
    def check(call: Call) -> None:
        with small_blocks(call.block):
            (expected, errors), (actual, others) = (outcome(call, executor) for executor in EXECUTORS)
        assert errors == others
        assert_same(actual, expected)
        for error in errors or ["no error"]:
            event(error[:30])

    check()
