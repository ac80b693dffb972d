"""Every row of the bad-input matrix raises what it must, changes nothing, and leaves no trace in the step that follows."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bad_calls import ARGUMENTS, PAIR, Row, World, ones, raising
from support import EXECUTORS, assert_same, bits, state
from torch import Tensor

from fused_kopt import StaleVariableError

FUNC = "belongs to a torch.func transform"
REAL = "real number or a 0-d tensor"


def switched(which: str, name: str, action: Callable[..., Any], error: type[BaseException], text: str) -> Row:
    """A row in which one of the user's functions misbehaves."""

    def call(world: World) -> None:
        switch = getattr(world, which)
        before, switch.action = switch.action, action
        try:
            world.step()
        finally:
            switch.action = before

    return Row(f"{which}: {name}", call, error, text)


def attribute(key: str, value: Any, error: type[BaseException], text: str) -> Row:
    """A row with an attribute that only the next step can refuse."""

    def call(world: World) -> None:
        before = getattr(world.optimizer, key)
        setattr(world.optimizer, key, value)
        try:
            world.step()
        finally:
            setattr(world.optimizer, key, before)

    return Row(f"attribute: {key}={value!r}", call, error, text)


def stale(change: Callable[[], Tensor]) -> Callable[[World], None]:
    """A step after the first variable's data was exchanged; the old data comes back."""

    def call(world: World) -> None:
        before = world.a.data
        world.a.data = change()
        try:
            world.step()
        finally:
            world.a.data = before

    return call


def transformed(transform: Callable[..., Any], pair: Callable[[World, Any], Any], *shape: int) -> Callable[[World], Any]:
    """A step inside a torch.func transform."""

    def call(world: World) -> Any:
        good = world.good()

        def inner(x: Any) -> Any:
            world.optimizer.apply_gradients([*good, pair(world, x)])
            return x.sum()

        return transform(inner)(ones(*shape))

    return call


def re_entrant(world: World) -> None:
    before, world.transform.action = world.transform.action, lambda pairs: world.step()
    try:
        world.step()
    finally:
        world.transform.action = before


def set_last(world: World) -> None:
    world.optimizer.set_weights([*(w + 1 for w in world.optimizer.get_weights()[:-1]), np.zeros(5)])


RATES = [
    (None, TypeError, REAL),
    ("0.1", TypeError, REAL),
    ([0.1], TypeError, REAL),
    (1j, TypeError, REAL),
    (ones(2), RuntimeError, "Scalar"),
]
FUNCTIONS = [
    *(switched("rate", f"returns {value!r}", lambda value=value: value, error, text) for value, error, text in RATES),
    switched("rate", "raises", raising, ZeroDivisionError, "on purpose"),
    switched("transform", "loses all gradients", lambda pairs: [(None, v) for _, v in pairs], ValueError, "No gradients provided"),
]
for _which in ("aggregate", "transform"):
    FUNCTIONS += [
        switched(_which, "raises", raising, ZeroDivisionError, "on purpose"),
        switched(_which, "returns None", lambda pairs: None, TypeError, "must be a list of .* Received: NoneType"),
        switched(_which, "returns a number", lambda pairs: 3, TypeError, "must be a list of .* Received: int"),
        switched(_which, "returns no pairs", lambda pairs: [g for g, _ in pairs], TypeError, PAIR.format("Tensor")),
        switched(_which, "spoils a shape", lambda pairs: [*pairs[:-1], (ones(7), pairs[-1][1])], ValueError, r"gradient shape \(7,\)"),
    ]
