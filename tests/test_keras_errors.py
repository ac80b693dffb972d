"""What fused_kopt.keras refuses, and that nothing has changed then."""

import sys
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import stock
import torch
from support import python

import fused_kopt.keras as fk

LAST = 2**31 - 1


def built(**options: Any) -> Any:
    optimizer = stock.ours("Adam", **options)
    optimizer.build(stock.variables())
    return optimizer


def apply(optimizer: Any, grads: Any = None, variables: Any = None) -> None:
    optimizer.apply(stock.gradients(0) if grads is None else grads, variables)


def counted() -> None:
    optimizer = built()
    optimizer.iterations.assign(LAST)
    apply(optimizer)


def momentum_later() -> None:
    optimizer, trained = stock.ours("SGD"), stock.variables()
    apply(optimizer, variables=trained)
    optimizer.momentum = 0.9
    apply(optimizer)


def loaded(shapes: Any) -> None:
    optimizer = built()
    arrays = [np.zeros(s) for s in shapes]
    optimizer.load_own_variables({str(i): array for i, array in enumerate(arrays)})


def executed() -> None:
    optimizer = built()
    optimizer.executor = "cuda"
    apply(optimizer)


class Subclass(keras.optimizers.Adam):
    pass


OWN = [tuple(v.shape) for v in built().variables]
ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "unbuilt": (lambda: apply(stock.ours("Adam")), ValueError, r"must already be built.*optimizer.build"),
    "count": (lambda: apply(built(), stock.gradients(0)[:2]), ValueError, "one-to-one. Received: 2 for 6 variables"),
    "unknown": (lambda: apply(built(), stock.gradients(0), stock.variables()), ValueError, r"Unknown variable: v0 \(\)\. .* built with 6"),
    "no gradients": (lambda: apply(built(), [None] * 6), ValueError, r"No gradients provided for any variable: \['v0', "),
    "shape": (lambda: apply(built(), [torch.zeros(2), *stock.gradients(0)[1:]]), ValueError, r"gradient of v0 \(\): gradient shape \(2,\)"),
    "sparse": (
        lambda: apply(built(), [*stock.gradients(0)[:5], torch.zeros(33).to_sparse()]),
        TypeError,
        r"gradient of v5 \(33,\) is sparse",
    ),
    "twice": (lambda: twice(), ValueError, "share memory"),
    "steps": (counted, OverflowError, r"2,147,483,647 steps.*iterations.assign"),
    "slots": (momentum_later, ValueError, "built without `momentums`.*before the first step"),
    "executor": (executed, ValueError, "`executor` must be one of .* executor='cuda'"),
    "describe": (lambda: stock.ours("Adam").describe(), ValueError, "nothing to describe before the optimizer is built"),
    "weights unbuilt": (lambda: stock.ours("Adam").set_weights([]), ValueError, "not yet been built"),
    "weights count": (
        lambda: built().set_weights([np.zeros(())]),
        ValueError,
        r"14 variables, 1 were given.* at 1: adam.*learning_rate \(\)",
    ),
    "weights shape": (
        lambda: built().set_weights([np.zeros(s) for s in [*OWN[:-1], (34,)]]),
        ValueError,
        r"at 13: .*v5_velocity \(33,\) here, \(34,\) there",
    ),
    "file shape": (lambda: loaded([*OWN[:-1], (34,)]), ValueError, r"saved state does not fit .* at 13"),
    "file count": (
        lambda: loaded(OWN[:8]),
        UserWarning,
        r"Skipping variable loading for optimizer 'adam.*14 variables, 8 were given.*amsgrad",
    ),
    "loss scale unbuilt": (lambda: apply(fk.LossScaleOptimizer(stock.ours("Adam"))), ValueError, "not built: pass `trainable_variables`"),
    "fuse subclass": (lambda: fk.fuse(Subclass()), TypeError, r"takes an instance of keras.optimizers.Adadelta, .*Received: .*\.Subclass"),
    "fuse lamb": (lambda: fk.fuse(keras.optimizers.Lamb()), TypeError, "Lamb"),
    "fuse muon": (lambda: fk.fuse(keras.optimizers.Muon()), TypeError, "Muon"),
    "fuse class": (lambda: fk.fuse(keras.optimizers.Adam), TypeError, "Received: the class Adam"),
    "fuse torch": (lambda: fk.fuse(torch.optim.SGD([torch.ones(1)])), TypeError, r"torch.optim.sgd.SGD"),
    "fuse inside": (
        lambda: fk.fuse(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adafactor())),
        TypeError,
        "Adafactor",
    ),
}


def twice() -> None:
    optimizer = built()
    variable = optimizer._trainable_variables[5]
    apply(optimizer, [torch.ones(33)] * 2, [variable, variable])


@pytest.mark.parametrize("what", ERRORS)
def test_errors(what: str) -> None:
    call, error, message = ERRORS[what]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("bad", ["shape", "learning rate"])
def test_nothing_is_written(bad: str) -> None:
    options = {**stock.OPTIONS["all"], "gradient_accumulation_steps": 2}
    rates = iter([0.1, "fast"])
    optimizer, trained = stock.ours("Nadam", **options, learning_rate=lambda: next(rates)), stock.variables()
    apply(optimizer, variables=trained)
    before = stock.values([*trained, *optimizer.variables])
    grads = stock.gradients(1)
    if bad == "shape":
        grads[5] = torch.zeros(2)
        rates = iter([0.1])
    with pytest.raises((ValueError, TypeError)):
        apply(optimizer, grads)
    assert all(np.array_equal(a, b) for a, b in zip(before, stock.values([*trained, *optimizer.variables]), strict=True))


def test_another_backend() -> None:
    code = """
import types, sys
keras = types.ModuleType("keras")
keras.backend = types.SimpleNamespace(backend=lambda: "jax")
for name in ("keras", "keras.src", "keras.src.backend", "keras.src.backend.common"):
    sys.modules[name] = keras
scope = types.ModuleType("scope")
scope.in_stateless_scope = None
sys.modules["keras.src.backend.common.stateless_scope"] = scope
try:
    import fused_kopt.keras
except ImportError as error:
    print(error)
"""
    assert "needs Keras's torch backend; this process runs 'jax'. Set the environment variable KERAS_BACKEND=torch" in python(code)
    assert sys.modules["keras"].backend.backend() == "torch"
