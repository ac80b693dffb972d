"""LossScaleOptimizer: Keras's recorded runs, steps that are left out, and the contract."""

import copy
import json
import logging
import math
import pickle
from typing import Any

import numpy as np
import pytest
import support
import torch
from golden import scales
from torch import Tensor, nn

import fused_kopt
from fused_kopt import optimizers
from fused_kopt.mixed_precision import LossScaleOptimizer

EXECUTORS = (*support.EXECUTORS, "compiled")
BAD = (math.inf, -math.inf, math.nan)


def wrapped(executor: str = "reference", rule: str = "adam", growth: int = 2, **options: Any) -> Any:
    return LossScaleOptimizer(support.build(rule, executor, **options), dynamic_growth_steps=growth)


def scaled(optimizer: Any, gradients: list[Any]) -> list[Tensor]:
    return [g * float(optimizer.loss_scale) for g in gradients]


def scale_of(optimizer: Any) -> tuple[float, int, int]:
    return float(optimizer.loss_scale), int(optimizer.dynamic_counter), int(optimizer.iterations)


# Keras's own runs.


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(scales.PATH) as file:
        assert json.loads(str(file["cases"])) == json.loads(json.dumps(scales.CASES))
        return dict(file)


@pytest.mark.parametrize("fused", [False, True], ids=["unscaled before", "unscaled in the launch"])
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("case", range(len(scales.CASES)), ids=lambda i: scales.CASES[i][0])
def test_A3_A4_keras_runs(case: int, executor: Any, fused: bool, golden: dict[str, np.ndarray]) -> None:
    """Scale, counter, iterations, variable after every step and all weights at the end, bit for bit."""
    name, options, scaling, steps = scales.CASES[case]
    optimizer: Any = LossScaleOptimizer(getattr(optimizers, name)(**options, executor=executor), **scaling)
    variable = torch.linspace(-1, 1, scales.SIZE)
    for step, kind in enumerate(steps):
        gradient = torch.from_numpy(scales.gradient(step, kind)) * optimizer.get_scaled_loss(torch.tensor(1.0))
        if fused:
            optimizer.apply_scaled_gradients([] if kind == "e" else [(gradient, variable)])
        else:
            (unscaled,) = optimizer.get_unscaled_gradients([gradient])
            optimizer.apply_gradients([] if kind == "e" else [(unscaled, variable)])
        counter = -1 if optimizer.dynamic_counter is None else optimizer.dynamic_counter
        found = (optimizer.loss_scale, counter, optimizer.iterations, variable)
        expected = [golden[f"{case}/{key}"][step] for key in ("scale", "counter", "iterations", "variable")]
        assert all(np.array_equal(f, e, equal_nan=True) for f, e in zip(found, expected, strict=True)), (step, found, expected)
    weights = np.concatenate([np.ravel(w).astype(np.float32) for w in optimizer.get_weights()])
    assert np.array_equal(weights, golden[f"{case}/weights"], equal_nan=True)


# A step that is left out.


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("rule", support.RULES)
def test_A2_a_skipped_step_leaves_every_bit(rule: str, executor: Any) -> None:
    """Of variables and slots, first step or later, and the steps that follow are those of a run that never had it."""
    variables = [support.randn(5, 3), -torch.zeros(4), support.randn(70, seed=1).bfloat16()]
    optimizer, plain = wrapped(executor, rule), support.build(rule, executor)
    twins = [v.clone() for v in variables]
    for step in range(8):
        gradients = [support.randn(*v.shape, seed=step).to(v.dtype) for v in variables]
        spoiled = step in (0, 3, 4)
        if spoiled:
            gradients[step % 3].view(-1)[-1] = BAD[step % 3]
        before = support.state(optimizer, variables)[: len(variables)], [w.clone() for w in optimizer.weights]
        optimizer.apply_scaled_gradients(list(zip(scaled(optimizer, gradients), variables, strict=True)))
        if spoiled:
            support.assert_same(before[0], [support.bits(v) for v in variables])
            support.assert_same(
                [support.bits(w) for w in before[1][1:]], [support.bits(w) for w in optimizer.weights[1:]][: len(before[1][1:])]
            )
            plain.iterations if step else plain.build(twins)
            plain._state.count()
        else:
            plain.apply_gradients(list(zip(gradients, twins, strict=True)))
    support.assert_same(support.state(plain, twins), support.state(optimizer, variables))
    assert int(optimizer.iterations) == 8


