"""Catalogue C, continued: copies, processes, threads, memory, names."""

import copy
import gc
import multiprocessing
import pickle
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import EXECUTORS, RULES, SOME_RULES, assert_same, bits, build, in_threads, outcome, randn, state
from torch import Tensor

from fused_kopt import SGD, Adam
from fused_kopt.optimizer import Optimizer


def trained(rule: str, executor: str, steps: int = 2) -> tuple[Optimizer, list[Tensor]]:
    optimizer, variables = build(rule, executor), [randn(5), randn(2, 3, seed=1).t(), randn(4, seed=2, dtype=torch.bfloat16)]
    train(optimizer, variables, range(steps))
    return optimizer, variables


def train(optimizer: Optimizer, variables: list[Tensor], steps: range) -> None:
    for step in steps:
        optimizer.apply_gradients([(randn(*v.shape, seed=10 * step + i), v) for i, v in enumerate(variables)])


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("rule", RULES)
def test_C11_a_deep_copy_with_its_variables_goes_on_by_itself(rule: str, executor: str) -> None:
    optimizer, variables = trained(rule, executor)
    before = state(optimizer, variables)
    twin, copies = copy.deepcopy((optimizer, variables))
    assert_same(state(twin, copies), before)
    train(twin, copies, range(2, 4))
    assert_same(state(optimizer, variables), before)
    train(optimizer, variables, range(2, 4))
    assert_same(state(optimizer, variables), state(twin, copies))


def test_C11_a_deep_copy_alone_belongs_to_copies_of_the_variables() -> None:
    optimizer, variables = trained("adam", "reference")
    twin = copy.deepcopy(optimizer)
    assert optimizer.get_slot(variables[0], "m").shape == (5,)
    with pytest.raises(KeyError, match="No slot 'm' for this variable"):
        twin.get_slot(variables[0], "m")


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("rule", SOME_RULES)
def test_C12_pickles_go_on_bit_for_bit(rule: str, protocol: int, executor: str) -> None:
    for built in (0, 2):
        optimizer, variables = trained(rule, executor, built)
        twin, copies = pickle.loads(pickle.dumps((optimizer, variables), protocol))
        assert_same(state(twin, copies), state(optimizer, variables))
        for o, v in ((optimizer, variables), (twin, copies)):
            train(o, v, range(built, built + 2))
        assert_same(state(twin, copies), state(optimizer, variables))


def in_child(executor: str, optimizer: Any, variables: list[Tensor], path: str) -> None:
    train(optimizer, variables, range(2, 4))
    np.savez(path, *state(optimizer, variables), *outcome("adam", executor, [randn(3)], [[randn(3, seed=1)]]))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_C13_child_processes_go_on_bit_for_bit(method: str, executor: str, tmp_path: Any) -> None:
    optimizer, variables = trained("adam", executor)
    path = str(tmp_path / "child.npz")
    given = copy.deepcopy((optimizer, variables))  # spawning moves tensors into shared memory
    child = multiprocessing.get_context(method).Process(target=in_child, args=(executor, *given, path))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    train(optimizer, variables, range(2, 4))
    expected = [*state(optimizer, variables), *outcome("adam", "reference", [randn(3)], [[randn(3, seed=1)]])]
    with np.load(path) as file:
        assert_same([file[name] for name in file.files], expected)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_C14_threads_that_share_an_optimizer_take_turns(executor: Any, slow: bool) -> None:
    steps = 50 if slow or executor == "reference" else 10
    optimizer = SGD(learning_rate=1.0, momentum=0.5, executor=executor)
    shared, own = torch.zeros(3), [torch.zeros(2) for _ in range(8)]

    def work(index: int) -> None:
        for _ in range(steps):
            optimizer.apply_gradients([(torch.ones(3), shared), (torch.ones(2), own[index])])

    in_threads(work)
    assert int(optimizer.iterations) == 8 * steps
    alone, expected = SGD(learning_rate=1.0, momentum=0.5), [torch.zeros(3), torch.zeros(2)]
    for step in range(8 * steps):
        alone.apply_gradients([(torch.ones_like(v), v) for v in expected[: 2 if step < steps else 1]])
    assert torch.equal(shared, expected[0])
    assert all(torch.equal(v, expected[1]) for v in own)


