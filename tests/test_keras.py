"""fused_kopt.keras against Keras 3's own optimizers on the torch backend, step by step."""

import warnings
from typing import Any

import keras
import numpy as np
import pytest
import stock
import torch
from support import assert_same, bits

import fused_kopt.keras
from fused_kopt.keras import adadelta, adagrad, adam, adamax, ftrl, host, lion, nadam, rmsprop, sgd
from fused_kopt.optimizers import adagrad as legacy_adagrad

FUSED = ("compiled", "triton")


def bound(case: str, option: str) -> float:
    """How far the variables, of magnitude 3 and with 60 steps of about 0.01, may be from Keras's in float32.

    Each step rounds a variable twice, by 1.2e-7, in another order; errors of either sign: 60 ** 0.5 * 1.2e-7. Nesterov's
    variables reach 8. Keras takes the powers of a float32 beta, 6.6e-6 off at first and less later: 3e-6 on the sum of the
    steps. An average that overwrites the variable contains Keras's float32 `1 - momentum`, 7e-7 of the variable each time.
    """
    name, own = stock.CLASSES[case]
    slack = 4e-6 if name in ("Adam", "AdamW", "Nadam") or own.get("nesterov") else 1e-6
    return slack + (6e-6 if "ema_overwrite_frequency" in stock.OPTIONS[option] else 0)


@pytest.mark.slow(every=7)
@pytest.mark.parametrize("option", stock.OPTIONS)
@pytest.mark.parametrize("case", stock.CLASSES)
def test_every_class_and_option_follows_keras(case: str, option: str) -> None:
    first, second = stock.ours(case, **stock.OPTIONS[option]), stock.theirs(case, **stock.OPTIONS[option])
    assert stock.distance(stock.train(first), stock.train(second)) <= bound(case, option)
    assert [v.shape for v in first.variables] == [v.shape for v in second.variables]
    for a, b in zip(stock.values(first.variables), stock.values(second.variables), strict=True):
        # states are sums of squares and averages: 1e-5 of the largest is ten times what was seen
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1e-9, np.abs(b).max(initial=0)))


@pytest.mark.parametrize("case", [case for case, (name, _) in stock.CLASSES.items() if name != "AdamW"])
def test_float64(case: str) -> None:
    # both compute in doubles; Keras's Ftrl has its options in float32, which its linear slot, up to 1e3, magnifies
    limit = 2e-8 if case.startswith("ftrl") else 1e-14
    first, second = (stock.train(make(case), steps=50, dtype="float64") for make in (stock.ours, stock.theirs))
    assert stock.distance(first, second) <= limit


def test_float64_decay_is_exact() -> None:
    """Keras rounds 1 - lr * weight_decay to float32 for float64 variables; ours is the formula in numpy."""
    start, rate = stock.values(stock.variables(dtype="float64")), float(np.float32(stock.RATE))
    expected = [v.copy() for v in start]
    for step in range(50):
        for v, g in zip(expected, stock.gradients(step, dtype="float64"), strict=True):
            v[...] = v * (1 - 0.1 * rate) - rate * g.numpy()
    found = stock.train(stock.ours("SGD", weight_decay=0.1), steps=50, dtype="float64")
    assert stock.distance(found, expected) <= 1e-14


def swapped(declaration: Any, **scalars: str) -> Any:
    """The declaration with scalars taken from others."""

    def wrong(optimizer: Any, step: Any) -> Any:
        right = declaration.scalars(optimizer, step)
        return right._replace(**{name: getattr(right, other) for name, other in scalars.items()})

    return declaration._replace(scalars=wrong)


