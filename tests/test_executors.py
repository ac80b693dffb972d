"""Every rule on the Triton executor against the reference, bit for bit: dtypes, clipping, sizes around a block, layouts."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import variants
from support import DTYPES, Guarded, assert_same, bits, python, randn, small_blocks
from torch import Tensor

from fused_kopt import execute, layout, optimizers, prepare
from fused_kopt.buffers import Bucket
from fused_kopt.execute import Update
from fused_kopt.hyperparameters import Step
from fused_kopt.kernels import launch
from fused_kopt.slots import Slot

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRADIENTS = [(v, g) for v, g in itertools.product(DTYPES, DTYPES) if v == g or torch.float32 in (v, g)]
SPECIAL = 7  # the shape that holds special values
FACTORS = (0.5, 0.75, 1.5, 1.75, 0.625)  # grad_scale, bound, multiplier, divisor, scale


def block_of(dtype: torch.dtype) -> int:
    return 16 if DEVICE == "cpu" else launch.block_size(dtype)


def shapes(block: int) -> list[tuple[int, ...]]:
    return [(), (0,), (1,), (block - 1,), (block,), (block + 1,), (3, 0, 2), (7, 11), (2 * block, 2), (1, block, 1), (4 * block + 13,)]


def unaligned(tensor: Tensor) -> Tensor:
    """A copy that starts one element past a 64-byte boundary."""
    return Guarded(tensor, offset=1).variable


def permuted(tensor: Tensor) -> Tensor:
    """A copy whose first dimension is the innermost in memory."""
    return layout.clone(tensor, layout.contiguous_stride(tensor.shape[::-1])[::-1])


def make(rule: variants.Rule, dtypes: tuple[torch.dtype, torch.dtype], clipped: bool, arrange: Sequence[Any]) -> Update:
    """An update of variables of all shapes, the arrangements in turn; slots hold positive numbers of many magnitudes."""
    dtype, gradient_dtype = dtypes
    sizes = shapes(block_of(dtype))
    places = [arrange[i % len(arrange)] for i in range(len(sizes))]
    values = [randn(*shape, seed=i, dtype=dtype).to(DEVICE) for i, shape in enumerate(sizes)]
    variables = [place(value) for place, value in zip(places, values, strict=True)]
    bucket = Bucket(torch.device(DEVICE), dtype)
    names = tuple(f"slot_{i}" for i in range(rule.slots))
    bucket.adopt(*bucket.grown(variables, [Slot(name) for name in names]))
    for i, flat in enumerate(bucket.flat.values()):
        flat.copy_(randn(flat.numel(), seed=100 + i, dtype=flat.dtype).exp())
    gradients = [
        layout.clone(randn(*v.shape, seed=50 + i).exp().mul(-1 if i % 2 else 1).to(DEVICE, gradient_dtype), v.stride())
        for i, v in enumerate(variables)
    ]
    for tensor in (variables[SPECIAL], gradients[SPECIAL]):
        for position, value in enumerate((math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-42)):
            tensor[position, position] = value
    gradients = [unaligned(g) if i % 3 == 1 and g.is_contiguous() else g for i, g in enumerate(gradients)]
    scalars = rule.optimizer.scalars(Step(3, bucket.compute))
    rows = [[factor * (1 + i / 16) for factor in FACTORS] for i in range(len(variables))]
    factors = torch.tensor(rows, dtype=bucket.compute, device=DEVICE) if clipped else None
    numbers = type(scalars)(*map(float, scalars))
    return Update(bucket, list(variables), list(gradients), names, rule.function, numbers, factors=factors)


def result(update: Update, executor: execute.Chosen) -> list[Tensor]:
    """Variables, and flat buffers with their padding, after one run on copies."""
    copy = update.copy()
    with small_blocks():
        execute.run(copy, executor)
    return [t for t in (*copy.variables, *copy.bucket.flat.values()) if t is not None]


def compare(update: Update) -> None:
    expected, actual = (result(update, executor) for executor in ("reference", "triton"))
    if DEVICE == "cuda" and "power" in update.rule.__name__:  # the two powers are not correctly rounded
        torch.testing.assert_close(actual, expected, equal_nan=True)
    else:
        assert_same([bits(t) for t in expected], [bits(t) for t in actual], update.rule.__name__)


@pytest.mark.parametrize("clipped", [False, True], ids=["keep", "clip"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", variants.RULES.values(), ids=variants.RULES)
def test_rules(rule: variants.Rule, dtype: torch.dtype, clipped: bool) -> None:
    compare(make(rule, (dtype, dtype), clipped, [torch.clone, unaligned, permuted]))


@pytest.mark.parametrize("dtypes", GRADIENTS, ids=str)
def test_gradient_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    compare(make(variants.RULES["adam"], dtypes, True, [torch.clone, unaligned, permuted]))


def test_the_last_element_of_a_large_variable() -> None:
    """One block of 65,536 elements and the next, as long as the interpreter's; on a GPU hundreds of full ones."""
    variable, gradient = torch.zeros(70_001, device=DEVICE), torch.ones(70_001, device=DEVICE)
    optimizers.SGD(learning_rate=1.0, executor="triton").apply_gradients([(gradient, variable)])
    assert variable.eq(-1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_neutral_factors_change_nothing(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    values = torch.tensor([0.0, -0.0, 1.0, -1e30, limits.max, limits.min, limits.tiny, limits.eps, math.inf, -math.inf], dtype=dtype)
    factors = torch.tensor(prepare.NEUTRAL_FACTORS, dtype=dtype)
    assert_same([bits(values)], [bits(prepare.scale_and_clip(values, factors.unbind()))])


def test_absent_variables() -> None:
    update = make(variants.RULES["amsgrad"], (torch.float32, torch.float32), True, [torch.clone])
    before = [bits(v) for v in update.variables]
    absent = (0, 3, 7)
    for index in absent:
        update.variables[index] = update.gradients[index] = None
    compare(update)
    after = iter(bits(t) for t in result(update, "triton"))
    moved = [not np.array_equal(old, next(after)) for i, old in enumerate(before) if i not in absent]
    assert moved == [old.size > 0 for i, old in enumerate(before) if i not in absent]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_that_are_not_dense(dtype: torch.dtype) -> None:
    """Through the optimizer: a strided variable, gradients laid out otherwise than their variables, an expanded one."""
    outcomes = []
    for executor in ("reference", "triton"):
        base = randn(12, 10, seed=1, dtype=dtype).to(DEVICE)
        variables = [base[::2, 1::3], randn(6, 5, seed=2, dtype=dtype).to(DEVICE), randn(4, 9, seed=3, dtype=dtype).to(DEVICE).t()]
        optimizer = optimizers.Adam(executor=executor)
        for step in range(3):
            first, second, third = (randn(*shape, seed=10 + step, dtype=dtype).to(DEVICE) for shape in ((3, 6), (5, 6), (9, 1)))
            with small_blocks():
                optimizer.apply_gradients(list(zip([first.t(), second.t(), third.expand(9, 4)], variables, strict=True)))
        outcomes.append([bits(t) for t in (base, *variables, *optimizer.weights)])
    assert_same(*outcomes)


def test_variables_that_join_later() -> None:
    """Buffers and tables grow, slots keep their values."""
    outcomes = []
    for executor in ("reference", "triton"):
        variables = [randn(size, seed=size).to(DEVICE) for size in (40, 23, 57)]
        optimizer = optimizers.Adam(learning_rate=0.1, amsgrad=True, executor=executor)
        for step, present in enumerate(([0], [0, 1], [2, 0], [1, 2])):
            pairs = [(randn(len(variables[i]), seed=step).to(DEVICE), variables[i]) for i in present]
            with small_blocks():
                optimizer.apply_gradients(pairs)
        outcomes.append([bits(t) for t in (*variables, *optimizer.weights)])
    assert_same(*outcomes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("executor", ["reference", "triton"])
def test_lion_is_its_formula(executor: execute.Executor, dtype: torch.dtype) -> None:
    """tf.keras's legacy optimizers have no Lion to record: its formula in numpy, one rounding per operation."""
    variable = randn(40, dtype=dtype).to(DEVICE)
    p, number = variable.cpu().numpy().copy(), np.dtype(str(dtype).removeprefix("torch.")).type
    m = np.zeros_like(p)
    rate, beta_1, beta_2 = (number(np.float32(x)) for x in (0.03, 0.8, 0.95))
    optimizer = optimizers.Lion(learning_rate=0.03, beta_1=0.8, beta_2=0.95, executor=executor)
    for step in range(12):
        gradient = randn(40, seed=step + 1, dtype=dtype)
        gradient[step] = 0.0
        optimizer.apply_gradients([(gradient.to(DEVICE), variable)])
        g = gradient.numpy()
        p = p - np.sign(m * beta_1 + g * (1 - beta_1)) * rate
        m = m * beta_2 + g * (1 - beta_2)
    assert_same([bits(p), bits(m)], [bits(variable), bits(optimizer.get_slot(variable, "m"))])


def traced(name: str) -> None:
    rule = variants.RULES[name]
    p, g, *slots = (randn(4_099, seed=i) for i in range(2 + rule.slots))
    scalars = rule.optimizer.scalars(Step(3, torch.float32))
    row = type(scalars)(*(torch.tensor(float(x)) for x in scalars))
    arguments = (p, g, tuple(slot.exp() for slot in slots), row)
    results = [function(*arguments) for function in (rule.function, torch.compile(rule.function, fullgraph=True))]
    assert_same(*([bits(new), *map(bits, values)] for new, values in results))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    print("same")


def test_torch_compile_traces_a_rule() -> None:
    """A rule is plain torch code. In a process of its own: Inductor warns, and leaves workers behind."""
    assert python("import test_executors as t; t.traced('amsgrad')") == "same\n"  # divides, takes roots and maxima


# The controls: what must not pass.


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_rule_that_rounds_otherwise_is_noticed(dtype: torch.dtype) -> None:
    update = make(variants.RULES["adam"], (dtype, dtype), False, [torch.clone])
    other = replace(update, rule=variants.RULES["sparse_adam"].function)
    assert not all(map(np.array_equal, map(bits, result(update, "reference")), map(bits, result(other, "triton"))))


def test_a_block_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    update = make(variants.RULES["momentum"], (torch.float32, torch.float32), False, [torch.clone])
    blocks = layout.blocks
    monkeypatch.setattr(layout, "blocks", lambda segments, block: blocks(segments, block)[:-1])
    with pytest.raises(AssertionError):
        compare(update)