@pytest.mark.parametrize("policy", ["bf16_master", "bf16_split", "bf16_kahan", "bf16_stochastic", "bf16_8bit"])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_precision_policies(executor: Any, policy: str) -> None:
    variables = [support.randn(n, seed=n).bfloat16() for n in (3, 64, 1025)]
    optimizer = wrapped(executor, "adam", precision=policy)
    for step in range(4):
        gradients = scaled(optimizer, [support.randn(v.numel(), seed=step) for v in variables])
        if step == 2:
            gradients[1][5] = math.nan
        before = support.state(optimizer, variables)
        optimizer.apply_scaled_gradients(list(zip(gradients, variables, strict=True)))
        after = support.state(optimizer, variables)
        changed = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)] if step else [True]
        assert sum(changed) == 1 if step == 2 else all(changed[: len(variables)]), changed  # the iterations


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam", "nadam", "ftrl"])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_sparse_gradients_are_checked_by_their_values(rule: str, executor: Any) -> None:
    variable = torch.tensor([[-0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    optimizer = wrapped(executor, rule)

    def step(value: float) -> None:
        values = torch.tensor([[1.0, value], [0.5, 0.25]]) * float(optimizer.loss_scale)
        optimizer.apply_scaled_gradients(
            [(torch.sparse_coo_tensor(torch.tensor([[0, 0]]), values, (3, 2), check_invariants=True), variable)]
        )

    step(1.0)
    before = support.state(optimizer, [variable])
    step(math.inf)
    after = support.state(optimizer, [variable])
    assert after.pop(1) == before.pop(1) + 1
    support.assert_same(before, after)
    step(1.0)
    assert not np.array_equal(support.bits(variable), before[0])
    assert int(optimizer.iterations) == 3
    assert float(optimizer.loss_scale) == 2.0**14


@pytest.mark.parametrize("executor", EXECUTORS)
def test_several_buckets_share_a_verdict(executor: Any) -> None:
    """Dtypes, gradient dtypes, a strided variable, a variable twice, None: one bad element stops all."""
    variables = [torch.ones(3), torch.ones(3, dtype=torch.float64), torch.ones(3).half(), torch.ones(4, 6)[:, ::2]]
    optimizer = wrapped(executor, "momentum")

    def step(bad: int | None) -> None:
        gradients: list[Any] = scaled(optimizer, [torch.ones(v.shape) for v in variables])
        gradients[1] = gradients[1].double()
        if bad is not None:
            gradients[bad].view(-1)[0] = math.nan
        pairs = [*zip(gradients, variables, strict=True), (gradients[0], variables[0]), (None, torch.ones(2))]
        optimizer.apply_scaled_gradients(pairs)

    step(None)
    for bad in range(4):
        before = [support.bits(t) for t in (*variables, *optimizer.weights[1:])]
        step(bad)
        support.assert_same(before, [support.bits(t) for t in (*variables, *optimizer.weights[1:])])
    step(None)
    assert not np.array_equal(before[0], support.bits(variables[0]))
    assert scale_of(optimizer) == (2.0**11, 1, 6)


def test_the_largest_gradients() -> None:
    """Squares of float32 do not overflow float64; float64 gradients count as infinite above 1e154."""
    for value, dtype, taken in ((3e38, torch.float32, True), (1e153, torch.float64, True), (1e155, torch.float64, False)):
        optimizer, variable = wrapped("reference", "sgd"), torch.zeros(3, dtype=dtype)
        optimizer.apply_gradients([(torch.full((3,), value, dtype=dtype), variable)])
        assert bool(variable.any()) is taken


@pytest.mark.parametrize(
    "clips", [{}, {"clipvalue": 0.1}, {"clipnorm": 0.5}, {"global_clipnorm": 0.5}, {"clipnorm": 0.5, "clipvalue": 0.1}]
)
@pytest.mark.parametrize("executor", ["compiled", "triton"])
def test_check_and_norms_share_a_pass(executor: Any, clips: dict[str, float]) -> None:
    """Clipping sees unscaled gradients. Only a norm of bounded gradients takes a pass of its own: these are finite always."""
    optimizer, plain = wrapped(executor, "adam", **clips), support.build("adam", executor, **clips)
    variable, twin = torch.ones(100), torch.ones(100)
    passes = 2 if len(clips) == 2 else 1
    for step in range(3):
        gradient = support.randn(100, seed=step)
        with support.launches(1 + passes * (1 if executor == "compiled" else 2)):
            optimizer.apply_scaled_gradients([(scaled(optimizer, [gradient])[0], variable)])
        plain.apply_gradients([(gradient, twin)])
    support.assert_same(support.state(plain, [twin]), support.state(optimizer, [variable]))
    optimizer.apply_scaled_gradients([(torch.full((100,), math.inf), variable)])
    assert torch.equal(variable, twin)
    assert scale_of(optimizer) == (2.0**15, 0, 4)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_flat(executor: Any) -> None:
    optimizer = wrapped(executor, "adam", growth=100)
    variables = [nn.Parameter(torch.ones(n)) for n in (3, 20)]
    flat = optimizer.flatten(variables)
    for step in range(5):
        flat.zero_grad()
        optimizer.get_scaled_loss((variables[0].sum() + variables[1].square().sum()) * (math.nan if step == 3 else 1.0)).backward()
        before = [support.bits(v) for v in variables]
        optimizer.apply_scaled_gradients(flat)
        same = all(np.array_equal(a, support.bits(v)) for a, v in zip(before, variables, strict=True))
        assert same is (step == 3)
    assert scale_of(optimizer) == (2.0**14, 1, 5)


def test_transformers_see_unscaled_gradients_and_hide_nothing() -> None:
    seen: list[Tensor] = []

    def tame(pairs: Any) -> Any:
        seen.extend(g for g, _ in pairs)
        return [(g.nan_to_num(0.0, 0.0, 0.0), v) for g, v in pairs]

    optimizer, variable = wrapped("reference", "sgd", gradient_transformers=[tame]), torch.ones(2)
    optimizer.apply_scaled_gradients([(torch.tensor([1.0, 2.0]) * 2**15, variable)])
    assert torch.equal(seen[0], torch.tensor([1.0, 2.0]))
    moved = variable.clone()
    assert torch.equal(moved, torch.ones(2) - 0.01 * torch.tensor([1.0, 2.0]))
    optimizer.apply_scaled_gradients([(torch.tensor([1.0, math.inf]), variable)])
    assert torch.equal(variable, moved)
    assert scale_of(optimizer) == (2.0**14, 0, 2)


def test_aggregation_comes_before_the_check() -> None:
    def spoil(pairs: Any) -> Any:
        return [(g * math.inf, v) for g, v in pairs]

    optimizer, variable = wrapped("reference", "sgd", gradient_aggregator=spoil), torch.ones(2)
    optimizer.apply_gradients([(torch.ones(2), variable)])
    assert torch.equal(variable, torch.ones(2))
    optimizer.apply_gradients([(torch.ones(2), variable)], experimental_aggregate_gradients=False)
    assert not torch.equal(variable, torch.ones(2))


def test_an_error_changes_no_scale() -> None:
    optimizer, variable = wrapped("reference", "adam"), torch.ones(2)
    for pairs in ([(None, variable)], [(torch.ones(3), variable)], [(torch.full((2,), math.nan), variable), (torch.ones(2), variable[:])]):
        with pytest.raises(ValueError):
            optimizer.apply_gradients(pairs)
        assert scale_of(optimizer) == (2.0**15, 0, 0)
    optimizer.executor, optimizer.verify_every = "compiled", 1
    with pytest.MonkeyPatch.context() as patch:
        support.after_each(patch, lambda update: update.variables[0].add_(1))
        with pytest.raises((fused_kopt.FusedMismatchError, RuntimeError)):
            optimizer.apply_gradients([(torch.ones(2), variable)])
    assert scale_of(optimizer) == (2.0**15, 0, 0)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_verified_steps_and_stats(executor: Any) -> None:
    optimizer, variable = wrapped(executor, "adam", verify_every=1, stats_every=1), torch.ones(2)
    for value in (3.0, math.inf, 4.0):
        optimizer.apply_scaled_gradients([(torch.tensor([value, 0.0]) * float(optimizer.loss_scale), variable)])
        stats = optimizer.last_stats()
        assert stats["skipped_steps"] == (value != 3.0)
        if math.isinf(value):
            assert stats["update_norm"] == 0.0
            assert math.isnan(stats["gradient_norm"])
            assert math.isnan(stats["weight_norm"])
        else:
            assert stats["gradient_norm"] == value
    assert fused_kopt.verify(optimizer, [(torch.ones(2), variable)], executor).equal


def test_a_fixed_scale_leaves_out_nothing() -> None:
    optimizer: Any = LossScaleOptimizer(fused_kopt.SGD(1.0), dynamic=False, initial_scale=4)
    variable = torch.zeros(2)
    optimizer.apply_scaled_gradients([(torch.tensor([4.0, math.inf]), variable)])
    assert variable.tolist() == [-1.0, -math.inf]
    assert (optimizer.dynamic, optimizer.dynamic_counter, optimizer.dynamic_growth_steps) == (False, None, None)
    assert (optimizer.initial_scale, optimizer.loss_scale.item()) == (4.0, 4.0)


def test_grad_scale_multiplies_too() -> None:
    optimizer, variable = LossScaleOptimizer(fused_kopt.SGD(1.0), initial_scale=8), torch.zeros(1)
    optimizer.grad_scale = 0.5
    optimizer.apply_scaled_gradients([(torch.full((1,), 16.0), variable)])
    assert variable.tolist() == [-1.0]


# The contract.


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("adam",), TypeError, "must be an optimizer of fused_kopt. Received: str"),
        ((torch.optim.SGD([torch.ones(1)], lr=0.1),), TypeError, "Received: SGD"),
        ((fused_kopt.SGD(), 1), TypeError, "`dynamic` must be a bool. Received: dynamic=1"),
        ((fused_kopt.SGD(), "dynamic"), TypeError, "must be a bool"),
        ((LossScaleOptimizer(fused_kopt.SGD()),), TypeError, "another LossScaleOptimizer"),
        ((LossScaleOptimizer(fused_kopt.SGD()).inner_optimizer,), ValueError, "around it already"),
        ((fused_kopt.SGD(), False), ValueError, "`initial_scale` must be given"),
        ((fused_kopt.SGD(), False, 1.0, 5), ValueError, "dynamic_growth_steps=5"),
        ((fused_kopt.SGD(), True, 0.0), ValueError, "initial_scale=0.0"),
        ((fused_kopt.SGD(), True, math.inf), ValueError, "initial_scale=inf"),
        ((fused_kopt.SGD(), True, "8"), ValueError, "initial_scale='8'"),
    ],
)
def test_construction(arguments: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        LossScaleOptimizer(*arguments)
    assert text in str(caught.value)
    if error is ValueError and "around" not in text:  # the inner optimizer is still free
        LossScaleOptimizer(arguments[0])


def test_defaults_and_forwarding() -> None:
    inner = fused_kopt.Adam(beta_1=0.8)
    optimizer: Any = LossScaleOptimizer(inner)
    assert scale_of(optimizer) == (2.0**15, 0, 0)
    assert (optimizer.initial_scale, optimizer.dynamic_growth_steps, optimizer.dynamic) == (2.0**15, 2000, True)
    assert optimizer.inner_optimizer is inner
    assert isinstance(optimizer, optimizers.Optimizer)
    optimizer.learning_rate, optimizer.clipnorm = 0.5, 2.0
    optimizer.lr = 0.25
    assert (float(inner.learning_rate), inner.clipnorm, float(optimizer.beta_1)) == (0.25, 2.0, float(inner.beta_1))
    variable = torch.ones(2)
    optimizer.build([variable])
    assert optimizer.weights is inner.weights
    assert optimizer.get_slot(variable, "m") is inner.get_slot(variable, "m")
    assert len(optimizer.get_weights()) == 3
    optimizer.set_weights([np.int64(5), np.ones(2), np.ones(2)])
    assert int(inner.iterations) == 5
    assert {"beta_1", "loss_scale", "weights", "get_scaled_loss"} <= set(dir(optimizer))
    for name in ("loss_scale", "dynamic", "inner_optimizer"):
        with pytest.raises(AttributeError):
            setattr(optimizer, name, 1)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = optimizer.nothing_like_it


def test_losses_and_gradients() -> None:
    optimizer: Any = LossScaleOptimizer(fused_kopt.SGD(), initial_scale=8)
    assert optimizer.get_scaled_loss(torch.tensor(2.0)).item() == 16.0
    assert optimizer.get_scaled_loss(lambda: torch.tensor(3.0))().item() == 24.0
    assert optimizer.get_scaled_loss(torch.tensor(2.0).half()).dtype == torch.float16
    assert LossScaleOptimizer(fused_kopt.SGD(), initial_scale=2.0**17).get_scaled_loss(torch.tensor(1.0).half()).isinf()
    gradients = optimizer.get_unscaled_gradients([torch.full((2,), 8.0), None, torch.ones(2).half()])
    assert gradients[1] is None
    assert gradients[0].tolist() == [1.0, 1.0]
    assert (gradients[2].dtype, gradients[2].tolist()) == (torch.float16, [0.125, 0.125])
    sparse = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([8.0]), (3,), check_invariants=True)
    assert optimizer.get_unscaled_gradients([sparse])[0].to_dense().tolist() == [0.0, 1.0, 0.0]