WRONG = {
    "SGD": sgd.DECLARATIONS[0]._replace(scalars=lambda o, s: sgd._scalars(o, s._replace(rate=s.rate * (1 + 1e-4)))),
    "momentum": sgd.DECLARATIONS[0]._replace(rule=lambda o: sgd.nesterov),
    "nesterov": sgd.DECLARATIONS[0]._replace(rule=lambda o: sgd.momentum),
    "RMSprop": rmsprop.DECLARATIONS[0]._replace(scalars=lambda o, s: rmsprop._scalars(o, s)._replace(epsilon=0.0)),
    "Adam": swapped(adam.DECLARATIONS[0], beta_2="beta_1", one_minus_beta_2="one_minus_beta_1"),
    "amsgrad": adam.DECLARATIONS[0]._replace(rule=lambda o: lambda p, g, slots, s: (adam.adam(p, g, slots[:2], s)[0], slots)),
    "AdamW": adam.DECLARATIONS[1]._replace(scalars=lambda o, s: adam._scalars(o, s._replace(t=s.t + 1))),
    "Adadelta": swapped(adadelta.DECLARATIONS[0], rho="one_minus_rho"),
    "Adagrad": adagrad.DECLARATIONS[0]._replace(
        rule=lambda o: legacy_adagrad.adagrad, scalars=lambda o, s: legacy_adagrad.Scalars(s.rate, 0.01)
    ),
    "Adamax": swapped(adamax.DECLARATIONS[0], beta_2="beta_1"),
    "Nadam": swapped(nadam.DECLARATIONS[0], next_momentum="beta_1"),
    "Ftrl": swapped(ftrl.DECLARATIONS[0], power="l1", two_l2="learning_rate"),
    "Lion": swapped(lion.DECLARATIONS[0], beta_2="beta_1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_rule_is_noticed(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = stock.ours(case)
    monkeypatch.setattr(type(optimizer), "declaration", WRONG[case])
    assert stock.distance(stock.train(optimizer), stock.train(stock.theirs(case))) > bound(case, "plain")


@pytest.mark.parametrize("wrong", [{"weight_decay": 0.11}, {"clipnorm": 0.51}, {"ema_overwrite_frequency": 8}, {"use_ema": False}])
def test_a_wrong_option_is_noticed(wrong: dict[str, Any]) -> None:
    options = {"weight_decay": 0.1, "clipnorm": 0.5, "use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 7}
    gap = stock.distance(stock.train(stock.ours("SGD", **options | wrong)), stock.train(stock.theirs("SGD", **options)))
    assert gap > bound("SGD", "ema overwrites")


@pytest.mark.parametrize("executor", FUSED)
@pytest.mark.parametrize("option", ["plain", "all"])
@pytest.mark.slow(every=5)
@pytest.mark.parametrize("case", [case for case in stock.CLASSES if case != "ftrl power"])
def test_executors_agree_to_the_bit(executor: str, option: str, case: str) -> None:
    def outcome(chosen: str) -> list[np.ndarray]:
        optimizer = stock.ours(case, **stock.OPTIONS[option])
        optimizer.executor = chosen
        trained = stock.variables()
        for step in range(4):
            optimizer.apply(stock.gradients(step), trained)
        return [bits(v.value.detach()) for v in [*trained, *optimizer.variables]]

    assert_same(outcome(executor), outcome("reference"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("executor", FUSED)
def test_half_precision(dtype: str, executor: str) -> None:
    """Variables and slots in 16 bits are computed in float32 and rounded once; Keras's Adam stands still in bfloat16."""

    def outcome(chosen: str) -> list[Any]:
        optimizer = stock.ours("Adam", epsilon=1e-4, weight_decay=0.1, use_ema=True)
        optimizer.executor = chosen
        trained = stock.variables(dtype=dtype)
        for step in range(5):
            optimizer.apply(stock.gradients(step, dtype=dtype), trained)
        return [*trained, *optimizer.variables]

    first, second = outcome(executor), outcome("reference")
    assert_same([bits(v.value.detach()) for v in first], [bits(v.value.detach()) for v in second])
    moved = stock.distance(stock.values(first[: len(stock.SHAPES)]), stock.values(stock.variables()))
    assert {v.dtype for v in first[len(stock.SHAPES) + 2 :]} == {dtype}
    assert 0.01 < moved < 0.2


@pytest.mark.parametrize("option", ["ema overwrites", "all", "decay"])
def test_subsets_in_any_order_and_missing_gradients(option: str) -> None:
    """Absent variables keep their slots and are still averaged."""

    def outcome(optimizer: Any) -> list[np.ndarray]:
        trained = stock.variables()
        optimizer.build(trained)
        for step in range(12):
            given = list(zip(stock.gradients(step), trained, strict=True))
            if step % 3 == 1:
                given = given[4:1:-1]
            elif step % 3 == 2:
                given = [(None if i % 2 else g, v) for i, (g, v) in enumerate(given)]
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.apply_gradients(given)
            assert [str(w.message)[:34] for w in caught if w.category is UserWarning] == ["Gradients do not exist for variabl"] * (
                step % 3 == 2
            )
        return stock.values([*trained, *optimizer.variables])

    first, second = outcome(stock.ours("Adam", **stock.OPTIONS[option])), outcome(stock.theirs("Adam", **stock.OPTIONS[option]))
    assert stock.distance(first, second) <= 1e-5  # as in `bound`; velocities are up to 1


def test_exclusions_from_decay() -> None:
    def outcome(optimizer: Any) -> list[np.ndarray]:
        trained = stock.variables()
        optimizer.build(trained)
        optimizer.exclude_from_weight_decay(var_list=[trained[0]], var_names=["v[34]"])
        for step in range(6):
            if step == 3:
                optimizer.exclude_from_weight_decay(var_names=["v5"])
            optimizer.apply(stock.gradients(step), trained)
        return stock.values(trained)

    first, second, third = (
        outcome(make("SGD", weight_decay=wd)) for make, wd in ((stock.ours, 5.0), (stock.theirs, 5.0), (stock.ours, 0.0))
    )
    assert stock.distance(first, second) <= 1e-6
    assert all(stock.distance([a], [b]) > 0.1 for a, b in zip(first[2:], third[2:], strict=True))


def test_no_variable_decays() -> None:
    """Keras's raises RuntimeError."""
    optimizer, plain = stock.ours("AdamW"), stock.ours("Adam")
    optimizer.exclude_from_weight_decay(var_names=["v"])
    assert stock.distance(stock.train(optimizer, 3), stock.train(plain, 3)) == 0


@pytest.mark.parametrize("clips", [{"clipnorm": v} for v in (0, -1.0, np.nan, np.inf)] + [{"clipvalue": v} for v in (0.0, -1.0, np.inf)])
def test_limits_that_are_none(clips: dict[str, Any]) -> None:
    first, second = (stock.train(make("SGD", **clips), 2) for make in (stock.ours, stock.theirs))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)  # one rounding of each of two steps


@pytest.mark.parametrize("case", ["Adam", "Nadam", "Ftrl"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_goes_where_keras_lets_it_go(case: str, value: float) -> None:
    def outcome(optimizer: Any) -> list[np.ndarray]:
        trained = stock.variables([(3,)])
        optimizer.apply([torch.tensor([1.0, value, 0.0])], trained)
        return [np.isfinite(v) for v in stock.values([*trained, *optimizer.variables])]

    with np.errstate(all="ignore"):
        assert_same(outcome(stock.ours(case)), outcome(stock.theirs(case)))


def test_accumulators_recover() -> None:
    """Keras multiplies them by 0, so that one inf stays for ever as NaN."""
    optimizer, (variable,) = stock.ours("SGD", gradient_accumulation_steps=2), stock.variables([(2,)])
    for g in (np.inf, 0.0, 1.0, 1.0):
        optimizer.apply([torch.full((2,), g)], [variable])
    assert np.array_equal(optimizer._accumulated_gradients[0].numpy(), np.zeros(2))


@pytest.mark.parametrize("rate", ["schedule", "callable", "assigned"])
@pytest.mark.parametrize("accumulation", [None, 2])
def test_learning_rates(rate: str, accumulation: int | None) -> None:
    def outcome(make: Any) -> list[np.ndarray]:
        rates = iter(np.linspace(0.1, 0.01, 100))
        given = {"schedule": keras.optimizers.schedules.PiecewiseConstantDecay([2, 5], [0.3, 0.2, 0.1]), "callable": lambda: next(rates)}
        optimizer = make("SGD", learning_rate=given.get(rate, 0.5), gradient_accumulation_steps=accumulation)
        trained = stock.variables()
        for step in range(9):
            if rate == "assigned":
                optimizer.learning_rate = 0.5 / (step + 1)
            if make is stock.theirs and rate == "callable" and accumulation and step % 2 == 0:
                next(rates)  # ours is asked in every call
            optimizer.apply(stock.gradients(step), trained)
        return stock.values(trained)

    assert stock.distance(outcome(stock.ours), outcome(stock.theirs)) <= 1e-6 * 10  # gradients of 10 and rates of 0.5


def test_constraints_come_last() -> None:
    def outcome(optimizer: Any) -> list[np.ndarray]:
        trained = stock.variables([(4, 3), (3,)])
        trained[0].constraint = keras.constraints.MaxNorm(0.5)
        for step in range(4):
            optimizer.apply(stock.gradients(step, [(4, 3), (3,)]), trained)
        return stock.values([*trained, *optimizer.variables])

    options = {"use_ema": True, "ema_overwrite_frequency": 3}
    assert stock.distance(outcome(stock.ours("SGD", **options)), outcome(stock.theirs("SGD", **options))) <= 2e-6


@pytest.mark.parametrize("accumulation", [None, 2])
def test_variables_that_take_their_gradient(accumulation: int | None) -> None:
    def outcome(optimizer: Any) -> list[np.ndarray]:
        trained = stock.variables([(3,), (2,), (4,)])
        trained[1].overwrite_with_gradient = True
        for step in range(4):
            optimizer.apply(stock.gradients(step, [(3,), (2,), (4,)]), trained)
        return stock.values([*trained, *optimizer.variables])

    options = {"use_ema": True, "weight_decay": 0.1, "clipvalue": 0.1, "gradient_accumulation_steps": accumulation}
    assert stock.distance(outcome(stock.ours("Adam", **options)), outcome(stock.theirs("Adam", **options))) <= 2e-6


def test_stateless_steps_are_keras_own() -> None:
    optimizer, trained = stock.ours("Adam", global_clipnorm=1.0), stock.variables()
    optimizer.build(trained)
    before = stock.values(trained)
    given = [torch.from_numpy(v.copy()).float() for v in before]
    state = [v.value.detach().clone() for v in optimizer.variables]
    new, slots = optimizer.stateless_apply(state, stock.gradients(0), given)
    assert int(slots[0]) == 1
    assert int(optimizer.iterations.value) == 0
    optimizer.apply(stock.gradients(0), trained)
    assert stock.distance([v.detach().double().numpy() for v in new], stock.values(trained)) <= 1e-6


@pytest.mark.parametrize("hook", fused_kopt.keras.fused.HOOKS)
def test_an_overridden_part_of_the_step_counts(hook: str) -> None:
    called = []

    def own(self: Any, *args: Any) -> Any:
        called.append(1)
        return getattr(super(Mine, self), hook)(*args)

    Mine = type("Mine", (fused_kopt.keras.SGD,), {hook: own})
    optimizer, (variable,) = (
        Mine(0.1, clipnorm=1.0, use_ema=True, ema_overwrite_frequency=1, gradient_accumulation_steps=2),
        stock.variables([(2,)]),
    )
    for _ in range(2):
        optimizer.apply([torch.ones(2)], [variable])
    assert called


def test_one_launch_per_step() -> None:
    optimizer, trained = stock.ours("AdamW", use_ema=True), stock.variables()
    optimizer.executor = "compiled"
    launches = []
    for step in range(4):
        before = fused_kopt.stats().launches
        optimizer.apply(stock.gradients(step), trained)
        launches.append(fused_kopt.stats().launches - before)
    assert launches[1:] == [1, 1, 1]
    assert optimizer.describe().launches == 1
    assert optimizer.describe().buckets[0].slots == ("momentums", "velocities", "averages")
    assert optimizer.describe().bytes_at_rest == 3 * 4 * sum(v.value.numel() for v in trained)


def test_scalars_are_read_once_where_reading_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.Host, "_remembers", lambda self, value: True)
    optimizer, trained, reads = stock.ours("Nadam"), stock.variables(), []
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: (reads.append(tensor), item(tensor))[1])
    for step in range(6):
        if step == 3:
            optimizer.learning_rate = 0.1
        reads.clear()
        optimizer.apply(stock.gradients(step), trained)
        own = [v for v in optimizer.variables if any(v.value is tensor for tensor in reads)]
        assert len(own) == {0: 3, 3: 1}.get(step, 0), step
    monkeypatch.undo()
    expected, others = stock.theirs("Nadam"), stock.variables()
    for step in range(6):
        if step == 3:
            expected.learning_rate = 0.1
        expected.apply(stock.gradients(step), others)
    assert stock.distance(stock.values(trained), stock.values(others)) <= bound("Nadam", "plain")