ATTRIBUTES = [
    *(attribute("epsilon", value, TypeError, REAL) for value in (None, "1e-7", [1e-7])),
    *(attribute("grad_scale", value, TypeError, "must be a real number") for value in (None, "2")),
    attribute("verify_every", "often", TypeError, "unsupported operand"),
    attribute("_initial_decay", None, TypeError, "not supported"),
    Row("set executor", lambda w: setattr(w.optimizer, "executor", "gpu"), ValueError, "`executor` must be one of"),
    Row("set learning_rate", lambda w: setattr(w.optimizer, "learning_rate", "fast"), TypeError, "`learning_rate` must be a number"),
    Row("set beta_1", lambda w: setattr(w.optimizer, "beta_1", ones(2)), ValueError, "`beta_1` as a tensor must be 0-d"),
    Row("set clipnorm", lambda w: setattr(w.optimizer, "clipnorm", 1.0), ValueError, "cannot be combined with .'clipnorm'"),
    Row("set iterations", lambda w: setattr(w.optimizer, "iterations", 3), RuntimeError, "Cannot set `iterations`", "built"),
    Row("set iterations to text", lambda w: setattr(w.optimizer, "iterations", "x"), ValueError, "invalid literal", "fresh"),
]
STATE = [
    Row("func: vmap, gradient", transformed(torch.func.vmap, lambda w, x: (x, w.a), 2, 3), RuntimeError, FUNC),
    Row("func: grad, gradient", transformed(torch.func.grad, lambda w, x: (x, w.a), 3), RuntimeError, FUNC),
    Row("func: jacrev, gradient", transformed(torch.func.jacrev, lambda w, x: (x, w.a), 3), RuntimeError, FUNC),
    Row("func: vmap, variable", transformed(torch.func.vmap, lambda w, x: (ones(3), x), 2, 3), RuntimeError, FUNC),
    Row("func: grad, variable", transformed(torch.func.grad, lambda w, x: (ones(3), x), 3), RuntimeError, FUNC),
    Row("re-entrant", re_entrant, RuntimeError, "re-entrant apply_gradients"),
    Row("stale shape", stale(lambda: ones(5)), StaleVariableError, r"was .*\(3,\), torch.float32.* and is .*\(5,\)", "built"),
    Row("stale dtype", stale(lambda: ones(3, dtype=torch.float16)), StaleVariableError, "torch.float16", "built"),
    Row(
        "variable is a slot",
        lambda w: w.optimizer.apply_gradients([*w.good(), (ones(4, 2), w.optimizer.get_slot(w.table, "v"))]),
        ValueError,
        "is a slot of this very optimizer",
        "built",
    ),
    Row("set_weights, length", lambda w: w.optimizer.set_weights([np.zeros(3)] * 3), ValueError, "weight list of length 3"),
    Row("set_weights, None", lambda w: w.optimizer.set_weights(None), TypeError, "NoneType"),
    Row("set_weights, last shape wrong", set_last, ValueError, "not compatible", "built"),
    Row("get_slot", lambda w: w.optimizer.get_slot(w.a, "velocity"), KeyError, "No slot 'velocity'"),
    Row("add_slot, unknown initializer", lambda w: w.optimizer.add_slot(w.a, "x", "orthogonal"), ValueError, "Unknown initializer"),
    Row("add_slot, shape of the initializer", lambda w: w.optimizer.add_slot(w.a, "x", ones(7)), RuntimeError, "expanded size"),
    Row("add_slot, raising initializer", lambda w: w.optimizer.add_slot(w.a, "x", raising), ZeroDivisionError, "on purpose"),
    Row("minimize without tape", lambda w: w.optimizer.minimize(w.a.sum(), [w.a]), ValueError, "`tape` is required"),
    Row("minimize, raising loss", lambda w: w.optimizer.minimize(raising, [w.a]), ZeroDivisionError, "on purpose"),
    Row("get_gradients, unconnected", lambda w: w.optimizer.get_gradients(ones(), [w.a]), ValueError, "has `None` for gradient"),
]
ROWS = [*ARGUMENTS, *FUNCTIONS, *ATTRIBUTES, *STATE]


def trace(world: World) -> list[Any]:
    """All of an optimizer's state but for bits: what exists, as which object, in which configuration."""
    o = world.optimizer
    slots = [(name, i) for name in o.get_slot_names() for i, v in enumerate(world.variables) if has_slot(o, v, name)]
    hypers = {key: (id(value), None if callable(value) else float(value)) for key, value in o._hyper.items()}
    options = (o.clipnorm, o.clipvalue, o.global_clipnorm, o.grad_scale, list(o.gradient_transformers), o.gradient_aggregator, o.executor)
    attributes = sorted(vars(o).keys() - {"grad_scale"})
    return [id(o.weights), [id(w) for w in o.weights], slots, attributes, hypers, options, o.get_config(), o._torn, o._stepping]


def has_slot(optimizer: Any, variable: Any, name: str) -> bool:
    try:
        return optimizer.get_slot(variable, name) is not None
    except KeyError:
        return False


@functools.cache
def undisturbed(executor: str, built: bool) -> list[np.ndarray]:
    """The bits after the good step of a world in which nothing bad happened."""
    world = World(executor, built)
    world.step()
    return state(world.optimizer, world.variables)


CASES = [(row, when) for row in ROWS for when in ("built", "fresh") if row.when in ("always", when)]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("row", "when"), CASES, ids=[f"{row.name}-{when}" for row, when in CASES])
def test_bad_input(row: Row, when: str, executor: str) -> None:
    built = when == "built"
    world = World(executor, built)
    before, before_bits = trace(world), state(world.optimizer, world.variables)
    for _ in range(2):  # a second time: the first failure has left nothing half done
        with pytest.raises(row.error, match=row.text) as caught:
            row.call(world)
        assert caught.type is row.error
        assert trace(world) == before
        assert_same(state(world.optimizer, world.variables), before_bits)
    world.step()
    assert_same(state(world.optimizer, world.variables), undisturbed(executor, built))


def test_the_matrix_is_large_and_its_names_are_distinct() -> None:
    assert len(ROWS) >= 120
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("built", [True, False])
def test_the_matrix_sees_a_good_step(built: bool) -> None:
    # the control: what is compared above does change
    world = World("reference", built)
    before, before_bits = trace(world), [bits(v) for v in world.variables]
    world.step()
    assert (trace(world) != before) == (not built)
    assert not any(np.array_equal(bits(v), b) for v, b in zip(world.variables, before_bits, strict=True))