def test_a_scaled_loss_outlives_a_step() -> None:
    """Two losses are scaled before a step that changes the scale: autograd has its own copy."""
    optimizer: Any = LossScaleOptimizer(fused_kopt.SGD(), initial_scale=8, dynamic_growth_steps=1)
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    losses = [optimizer.get_scaled_loss(v.square().sum()) for v in (first, second)]
    losses[0].backward()
    optimizer.apply_scaled_gradients([(first.grad, first)])
    losses[1].backward()
    assert second.grad is not None
    assert second.grad.tolist() == [16.0, 16.0]
    assert float(optimizer.loss_scale) == 16.0


@pytest.mark.parametrize("by", ["callable", "tape", "gradients", "get_gradients"])
def test_minimize(by: str) -> None:
    optimizer: Any = LossScaleOptimizer(fused_kopt.Adam(), initial_scale=8)
    plain, variable, twin = fused_kopt.Adam(), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    for _ in range(3):
        if by == "callable":
            optimizer.minimize(lambda: variable.pow(3).sum(), [variable])
        elif by == "tape":
            with fused_kopt.GradientTape() as tape:
                loss = variable.pow(3).sum()
            optimizer.minimize(loss, [variable], tape=tape)
        elif by == "gradients":
            optimizer.apply_gradients(optimizer._compute_gradients(lambda: variable.pow(3).sum(), [variable]))
        else:
            optimizer.apply_gradients(zip(optimizer.get_gradients(variable.pow(3).sum(), [variable]), [variable], strict=True))
        plain.minimize(lambda: twin.pow(3).sum(), [twin])
    assert torch.equal(variable, twin)
    assert scale_of(optimizer) == (8.0, 3, 3)


