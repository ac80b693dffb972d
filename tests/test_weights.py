"""Weights and slots: their order, their identity and their accessors."""

from typing import Any

import numpy as np
import pytest
import torch
from support import randn
from torch import Tensor

from fused_kopt import SGD, Adadelta, Adagrad, Adam, Adamax, Ftrl, Lion, Nadam, RMSprop
from fused_kopt.optimizer import Optimizer

# Per configuration the slots in Keras's order of creation (keras-semantics 3.2). In a group they alternate per variable.
ORDERS: dict[str, tuple[Any, dict[str, Any], list[tuple[str, ...]]]] = {
    "SGD": (SGD, {}, []),
    "SGD momentum": (SGD, {"momentum": 0.9}, [("momentum",)]),
    "SGD nesterov": (SGD, {"momentum": 0.9, "nesterov": True}, [("momentum",)]),
    "SGD nesterov without momentum": (SGD, {"nesterov": True}, []),
    "RMSprop": (RMSprop, {}, [("rms",)]),
    "RMSprop centered": (RMSprop, {"centered": True}, [("rms",), ("mg",)]),
    "RMSprop momentum centered": (RMSprop, {"momentum": 0.9, "centered": True}, [("rms",), ("momentum",), ("mg",)]),
    "Adam": (Adam, {}, [("m",), ("v",)]),
    "Adam amsgrad": (Adam, {"amsgrad": True}, [("m",), ("v",), ("vhat",)]),
    "Adadelta": (Adadelta, {}, [("accum_grad",), ("accum_var",)]),
    "Adagrad": (Adagrad, {}, [("accumulator",)]),
    "Adamax": (Adamax, {}, [("m",), ("v",)]),
    "Nadam": (Nadam, {}, [("m",), ("v",)]),
    "Ftrl": (Ftrl, {}, [("accumulator", "linear")]),
    "Lion": (Lion, {}, [("m",)]),
}
every_order = pytest.mark.parametrize("key", ORDERS)
SIZES = {"a": (2,), "b": (), "c": (3, 2), "d": (4,)}
MIXED = {"a": torch.float32, "b": torch.float64, "c": torch.bfloat16, "d": torch.float32}


def make(key: str, **options: Any) -> Optimizer:
    cls, config, _ = ORDERS[key]
    optimizer: Optimizer = cls(**{**config, **options})
    return optimizer


def new_variables(names: str = "abc", dtypes: dict[str, torch.dtype] | None = None) -> dict[str, Tensor]:
    return {name: randn(*SIZES[name], seed=ord(name), dtype=(dtypes or {}).get(name, torch.float32)) for name in names}


def step(optimizer: Optimizer, variables: dict[str, Tensor], order: str, without: str = "", seed: int = 0) -> None:
    pairs = [(randn(*variables[n].shape, seed=seed + i, dtype=variables[n].dtype), variables[n]) for i, n in enumerate(order)]
    optimizer.apply_gradients([(None if n in without else g, v) for n, (g, v) in zip(order, pairs, strict=True)])


def listed(optimizer: Optimizer, variables: dict[str, Tensor]) -> list[str]:
    """The weights by name: iter, cache, or variable.slot, found by identity."""
    known = {id(optimizer.iterations): "iter", id(getattr(optimizer, "_cache", None)): "cache"}
    for name, variable in variables.items():
        for slot in optimizer.get_slot_names():
            try:
                known[id(optimizer.get_slot(variable, slot))] = f"{name}.{slot}"
            except KeyError:
                continue
    return [known[id(weight)] for weight in optimizer.weights]


def expected(key: str, *calls: str) -> list[str]:
    """Names after calls that each brought these new variables."""
    _, _, groups = ORDERS[key]
    slots = [f"{name}.{slot}" for new in calls for group in groups for name in new for slot in group]
    return ["iter", *["cache"] * (key == "Nadam"), *slots]


@pytest.mark.parametrize("dtypes", [None, MIXED], ids=["one-bucket", "three-buckets"])
@pytest.mark.parametrize("order", ["a", "ab", "ba", "abc", "cab"])
@every_order
def test_order(key: str, order: str, dtypes: dict[str, torch.dtype] | None) -> None:
    optimizer, variables = make(key), new_variables(dtypes=dtypes)
    step(optimizer, variables, order)
    assert listed(optimizer, variables) == expected(key, order)
    step(optimizer, variables, order[::-1])
    assert listed(optimizer, variables) == expected(key, order)
    assert optimizer.get_slot_names() == [slot for group in ORDERS[key][2] for slot in group]


@pytest.mark.parametrize("dtypes", [None, MIXED], ids=["one-bucket", "three-buckets"])
@pytest.mark.parametrize(("calls", "news"), [(("ab", "abc"), ("ab", "c")), (("b", "cad", "a"), ("b", "cad")), (("abca",), ("abc",))])
@every_order
def test_late_variables_are_appended(
    key: str, calls: tuple[str, ...], news: tuple[str, ...], dtypes: dict[str, torch.dtype] | None
) -> None:
    optimizer, variables = make(key), new_variables("abcd", dtypes)
    held: list[Tensor] = []
    for call in calls:
        step(optimizer, variables, call)
        assert all(now is before for now, before in zip(optimizer.weights, held, strict=False))
        held = list(optimizer.weights)
    assert listed(optimizer, variables) == expected(key, *news)


@every_order
def test_a_variable_without_gradient_gets_its_slots_later(key: str) -> None:
    optimizer, variables = make(key), new_variables("ab")
    step(optimizer, variables, "ab", without="a")
    assert listed(optimizer, variables) == expected(key, "b")
    step(optimizer, variables, "ab")
    assert listed(optimizer, variables) == expected(key, "b", "a")


