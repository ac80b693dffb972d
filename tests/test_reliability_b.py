"""Catalogue B: tensors and layout. What a launch may be given, and what must come out whatever it looks like."""

import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support import DTYPES, EXECUTORS, RULES, SOME_RULES, assert_same, bits, build, outcome, randn, run, state
from torch import Tensor

from fused_kopt import tensors


@pytest.mark.parametrize("executor", EXECUTORS)
def test_B1_an_empty_tensor_anywhere_in_the_list_drops_nothing(executor: str) -> None:
    for length in range(9):
        for empty in range(length + 1):
            shapes = [(3,)] * length
            shapes.insert(empty, (0, 5))
            optimizer, variables = run("momentum", executor, [torch.ones(s) for s in shapes], [[torch.ones(s) for s in shapes]])
            assert int(optimizer.iterations) == 1
            assert all(torch.allclose(v, torch.tensor(0.99)) for v in variables), (length, empty)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_B1_a_step_of_empty_tensors_alone_counts(executor: str) -> None:
    optimizer, _ = run("adam", executor, [torch.ones(0), torch.ones(2, 0)], [[torch.ones(0), torch.ones(2, 0)]] * 2)
    assert int(optimizer.iterations) == 2
    assert [w.shape for w in optimizer.weights] == [(), (0,), (2, 0), (0,), (2, 0)]


@pytest.mark.parametrize("count", [1, 30, 31, 64, 65, 300])
def test_B2_any_number_of_tensors_with_empty_ones_between(count: int) -> None:
    sizes = [random.Random(count).choice([0, 0, 1, 2, 5]) for _ in range(count - 1)] + [0]
    initial, steps = [randn(n, seed=i) for i, n in enumerate(sizes)], [[randn(n, seed=-i) for i, n in enumerate(sizes)]]
    assert_same(*(outcome("momentum", executor, initial, steps) for executor in EXECUTORS))


@pytest.mark.parametrize("rule", RULES)
def test_B3_scalars_and_single_elements(rule: str) -> None:
    shapes = [(), (1,), (1, 1, 1)]
    initial = [torch.full(s, 0.5) for s in shapes]
    results = [outcome(rule, executor, initial, [[torch.full(s, 0.25) for s in shapes]] * 2) for executor in EXECUTORS]
    assert_same(*results)
    first, *others = (r.reshape(()) for r in results[0][:3])
    assert all(o == first for o in others)
    assert first != bits(torch.tensor(0.5))


def laid_out(value: Tensor, layout: Sequence[int] | str) -> Tensor:
    """The same logical elements in another layout: a permutation of dimensions, or one of the named ones."""
    if layout == "gaps":  # every second element of a larger tensor
        wide = torch.zeros(*value.shape[:-1], 2 * value.shape[-1], dtype=value.dtype)
        return wide[..., ::2].copy_(value)
    if layout == "window":  # a slice in every dimension
        wide = torch.zeros([n + 2 for n in value.shape], dtype=value.dtype)
        return wide[tuple(slice(1, 1 + n) for n in value.shape)].copy_(value)
    if layout == "negated":
        return torch._neg_view(-value)
    order = [int(d) for d in layout]
    return value.permute(order).contiguous().permute([order.index(d) for d in range(value.dim())])


PERMUTATIONS = list(itertools.permutations(range(3)))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("rule", SOME_RULES)
def test_B4_a_gradient_in_any_layout_meets_the_variable_element_by_element(rule: str, executor: str) -> None:
    layouts = list(itertools.product([*PERMUTATIONS, "gaps", "window"], [*PERMUTATIONS, "gaps", "window", "negated"]))
    initial = [randn(3, 4, 5, seed=i) for i in range(len(layouts))]
    gradients = [randn(3, 4, 5, seed=100 + i) for i in range(len(layouts))]
    expected = outcome(rule, "reference", initial, [gradients, gradients])
    optimizer = build(rule, executor)
    variables = [laid_out(v, layout) for v, (layout, _) in zip(initial, layouts, strict=True)]
    for _ in range(2):
        given = [laid_out(g, layout) for g, (_, layout) in zip(gradients, layouts, strict=True)]
        optimizer.apply_gradients(list(zip(given, variables, strict=True)))
    assert_same(state(optimizer, variables), expected)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_B4_broadcast_views_and_odd_strides_of_single_elements_are_gradients_too(executor: str) -> None:
    initial = [randn(3, 4, 5), randn(1, 4, 1), randn(2, 3, 4, 5)]
    plain = [torch.full((3, 4, 5), 2.0), randn(1, 4, 1, seed=1), randn(2, 3, 4, 5, seed=2)]
    odd = [
        torch.tensor(2.0).expand(3, 4, 5),
        plain[1].clone().as_strided((1, 4, 1), (77, 1, 13)),
        plain[2].to(memory_format=torch.channels_last),
    ]
    assert_same(outcome("adam", executor, initial, [odd]), outcome("adam", "reference", initial, [plain]))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("rule", ["adam", "nesterov"])