def test_C15_optimizers_in_several_threads_share_the_interpreter() -> None:
    rules = list(RULES)[::2][:8]
    results: dict[int, list[np.ndarray]] = {}

    def work(index: int) -> None:
        results[index] = outcome(rules[index], "triton", [randn(40)], [[randn(40, seed=s)] for s in range(6)])

    in_threads(work)
    for index, rule in enumerate(rules):
        assert_same(results[index], outcome(rule, "reference", [randn(40)], [[randn(40, seed=s)] for s in range(6)]), rule)


def objects() -> int:
    gc.collect()
    return len(gc.get_objects())


def traced_bytes() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@pytest.mark.parametrize(("executor", "steps", "measure"), [("reference", 300, traced_bytes), ("triton", 20, objects)])
def test_C16_steps_do_not_gather_memory(executor: str, steps: int, measure: Callable[[], int]) -> None:
    optimizer, variables = build("adam", executor, clipnorm=1.0), [torch.nn.Parameter(randn(9, seed=i)) for i in range(4)]
    if measure is traced_bytes:
        tracemalloc.start()
    found = []
    try:
        for _ in range(3):  # caches fill first
            for index in range(steps):
                variables[index % 4].data = torch.zeros(9)  # another address, another table
                optimizer.apply_gradients([(torch.ones(9), v) for v in variables[: 1 + index % 4]] + [(torch.ones(9), variables[0])])
            found.append(measure())
    finally:
        tracemalloc.stop()
    assert found[2] - found[1] < (50 if measure is traced_bytes else 0.5) * steps, found


@pytest.mark.parametrize("executor", EXECUTORS)
def test_C16_a_dropped_optimizer_leaves_nothing_behind(executor: str) -> None:
    optimizer, variables = trained("adam", executor)
    left = [weakref.ref(t) for t in (*variables, *optimizer.weights)]
    del optimizer, variables
    gc.collect()
    assert [ref() for ref in left] == [None] * len(left)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("where", ["learning rate", "aggregator", "transformer", "gradients"])
def test_C17_a_step_inside_a_step_is_refused(where: str, executor: Any) -> None:
    inner = randn(3)

    def again(value: Any) -> Any:
        optimizer.apply_gradients([(torch.ones(3), inner)])
        return value

    options: dict[str, dict[str, Any]] = {
        "learning rate": {"learning_rate": lambda: again(0.1)},
        "aggregator": {"gradient_aggregator": again},
        "transformer": {"gradient_transformers": [again]},
        "gradients": {},
    }
    optimizer = Adam(executor=executor, **options[where])
    variable = randn(3, seed=1)
    pairs: Any = (again(p) for p in [(torch.ones(3), variable)]) if where == "gradients" else [(torch.ones(3), variable)]
    with pytest.raises(RuntimeError, match="re-entrant apply_gradients"):
        optimizer.apply_gradients(pairs)
    assert_same([bits(inner), bits(variable)], [bits(randn(3)), bits(randn(3, seed=1))])
    assert optimizer.weights == []
    Adam(executor=executor).apply_gradients([(torch.ones(3), variable)])


def test_C17_the_optimizer_serves_again_after_a_refused_step() -> None:
    optimizer, variable = build("adam"), randn(3)
    with pytest.raises(ValueError, match="gradient shape"):
        optimizer.apply_gradients([(torch.ones(2), variable)])
    optimizer.apply_gradients([(torch.ones(3), variable)])
    assert_same(state(optimizer, [variable]), outcome("adam", "reference", [randn(3)], [[torch.ones(3)]]))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_C18_variables_of_the_same_name_have_slots_of_their_own(executor: str) -> None:
    class Named(torch.nn.Parameter):
        name = "dense/kernel"

    variables = [Named(randn(3)), Named(randn(3, seed=1))]
    expected = outcome("adam", "reference", [v.detach() for v in variables], [[torch.ones(3), -torch.ones(3)]])
    optimizer = build("adam", executor)
    optimizer.apply_gradients([(torch.ones(3), variables[0]), (-torch.ones(3), variables[1])])
    assert_same(state(optimizer, variables), expected)
    with pytest.raises(ValueError, match=r"gradient of variable 1 'dense/kernel' \(3,\)"):
        optimizer.apply_gradients([(torch.ones(3), variables[0]), (torch.ones(2), variables[1])])
