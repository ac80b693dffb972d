"""apply_gradients: the sequence of keras-semantics 5.1, what may be a gradient, and what around the call must not matter."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from support import DTYPES, EXECUTORS, assert_same, bits, launches, randn, state
from test_config import SIGNATURES, every_class, make
from torch import Tensor, nn

from fused_kopt import SGD, Adam

every_executor = pytest.mark.parametrize("executor", EXECUTORS)
WARNING = (
    "Gradients do not exist for variables {} when minimizing the loss. If you're using `model.compile()`, "
    "did you forget to provide a `loss` argument?"
)


def variables(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(3, dtype=dtype), randn(2, 2, seed=1, dtype=dtype), randn(seed=2, dtype=dtype)]


def gradients(step: int = 0) -> list[Tensor]:
    return [randn(*v.shape, seed=10 + 3 * step + i) for i, v in enumerate(variables())]


CONTAINERS: dict[str, Callable[[list[tuple[Tensor, Tensor]]], Iterable[Any]]] = {
    "tuple": tuple,
    "generator": lambda pairs: (pair for pair in pairs),
    "iterator": iter,
    "zip": lambda pairs: zip(*zip(*pairs, strict=True), strict=True),
    "lists": lambda pairs: [list(pair) for pair in pairs],
    "map": lambda pairs: map(tuple, pairs),
    "values": lambda pairs: dict(enumerate(pairs)).values(),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_any_ordered_iterable_of_pairs(container: str) -> None:
    outcomes = []
    for build in (list, CONTAINERS[container]):
        optimizer, own = Adam(), variables()
        for i in range(2):
            optimizer.apply_gradients(build(list(zip(gradients(i), own, strict=True))), name="ignored")
        outcomes.append(state(optimizer, own))
    assert_same(*outcomes)


@every_class
def test_the_return_value_is_iterations(name: str) -> None:
    optimizer, own = make(name), variables()
    for i in range(3):
        result = optimizer.apply_gradients(zip(gradients(i), own, strict=True))
        assert result is optimizer.iterations
        assert (int(result), result.dtype) == (i + 1, torch.int64)


class Named(nn.Parameter):
    name = "dense/bias"  # torch's own attribute is read-only


def test_missing_gradients_are_skipped_with_a_warning_in_every_call(caplog: pytest.LogCaptureFixture) -> None:
    optimizer, (a, b, c) = Adam(), variables()
    c = Named(c)
    before = [bits(b), bits(c)]
    for i in range(2):
        caplog.clear()
        optimizer.apply_gradients([(gradients(i)[0], a), (None, b), (None, c)])
        names = ["variable 1 (2, 2)", "variable 2 'dense/bias' ()"]
        assert [(r.name, r.levelno, r.getMessage()) for r in caplog.records] == [("fused_kopt", logging.WARNING, WARNING.format(names))]
    assert_same([bits(b), bits(c)], before)
    assert (int(optimizer.iterations), len(optimizer.weights)) == (2, 3)
    caplog.clear()
    optimizer.apply_gradients([(gradients()[0], a)])
    assert not caplog.records


@pytest.mark.parametrize("count", [1, 3])
@every_class
def test_all_gradients_missing(name: str, count: int, caplog: pytest.LogCaptureFixture) -> None:
    optimizer, own = make(name), variables()[:count]
    with pytest.raises(ValueError, match=r"No gradients provided for any variable: \['variable 0 \(3,\)'"):
        optimizer.apply_gradients([(None, v) for v in own])
    assert (optimizer.weights, optimizer.get_config(), caplog.records) == ([], make(name).get_config(), [])


@every_class
def test_an_empty_list_is_no_step(name: str) -> None:
    optimizer = make(name)
    if name == "Nadam":
        with pytest.raises(IndexError):
            optimizer.apply_gradients([])
        assert (optimizer.weights, optimizer.get_config()) == ([], make(name).get_config())
    else:
        assert optimizer.apply_gradients(iter(())) is None
        assert optimizer.weights == [optimizer.iterations]  # as in Keras, it creates what a step needs
        assert optimizer.get_config()["learning_rate"] == float(np.float32(SIGNATURES[name]["learning_rate"]))
    (a, *_), g = variables(), gradients()[0]
    optimizer.apply_gradients([(g, a)])
    before = state(optimizer, [a])
    assert optimizer.apply_gradients([]) is None
    assert_same(state(optimizer, [a]), before)
    assert int(optimizer.iterations) == 1


class Recorder:
    """A transformer that notes its name and what it received, then multiplies every gradient."""

    def __init__(self, name: str, log: list[Any], factor: float) -> None:
        self.name, self.log, self.factor = name, log, factor

    def __call__(self, pairs: Any) -> Any:
        self.log.append((self.name, type(pairs), [(g.tolist(), id(v)) for g, v in pairs]))
        return tuple((g * self.factor, v) for g, v in pairs)


@pytest.mark.parametrize("aggregate", [True, False])
def test_aggregator_then_transformers_in_order(aggregate: bool) -> None:
    log: list[Any] = []
    a, b, c = torch.zeros(2), torch.zeros(1), torch.zeros(1)
    transformers = [Recorder("first", log, 3.0), Recorder("second", log, 5.0)]
    optimizer = SGD(1.0, gradient_aggregator=Recorder("sum", log, 2.0), gradient_transformers=transformers)
    given = [(torch.tensor([1.0, 2.0]), a), (None, c), ([4.0], b)]
    optimizer.apply_gradients(given, experimental_aggregate_gradients=aggregate)
    scale = 2.0 if aggregate else 1.0
    assert [name for name, _, _ in log] == ["sum"] * aggregate + ["first", "second"]
    assert log[0][1:] == (list, [([1.0, 2.0], id(a)), ([4.0], id(b))])  # present pairs only, as tensors, in the order given
    assert log[-1][2] == [([3 * scale, 6 * scale], id(a)), ([12 * scale], id(b))]
    assert (a.tolist(), b.tolist(), c.tolist()) == ([-15 * scale, -30 * scale], [-60 * scale], [0.0])


@pytest.mark.parametrize("aggregate", [True, False])
def test_clipping_follows_aggregation_and_does_not_depend_on_it(aggregate: bool) -> None:
    variable = torch.zeros(2)
    optimizer = SGD(1.0, clipvalue=3.0, gradient_aggregator=Recorder("sum", [], 2.0))
    optimizer.apply_gradients([(torch.tensor([1.0, 2.0]), variable)], experimental_aggregate_gradients=aggregate)
    assert variable.tolist() == ([-2.0, -3.0] if aggregate else [-1.0, -2.0])


def test_transformers_may_drop_reorder_and_add() -> None:
    a, b, c = variables()
    plain, own = Adam(), variables()
    plain.apply_gradients([(gradients()[2], own[2]), (gradients()[0], own[0])])
    optimizer = Adam(gradient_transformers=[lambda pairs: [(gradients()[2], c), pairs[0]], lambda pairs: (pair for pair in pairs)])
    optimizer.apply_gradients([(gradients()[0], a), (gradients()[1], b)])
    assert_same(state(optimizer, [a, b, c]), state(plain, own))
    optimizer.gradient_transformers = [lambda pairs: [(None, v) for _, v in pairs]]
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        optimizer.apply_gradients([(gradients()[0], a)])
    optimizer.gradient_transformers = None
    assert optimizer.gradient_transformers == []


ARRAYS: dict[str, Callable[[Tensor], Any]] = {
    "numpy": lambda g: g.numpy(),
    "float64": lambda g: g.double().numpy(),
    "list": lambda g: g.tolist(),
    "tuple": lambda g: tuple(g.tolist()) if g.dim() else g.item(),
    "strided": lambda g: np.repeat(g.numpy(), 2, axis=0)[::2] if g.dim() else g.numpy()[()],
    "requires grad": lambda g: g.clone().requires_grad_(),
    "non-leaf": lambda g: g.clone().requires_grad_() * 1,
    "Parameter": nn.Parameter,
    "expanded": lambda g: g[None].expand(2, *g.shape)[1],
    "negative view": lambda g: torch._neg_view(-g),
}


@pytest.mark.parametrize("kind", ARRAYS)
@every_executor
def test_gradients_may_be_arrays_and_any_strided_tensor(kind: str, executor: str) -> None:
    outcomes = []
    for convert in (lambda g: g, ARRAYS[kind]):
        optimizer, own = Adam(executor=executor), variables()
        optimizer.apply_gradients([(convert(g), v) for g, v in zip(gradients(), own, strict=True)])
        outcomes.append(state(optimizer, own))
    assert_same(*outcomes)


@every_executor
def test_a_negated_view_is_updated_by_value(executor: str) -> None:
    memory = randn(7)  # holds minus the variable: a write through the address would have the wrong sign
    optimizer, plain, variable = Adam(executor=executor), Adam(), -memory
    optimizer.apply_gradients([(randn(7, seed=1), torch._neg_view(memory))])
    plain.apply_gradients([(randn(7, seed=1), variable)])
    assert_same(state(optimizer, [-memory]), state(plain, [variable]))


@pytest.mark.parametrize("given", [[1, 2, 3], np.array([1, 2, 3], np.int8), np.array([1, 2, 3], np.uint64)], ids=["list", "int8", "uint64"])
def test_arrays_of_integers_are_gradients(given: Any) -> None:
    variable = torch.zeros(3)
    SGD(1.0).apply_gradients([(given, variable)])
    assert variable.tolist() == [-1.0, -2.0, -3.0]


@pytest.mark.parametrize("of_gradient", DTYPES, ids=str)
@pytest.mark.parametrize("of_variable", DTYPES, ids=str)
@every_executor
def test_gradients_of_other_float_dtypes_are_cast(of_variable: torch.dtype, of_gradient: torch.dtype, executor: str) -> None:
    compute = torch.float64 if of_variable == torch.float64 else torch.float32
    outcomes = []
    for cast in (lambda g: g, lambda g: g.to(compute)):
        optimizer, own = Adam(executor=executor), variables(of_variable)
        with launches(1 if executor == "triton" else 0):
            optimizer.apply_gradients([(cast(g.to(of_gradient)), v) for g, v in zip(gradients(), own, strict=True)])
        outcomes.append(state(optimizer, own))
    assert_same(*outcomes)


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, np.float32), (torch.float64, np.float64)])
def test_decay(dtype: torch.dtype, kind: Any) -> None:
    optimizer, variable, expected = SGD(0.1, decay=0.3), torch.ones(1, dtype=dtype), kind(1)
    for iterations in range(5):
        optimizer.apply_gradients([(torch.full((1,), 0.7, dtype=dtype), variable)])
        rate = kind(np.float32(0.1)) / (1 + kind(np.float32(0.3)) * kind(iterations))  # the counter before the step
        expected = expected - kind(0.7) * rate
        assert variable.item() == expected.item()
