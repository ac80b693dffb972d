"""minimize, get_gradients and GradientTape: Keras's training loops with only their imports changed."""

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_kopt as tf
from fused_kopt import SGD, Adam, GradientTape, Nadam


def leaf(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values))


def test_a_keras_training_loop_where_only_the_imports_differ() -> None:
    """The loop of Keras's guide "Writing a training loop from scratch", with a torch model in place of layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    batches = [(x, x[:, :3].argmax(1)) for x in torch.randn(4, 16, 4)]
    loss_fn = nn.CrossEntropyLoss()
    trainable_weights = list(model.parameters())

    optimizer = tf.optimizers.Adam(learning_rate=0.05)
    losses = []
    for _epoch in range(15):
        for x_batch_train, y_batch_train in batches:
            with tf.GradientTape() as tape:
                logits = model(x_batch_train)
                loss_value = loss_fn(logits, y_batch_train)
            grads = tape.gradient(loss_value, trainable_weights)
            optimizer.apply_gradients(zip(grads, trainable_weights, strict=True))
            losses.append(loss_value.item())
    assert (int(optimizer.iterations), losses[-1] < losses[0] / 4) == (60, True)
    assert all(w.grad is None for w in trainable_weights)


def manual(steps: int) -> Tensor:
    """SGD on `square` with the gradient by hand."""
    w = torch.tensor([1.0, 2.0])
    for _ in range(steps):
        w = w - 2 * (w - 3) * torch.tensor(0.1)
    return w


def square(w: Tensor) -> Tensor:
    return ((w - 3) ** 2).sum()


MINIMIZE: dict[str, Callable[[Any, Any], Any]] = {
    "callable loss": lambda o, w: o.minimize(lambda: square(w), [w]),
    "a single variable": lambda o, w: o.minimize(lambda: square(w), w),
    "nested variables": lambda o, w: o.minimize(lambda: square(w), {"layer": ([w], ())}),
    "callable variables": lambda o, w: o.minimize(lambda: square(w), lambda: [w]),
    "generator": lambda o, w: o.minimize(lambda: square(w), (v for v in [w])),
    "by name": lambda o, w: o.minimize(loss=lambda: square(w), var_list=[w], grad_loss=None, name="train"),
    "gradient of the loss": lambda o, w: o.minimize(lambda: square(w) / 4, [w], grad_loss=torch.tensor(4.0)),
    "own tape": lambda o, w: o.minimize(lambda: square(w), [w], tape=GradientTape()),
    "two calls": lambda o, w: o.apply_gradients(o._compute_gradients(lambda: square(w), [w])),
    "get_gradients": lambda o, w: o.apply_gradients(zip(o.get_gradients(square(w), [w]), [w], strict=True)),
    "backward": lambda o, w: (w.__setattr__("grad", None), square(w).backward(), o.apply_gradients([(w.grad, w)]))[2],
}


def recorded(optimizer: Any, w: Tensor) -> Any:
    with GradientTape() as tape:
        loss = square(w)
    return optimizer.minimize(loss, [w], tape=tape)


@pytest.mark.parametrize("call", [*MINIMIZE.values(), recorded], ids=[*MINIMIZE, "tensor loss with its tape"])
def test_minimize(call: Callable[[Any, Any], Any]) -> None:
    optimizer, w = SGD(0.1), leaf(1.0, 2.0)
    for i in range(3):
        result = call(optimizer, w)
        assert (result is optimizer.iterations, int(result)) == (True, i + 1)
    assert torch.equal(w, manual(3))


def test_variables_that_the_loss_creates() -> None:
    made: list[nn.Parameter] = []

    def loss() -> Tensor:
        if not made:
            made.append(leaf(1.0, 2.0))
        return square(made[0])

    SGD(0.1).minimize(loss, lambda: made)  # asked for after the loss, as in Keras
    assert torch.equal(made[0], manual(1))


REFUSED: list[tuple[Callable[[Any, Any], Any], type[Exception], str]] = [
    (lambda o, w: o.minimize(lambda: square(w), None), ValueError, "A variable or a list of variables is needed"),
    (lambda o, w: o.minimize(square(w), [w]), ValueError, "`tape` is required when a `Tensor` loss is passed"),
    (lambda o, w: o.minimize(lambda: torch.ones(()), [w]), ValueError, r"No gradients provided for any variable: \['variable 0 \(2,\)'"),
    (lambda o, w: o.minimize(lambda: square(w.detach()), w), ValueError, "No gradients provided"),
    (lambda o, w: o.minimize(lambda: square(w), "w"), TypeError, "must come in a list, tuple or dict. Received: str"),
    (lambda o, w: o.minimize(lambda: square(w), {w}), TypeError, "must come in a list, tuple or dict. Received: set"),
    (lambda o, w: o.minimize(lambda: square(w), [w, 3]), TypeError, "int"),
    (lambda o, w: o.minimize(lambda: 1 / 0, [w]), ZeroDivisionError, "division"),
    (lambda o, w: o.get_gradients(square(w), [w, leaf(1.0)]), ValueError, "Variable 1 has `None` for gradient"),
    (lambda o, w: o.get_gradients(torch.ones(()), [w]), ValueError, "Variable 0 has `None` for gradient"),
]


@pytest.mark.parametrize(("call", "error", "text"), REFUSED, ids=range(len(REFUSED)))
def test_minimize_refuses_before_anything_exists(call: Callable[[Any, Any], Any], error: type[Exception], text: str) -> None:
    optimizer, w = Adam(), leaf(1.0, 2.0)
    with pytest.raises(error, match=text):
        call(optimizer, w)
    assert (optimizer.weights, optimizer.get_config(), w.tolist()) == ([], Adam().get_config(), [1.0, 2.0])


def test_minimize_without_variables_is_no_step() -> None:
    assert (optimizer := SGD()).minimize(lambda: torch.ones(()), []) is None
    assert int(optimizer.iterations) == 0
    with pytest.raises(IndexError):
        Nadam().minimize(lambda: torch.ones(()), [])


def test_compute_gradients_pairs_every_variable() -> None:
    a, b = leaf(2.0), leaf(3.0)
    (g, first), (none, second) = SGD()._compute_gradients(lambda: (a * a).sum(), [a, b])
    assert (g.tolist(), first is a, none, second is b) == ([4.0], True, None, True)


Layer = namedtuple("Layer", "kernel bias")
STRUCTURES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "list": lambda a, b: [a, b],
    "tuple": lambda a, b: (a, b),
    "dict": lambda a, b: {"kernel": a, "bias": b},
    "nested": lambda a, b: {"layers": [{"kernel": a}, (b, [])]},
    "namedtuple": Layer,
    "repeated": lambda a, b: [a, b, a],
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradients_have_the_structure_of_the_sources(structure: str) -> None:
    a, b, build = leaf(2.0), leaf(3.0), STRUCTURES[structure]
    with GradientTape() as tape:
        loss = (a * a * b).sum()
    assert tape.gradient(loss, build(a, b)) == build(torch.tensor([12.0]), torch.tensor([4.0]))


@pytest.mark.parametrize("sources", [nn.Module.parameters, lambda m: nn.ParameterList(m.parameters())], ids=["generator", "ParameterList"])
def test_a_models_parameters_are_sources(sources: Any) -> None:
    model = nn.Linear(2, 1)
    with GradientTape() as tape:
        loss = model(torch.ones(1, 2)).sum()
    weight, bias = tape.gradient(loss, sources(model))
    assert (weight.tolist(), bias.tolist()) == ([[1.0, 1.0]], [1.0])


def test_nested_tapes_give_second_derivatives() -> None:
    x = leaf(3.0)
    with GradientTape() as outer:
        with GradientTape() as inner:
            y = x**3
        first = inner.gradient(y, x)
    assert (first.tolist(), outer.gradient(first, x).tolist()) == ([27.0], [18.0])
    with GradientTape() as tape:
        y = x**3
    assert not tape.gradient(y, x).requires_grad  # no tape records: the graph is freed


def test_persistent() -> None:
    x = leaf(2.0)
    with GradientTape() as tape:
        y = x * x
    tape.gradient(y, x)
    with pytest.raises(RuntimeError, match="A non-persistent GradientTape can only be used to compute one set of gradients"):
        tape.gradient(y, x)
    with GradientTape(persistent=True) as tape:
        y = x * x
        z = y * y
    assert [tape.gradient(t, x).tolist() for t in (z, y, z)] == [[32.0], [4.0], [32.0]]
    assert tape.gradient(z, y).tolist() == [8.0]
    tape.reset()
    assert tape.watched_variables() == ()


def test_watch() -> None:
    a, b, constant = leaf(2.0), leaf(3.0), torch.tensor([5.0])
    with GradientTape() as tape:
        tape.watch([constant])
        loss = a * b * constant
    assert [g.tolist() for g in tape.gradient(loss, [a, b, constant])] == [[15.0], [10.0], [6.0]]
    with GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(b)
        loss = a * b
    assert [v is b for v in tape.watched_variables()] == [True]
    gradients = tape.gradient(loss, {"a": a, "b": b})
    assert (gradients["a"], gradients["b"].tolist()) == (None, [2.0])
    for wrong in (torch.tensor([1]), [torch.ones(1), torch.tensor(True)]):
        with pytest.raises(TypeError, match="Only floating tensors can be watched"):
            GradientTape().watch(wrong)


def test_unconnected_sources() -> None:
    a, b = leaf(2.0), leaf(3.0, 4.0)
    for how, want in (("none", None), ("zero", [0.0, 0.0])):
        with GradientTape() as tape:
            loss = a * a
        got = tape.gradient(loss, [a, b], unconnected_gradients=how)
        assert (got[0].tolist(), got[1] if got[1] is None else got[1].tolist()) == ([4.0], want)
    with pytest.raises(ValueError, match=r"`unconnected_gradients` must be 'none' or 'zero'\. Received: 'zeros'"):
        tape.gradient(loss, a, unconnected_gradients="zeros")


def test_targets_that_are_no_scalars() -> None:
    x = leaf(1.0, 2.0)
    seed = torch.tensor([10.0, 100.0])
    cases: list[tuple[Callable[[], Any], Any, list[float]]] = [
        (lambda: x * x, None, [2.0, 4.0]),
        (lambda: x * x, seed, [20.0, 400.0]),
        (lambda: [x * x, 3 * x], None, [5.0, 7.0]),
        (lambda: {"a": x, "b": torch.ones(2)}, None, [1.0, 1.0]),
    ]
    for target, seeds, want in cases:
        with GradientTape() as tape:
            y = target()
        assert tape.gradient(y, x, output_gradients=seeds).tolist() == want


def test_recording_can_stop() -> None:
    x = leaf(2.0)
    with torch.no_grad(), GradientTape() as tape:  # a tape records whatever the mode around it
        y = x * x
        with tape.stop_recording():
            z = y * 3
        assert (y.requires_grad, z.requires_grad) == (True, False)
        with pytest.raises(ValueError, match="Tape is still recording"):
            tape.__enter__()
    assert torch.is_grad_enabled()
    assert tape.gradient(y * z.detach(), x).tolist() == [48.0]
    with pytest.raises(ValueError, match="The tape is not recording"):
        tape.stop_recording().__enter__()


def test_a_tape_left_by_an_exception_records_no_more() -> None:
    x = leaf(2.0)
    with pytest.raises(ZeroDivisionError), GradientTape():
        raise ZeroDivisionError
    with GradientTape() as tape:
        y = x * x
    assert not tape.gradient(y, x).requires_grad