@every_order
def test_slots_have_the_variables_shape_and_the_compute_dtype(key: str) -> None:
    optimizer, variables = make(key), new_variables(dtypes=MIXED)
    initial = {"accumulator": 0.1}
    for variable in variables.values():
        for slot in [slot for group in ORDERS[key][2] for slot in group]:
            with pytest.raises(KeyError, match=rf"No slot '{slot}' for this variable"):
                optimizer.get_slot(variable, slot)
    optimizer._state.ensure(list(variables.values()), optimizer.slot_groups())
    for name, variable in variables.items():
        compute = torch.float64 if MIXED[name] == torch.float64 else torch.float32
        for slot in optimizer.get_slot_names():
            made = optimizer.get_slot(variable, slot)
            assert (made.shape, made.dtype, made.requires_grad) == (variable.shape, compute, False)
            assert torch.equal(made, torch.full_like(made, initial.get(slot, 0.0)))


@every_order
def test_accessors(key: str) -> None:
    optimizer, variables = make(key), new_variables()
    live = optimizer.weights
    assert (live, optimizer.variables() is live, optimizer.get_weights(), optimizer.get_slot_names()) == ([], True, [], [])
    assert optimizer.weights == []  # nothing so far has created anything
    step(optimizer, variables, "abc")
    assert optimizer.weights is optimizer.variables() is live
    values = optimizer.get_weights()
    assert (type(values[0]), values[0]) == (np.int64, 1)
    for value, weight in zip(values, live, strict=True):
        assert (value.shape, value.dtype) == (tuple(weight.shape), weight.numpy().dtype)
        assert np.array_equal(value, weight.numpy())
    before = [value.copy() for value in values]
    step(optimizer, variables, "abc")
    assert all(np.array_equal(b, v) for b, v in zip(before, values, strict=True))  # no views
    for slot in ("momentun", "iterations", ""):
        with pytest.raises(KeyError, match=f"No slot {slot!r}"):
            optimizer.get_slot(variables["a"], slot)
    for slot in optimizer.get_slot_names():
        with pytest.raises(KeyError, match=slot):
            optimizer.get_slot(variables["a"].clone(), slot)


def test_iterations_can_be_set_until_they_exist() -> None:
    optimizer = Adam()
    optimizer.iterations = 5
    assert (optimizer.weights, optimizer.iterations.dtype, int(optimizer.iterations)) == ([optimizer.iterations], torch.int64, 5)
    with pytest.raises(RuntimeError, match="Cannot set `iterations` to a new Variable after the Optimizer weights have been created"):
        optimizer.iterations = torch.tensor(7)
    other = Adam()
    for _ in range(5):
        other.apply_gradients([(torch.ones(1), torch.zeros(1))])
    variable, same = torch.zeros(1), torch.zeros(1)
    assert optimizer.apply_gradients([(torch.ones(1), variable)]) is optimizer.iterations
    other.apply_gradients([(torch.ones(1), same)])
    assert (int(optimizer.iterations), variable.item()) == (6, same.item())  # its bias correction is that of step 6
    fresh = Adam()
    assert (int(fresh.iterations), fresh.weights) == (0, [fresh.iterations])


@pytest.mark.parametrize(
    ("initializer", "shape", "values"),
    [
        ("zeros", None, [0.0, 0.0]),
        ("ones", None, [1.0, 1.0]),
        (0.5, (3,), [0.5] * 3),
        (torch.tensor([1.0, 2.0]), None, [1.0, 2.0]),
        (np.array([3.0, 4.0, 5.0]), (3,), [3.0, 4.0, 5.0]),
        (lambda shape, dtype: torch.full(shape, 0.25, dtype=dtype), (1, 2), [[0.25, 0.25]]),
        ("ones", (), 1.0),
    ],
    ids=range(7),
)
def test_add_slot(initializer: Any, shape: Any, values: Any) -> None:
    optimizer, variables = Adam(), new_variables("ab")
    step(optimizer, variables, "ab")
    made = optimizer.add_slot(variables["a"], "own", initializer, shape)
    assert (made.tolist(), made.dtype, made.requires_grad) == (values, torch.float32, False)
    assert optimizer.weights[-1] is made is optimizer.get_slot(variables["a"], "own")
    assert made is optimizer.add_slot(variables["a"], "own", -1.0, (7,))
    assert (optimizer.get_slot_names(), len(optimizer.weights)) == (["m", "v", "own"], 6)
    with pytest.raises(KeyError):
        optimizer.get_slot(variables["b"], "own")
    step(optimizer, variables, "ab")
    assert made.tolist() == values  # the rule does not know it
    m = optimizer.get_slot(variables["a"], "m")
    assert optimizer.add_slot(variables["a"], "m", "ones") is m
    assert float(m.abs().max()) < 1


@pytest.mark.parametrize("first", ["a", "b"])
def test_add_slot_before_the_first_step_is_what_the_rule_uses(first: str) -> None:
    optimizer, variables = Adagrad(), new_variables("ab")
    optimizer.add_slot(variables["b"], "other")
    own = optimizer.add_slot(variables[first], "accumulator", 4.0)
    optimizer.apply_gradients([(torch.zeros(2), variables["a"]), (torch.zeros(()), variables["b"])])
    assert optimizer.get_slot(variables[first], "accumulator") is own
    for name in "ab":
        accumulator = optimizer.get_slot(variables[name], "accumulator")
        assert torch.equal(accumulator, torch.full_like(accumulator, 4.0 if name == first else 0.1)), name