def test_B5_a_variable_that_is_a_view_with_gaps_leaves_the_gaps_alone(rule: str, executor: str) -> None:
    whole = randn(8, 10)
    before = whole.clone()
    views = [whole[1:4, ::3], whole[5:, 2:9].t()]
    steps = [[randn(*v.shape, seed=s + i) for i, v in enumerate(views)] for s in (1, 5)]
    expected = outcome(rule, "reference", [v.contiguous() for v in views], steps)
    optimizer = build(rule, executor)
    for step in steps:
        optimizer.apply_gradients(list(zip(step, views, strict=True)))
    assert_same(state(optimizer, views), expected)
    inside = torch.zeros(8, 10, dtype=torch.bool)
    inside[1:4, ::3] = True
    inside[5:, 2:9] = True
    assert torch.equal(whole[~inside], before[~inside])


@pytest.mark.parametrize("executor", EXECUTORS)
def test_B6_an_expanded_variable_is_refused(executor: str) -> None:
    base = torch.ones(3, 1)
    with pytest.raises(ValueError, match=r"variable 0 \(3, 4\) has overlapping memory: .* strides \(1, 0\)"):
        build("sgd", executor).apply_gradients([(torch.ones(3, 4), base.expand(3, 4))])
    assert torch.equal(base, torch.ones(3, 1))


def test_B7_overlap_of_a_variable_with_itself_is_found_exactly() -> None:
    draw = random.Random(0)
    outcomes = set()
    for _ in range(2000):
        shape = [draw.randint(0, 4) for _ in range(draw.randint(0, 3))]
        stride = [draw.randint(0, 9) for _ in shape]
        view = torch.zeros(128).as_strided(shape, stride)
        offsets = [sum(i * s for i, s in zip(index, stride, strict=True)) for index in itertools.product(*map(range, shape))]
        overlaps = len(set(offsets)) < len(offsets)
        assert tensors.overlaps_itself(view) == overlaps, (shape, stride)
        outcomes.add(overlaps)
    assert outcomes == {True, False}
    with pytest.raises(ValueError, match="overlapping memory"):
        build("adam").apply_gradients([(torch.ones(4, 4), torch.zeros(16).as_strided((4, 4), (2, 1)))])


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("rule", ["sgd", "adam", "ftrl"])
def test_B8_the_same_variable_twice_is_updated_twice_in_order(rule: str, executor: str) -> None:
    """Keras's contract: one step count for both updates."""
    first, second, third = (randn(5, seed=s) for s in (1, 2, 3))
    optimizer, a, b = build(rule, executor), randn(5), randn(5, seed=9)
    optimizer.apply_gradients([(first, a), (second, b), (third, a)])
    assert int(optimizer.iterations) == 1
    apart, x, y = build(rule), randn(5), randn(5, seed=9)
    apart.apply_gradients([(first, x), (second, y)])
    apart.iterations.zero_()
    apart.apply_gradients([(third, x)])
    assert_same(state(optimizer, [a, b]), state(apart, [x, y]))