def test_what_was_forgotten_is_logged_every_time(caplog: pytest.LogCaptureFixture) -> None:
    optimizer, pairs = wrapped(), [(torch.ones(1), torch.ones(1))]

    def said() -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "fused_kopt"):
            optimizer.apply_gradients(pairs)
        return [record.getMessage() for record in caplog.records]

    assert all("get_scaled_loss and get_unscaled_gradients" in message for message in said() + said())
    optimizer.get_scaled_loss(torch.ones(()))
    assert ["get_unscaled_gradients" in message and "get_scaled_loss" not in message for message in said()] == [True]
    optimizer.get_unscaled_gradients([])
    assert said() == []


@pytest.mark.parametrize("options", [{}, {"dynamic": False, "initial_scale": 4.0}, {"initial_scale": 2.0, "dynamic_growth_steps": 7}])
def test_configuration(options: dict[str, Any]) -> None:
    schedule = optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    optimizer: Any = LossScaleOptimizer(fused_kopt.SGD(schedule, momentum=0.5), **options)
    config = json.loads(json.dumps(optimizers.serialize(optimizer)))
    assert config["class_name"] == "LossScaleOptimizer"
    assert list(config["config"]) == ["inner_optimizer", "dynamic", "initial_scale", "dynamic_growth_steps"]
    for twin in (optimizers.get(config), optimizers.deserialize(config), LossScaleOptimizer.from_config(optimizer.get_config())):
        assert type(twin) is LossScaleOptimizer
        assert twin.get_config() == optimizer.get_config()
    assert optimizers.get(optimizer) is optimizer
    given = LossScaleOptimizer.from_config({"inner_optimizer": fused_kopt.Adam(), "dynamic": True})
    assert type(given.inner_optimizer) is fused_kopt.Adam


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike(copied: Any) -> None:
    optimizer, variables = wrapped(stats_every=1), [torch.ones(3)]
    for value in (1.0, math.inf, 1.0):
        optimizer.apply_scaled_gradients([(torch.full((3,), value), variables[0])])
    twin, (other,) = copied((optimizer, variables))
    assert type(twin) is LossScaleOptimizer
    for value in (2.0, math.nan, 3.0):
        for each, variable in ((optimizer, variables[0]), (twin, other)):
            each.apply_scaled_gradients([(torch.full((3,), value), variable)])
    support.assert_same(support.state(optimizer, variables), support.state(twin, [other]))
    assert scale_of(twin) == scale_of(optimizer) == (2.0**14, 1, 6)
    assert twin.last_stats()["skipped_steps"] == 2
    with pytest.raises(ValueError, match="around it already"):
        LossScaleOptimizer(twin.inner_optimizer)
    LossScaleOptimizer(copied(optimizer.inner_optimizer))