def random_views(draw: random.Random) -> list[Tensor]:
    """1-D views of one buffer in several dtypes, with strides; some of them empty."""
    base = torch.zeros(96, dtype=torch.float64)
    views = []
    for _ in range(draw.randint(2, 8)):
        flat = base.view(draw.choice(DTYPES))
        stride, start = draw.choice([1, 1, 2, 3]), draw.randrange(flat.numel())
        size = draw.randint(0, min(1 + (flat.numel() - 1 - start) // stride, draw.choice([2, 4, 30])))
        views.append(flat.as_strided((size,), (stride,), start))
    return views


def bytes_of(view: Tensor) -> set[int]:
    starts = (view.storage_offset() + i * view.stride(0) for i in range(view.numel()))
    return {s * view.element_size() + byte for s in starts for byte in range(view.element_size())}


def test_B9_shared_memory_is_found_in_any_set_of_views(slow: bool) -> None:
    draw = random.Random(1)
    outcomes = set()
    for _ in range(10_000 if slow else 1500):
        views = random_views(draw)
        occupied = [bytes_of(v) for v in views]
        pairs = {(i, j) for i, j in itertools.combinations(range(len(views)), 2) if occupied[i] & occupied[j]}
        found = tensors.first_overlap(views)
        assert (found in pairs) if pairs else found is None
        outcomes.add(found is None)
    assert outcomes == {True, False}


@pytest.mark.parametrize("executor", EXECUTORS)
def test_B9_variables_that_share_memory_are_refused_before_anything_is_written(executor: str) -> None:
    whole = torch.ones(10)
    with pytest.raises(ValueError, match=r"variable 1 \(6,\) and variable 2 \(6,\) share memory"):
        build("sgd", executor).apply_gradients([(torch.ones(2), torch.ones(2)), (torch.ones(6), whole[:6]), (torch.ones(6), whole[4:])])
    assert torch.equal(whole, torch.ones(10))


def aliased(kind: str, optimizer: Any, variables: list[Tensor]) -> list[Tensor]:
    """One gradient per variable, which lies in memory that the step writes."""
    a, b = variables
    if kind == "slot":
        return [optimizer.get_slot(b, "m"), optimizer.get_slot(a, "v")]
    return {"variable": [a, b], "other variable": [b, a], "shifted": [a.flip(0), a.as_strided((9,), (1,), 1)]}[kind]


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("kind", ["variable", "other variable", "shifted", "slot"])
def test_B10_a_gradient_in_memory_that_the_step_writes_counts_as_it_was(kind: str, twice: bool, executor: str) -> None:
    results = []
    for copied in (False, True):
        whole = randn(20)
        variables = [whole[:9], whole[10:19]]
        optimizer = build("adam", executor)
        optimizer.apply_gradients([(randn(9, seed=i), v) for i, v in enumerate(variables)])
        gradients = aliased(kind, optimizer, variables)
        pairs = list(zip([g.clone() for g in gradients] if copied else gradients, variables, strict=True))
        optimizer.apply_gradients(pairs * (1 + twice))
        results.append(state(optimizer, variables))
    assert_same(*results)


def test_B10_no_gradient_in_written_memory_is_missed() -> None:
    draw = random.Random(2)
    outcomes = set()
    for _ in range(1500):
        gradient, *written = random_views(draw)
        touched = any(bytes_of(gradient) & bytes_of(w) for w in written)
        said = tensors.Written(written).touches(gradient)
        assert said or not touched  # it may say yes between the elements of a strided view
        outcomes.add((said, touched))
    assert outcomes >= {(True, True), (False, False)}


@pytest.mark.parametrize("executor", EXECUTORS)
def test_B11_a_variable_with_new_memory_is_updated_there(executor: str) -> None:
    optimizer, variable = build("momentum", executor), torch.nn.Parameter(torch.zeros(4))
    old = variable.data
    optimizer.apply_gradients([(torch.ones(4), variable)])
    was = old.clone()
    variable.data = torch.ones(8)[::2]
    optimizer.apply_gradients([(torch.ones(4), variable)])
    assert torch.equal(old, was)
    assert np.allclose(variable.detach(), 1 - 0.01 * 1.9)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("shape", [(1,), (), (3, 1), (4,), (1, 3)])
def test_B12_a_gradient_that_would_broadcast_is_refused(shape: tuple[int, ...], executor: str) -> None:
    variable = torch.ones(3)
    with pytest.raises(ValueError, match=r"gradient of variable 0 \(3,\): gradient shape .* != variable shape \(3,\)"):
        build("rmsprop", executor).apply_gradients([(torch.ones(shape), variable)])
    assert torch.equal(variable, torch.ones(3))
