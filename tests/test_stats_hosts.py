"""`stats_every` and `last_stats()` of fused_kopt.keras and fused_kopt.torch_optim, and the callbacks that write them."""

import copy
import csv
import math
import pickle
from pathlib import Path
from typing import Any

import keras
import lightning
import numpy as np
import pytest
import stock
import support
import torch
import torch_classes
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from test_stats import check, last
from torch.utils.tensorboard import SummaryWriter

import fused_kopt.keras
from fused_kopt import torch_optim
from fused_kopt.lightning import StatsLogger

EXECUTORS = ("reference", "triton", "compiled")


@pytest.mark.parametrize("executor", EXECUTORS)
def test_torch_groups(executor: Any) -> None:
    """Three groups, decay and clipping: the numbers of the whole step, the bits of an unmeasured one."""
    params, others = torch_classes.parameters(), torch_classes.parameters()

    def build(params: Any, **more: Any) -> torch_optim.Optimizer:
        groups = [{"params": params[:2], "lr": 0.25}, {"params": params[2:], "weight_decay": 0.1}]
        return torch_optim.AdamW(groups, executor=executor, global_clipnorm=1.0, **more)

    measured, plain = build(params, stats_every=2), build(others)
    for step in range(1, 7):
        torch_classes.give(others, step)
        plain.step()
        before = [p.detach().clone() for p in params]
        torch_classes.steps(measured, params, [step])
        support.assert_same(torch_classes.snapshot(measured, params), torch_classes.snapshot(plain, others))
        if step % 2 == 0:
            check(last(measured), [p.grad for p in params if p.grad is not None], before, [p.detach() for p in params])
            assert (last(measured)["iterations"], last(measured)["learning_rate"]) == (step, 0.25)


def test_torch_rules_of_two_kinds_are_one_step() -> None:
    params = torch_classes.parameters()
    groups = [{"params": params[:2], "amsgrad": True}, {"params": params[2:]}]
    optimizer = torch_optim.Adam(groups, stats_every=1)
    before = [p.detach().clone() for p in params]
    torch_classes.steps(optimizer, params, [1])
    check(last(optimizer), [p.grad for p in params if p.grad is not None], before, [p.detach() for p in params])


def test_torch_options_and_copies() -> None:
    params = torch_classes.parameters()
    with pytest.raises(ValueError, match="`stats_every` must be an int >= 0"):
        torch_optim.Adam(params, stats_every=-1)
    optimizer = torch_optim.Adam(params)
    with pytest.raises(RuntimeError, match="stats_every=1"):
        optimizer.last_stats()
    optimizer.stats_every = 1
    assert optimizer.last_stats() is None
    torch_classes.steps(optimizer, params, [1])
    assert "stats_every" not in str(optimizer.state_dict())
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (twin.stats_every, twin.last_stats()) == (1, None)
        torch_classes.steps(twin, twin.param_groups[0]["params"], [2])
        assert last(twin)["iterations"] == 2
    loaded = torch_optim.Adam(torch_classes.parameters(), stats_every=1)
    loaded.load_state_dict(optimizer.state_dict())
    torch_classes.steps(loaded, loaded.param_groups[0]["params"], [2])
    assert last(loaded)["iterations"] == 2


def test_torch_steps_that_a_scaler_skips() -> None:
    params = torch_classes.parameters()
    optimizer, scaler = torch_optim.SGD(params, lr=0.5, amp="fused", stats_every=1), torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, bad in enumerate((False, True, False)):
        scaler.scale(torch.ones(()))  # a scaler unscales what it has scaled
        torch_classes.give(params, step)
        assert params[3].grad is not None
        if bad:
            params[3].grad[0] = math.inf
        unscaled, before = [p.grad / scaler.get_scale() for p in params if p.grad is not None], [p.detach().clone() for p in params]
        scaler.step(optimizer)
        scaler.update()
        if not bad:
            check(last(optimizer), unscaled, before, [p.detach() for p in params])
    assert (last(optimizer)["skipped_steps"], last(optimizer)["iterations"]) == (1, 2)


OPTIONS = ("plain", "decay", "global_clipnorm", "clipvalue", "ema", "loss scale")


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("option", OPTIONS)
def test_keras_options(option: str, executor: Any) -> None:
    """The numbers of the update, the bits of an unmeasured one."""
    options = stock.OPTIONS[option]
    scale = options.get("loss_scale_factor", 1.0)
    measured, plain = (stock.ours("Adam", **options) for _ in range(2))
    measured.stats_every = 2
    first, second = stock.variables(), stock.variables()
    for step in range(1, 5):
        measured.executor = plain.executor = executor
        before = [v.value.detach().clone() for v in first]
        gradients = stock.gradients(step)
        measured.apply(gradients, first)
        plain.apply(gradients, second)
        assert all(torch.equal(a.value, b.value) for a, b in zip(first, second, strict=True))
        if step % 2 == 0:
            check(last(measured), [g / scale for g in gradients], before, [v.value.detach() for v in first])
            assert (last(measured)["iterations"], last(measured)["learning_rate"]) == (step, np.float32(stock.RATE))


def test_keras_counts_updates_where_gradients_accumulate() -> None:
    optimizer, variables = stock.ours("SGD", gradient_accumulation_steps=3), stock.variables()
    optimizer.stats_every = 2
    for step in range(1, 10):
        before = [v.value.detach().clone() for v in variables]
        optimizer.apply(stock.gradients(step), variables)
        if step == 6:
            total = [sum(gs) / 3 for gs in zip(*map(stock.gradients, (4, 5, 6)), strict=True)]
            after = [v.value.detach().clone() for v in variables]
            found = last(optimizer)
            # the sums of three gradients are rounded to float32
            assert found["gradient_norm"] == pytest.approx(math.sqrt(sum(float((g.double() ** 2).sum()) for g in total)), rel=1e-6)
            check(found | {"gradient_norm": 0.0}, [], before, after)
    assert last(optimizer)["iterations"] == 6


def test_keras_fused_stock_and_loss_scale() -> None:
    optimizer, variables = fused_kopt.keras.fuse(keras.optimizers.Adam()), stock.variables()
    with pytest.raises(RuntimeError, match="stats_every=1"):
        optimizer.last_stats()
    optimizer.stats_every = 1
    optimizer.apply(stock.gradients(1), variables)
    assert last(optimizer)["iterations"] == 1
    inner = fused_kopt.keras.SGD()
    with pytest.raises(RuntimeError, match="stats_every=1"):
        inner.last_stats()
    inner.stats_every = 1
    assert inner.last_stats() is None
    scaled = fused_kopt.keras.LossScaleOptimizer(inner, initial_scale=8.0)
    for step, bad in enumerate((False, True, False)):
        gradients = stock.gradients(step)
        if bad:
            gradients[-1][0] = math.inf
        scaled.apply(gradients, variables)
    assert (last(inner)["skipped_steps"], last(inner)["iterations"]) == (1, 2)  # the scale was 8, and is 4 after the skip
    assert last(inner)["gradient_norm"] == pytest.approx(math.sqrt(sum(float(((g / 4).double() ** 2).sum()) for g in stock.gradients(2))))


def test_keras_lamb_says_no() -> None:
    optimizer, variables = fused_kopt.keras.Lamb(), stock.variables()
    optimizer.stats_every = 1
    with pytest.raises(ValueError, match="`stats_every` must be 0 for Lamb"):
        optimizer.apply(stock.gradients(1), variables)


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


class Scalars(SummaryWriter):
    """A SummaryWriter that remembers."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.seen: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: Any, step: Any = None, *more: Any) -> None:  # type: ignore[override]
        super().add_scalar(tag, value, step, *more)
        self.seen.append((tag, value, step))


def fit(optimizer: Any, callback: Any, epochs: int = 2) -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)])
    model.compile(optimizer, loss="mse")
    x = np.random.default_rng(0).normal(size=(48, 4)).astype("float32")
    model.fit(x, x[:, :1], batch_size=8, epochs=epochs, verbose=0, shuffle=False, callbacks=[callback])


@pytest.mark.parametrize(("every", "expected"), [("epoch", [6, 12]), (4, [4, 8, 12]), (1, [2, 4, 6, 8, 10, 12])])
def test_keras_logger(every: Any, expected: list[int], tmp_path: Path) -> None:
    """Six batches an epoch, measured every second one."""
    optimizer, writer = fused_kopt.keras.Adam(0.1), Scalars(tmp_path / "board")
    optimizer.stats_every = 2
    fit(optimizer, fused_kopt.keras.StatsLogger(tmp_path / "stats.csv", writer, every))
    writer.close()
    found = rows(tmp_path / "stats.csv")
    assert [int(row["iterations"]) for row in found] == expected
    assert {name: float(value) for name, value in found[-1].items()} == last(optimizer)
    assert [step for tag, _, step in writer.seen if tag == "optimizer/update_ratio"] == expected
    assert {tag.removeprefix("optimizer/"): value for tag, value, step in writer.seen if step == 12} == last(optimizer)
    assert list((tmp_path / "board").glob("events.out.tfevents.*"))


def test_keras_logger_refuses(tmp_path: Path) -> None:
    file = tmp_path / "stats.csv"
    with pytest.raises(ValueError, match="nowhere to write"):
        fused_kopt.keras.StatsLogger()
    for every in (0, -1, "batch", 1.5):
        with pytest.raises(ValueError, match="`every` must be 'epoch' or an int > 0"):
            fused_kopt.keras.StatsLogger(file, every=every)
    with pytest.raises(TypeError, match=r"needs an optimizer of fused_kopt.keras, or fuse\(optimizer\). Received: Adam."):
        fit(keras.optimizers.Adam(), fused_kopt.keras.StatsLogger(file))
    with pytest.raises(RuntimeError, match="stats_every=1"):
        fit(unmeasured := fused_kopt.keras.Adam(), fused_kopt.keras.StatsLogger(file))
    assert int(unmeasured.iterations.value) == 0  # before the first step
    assert not file.exists()


class Module(lightning.LightningModule):
    def __init__(self, build: Any) -> None:
        super().__init__()
        self.layer, self.build = torch.nn.Linear(4, 1), build

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return self.build(self.parameters())


def train(build: Any, callback: Any, loggers: Any, **more: Any) -> lightning.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_steps=6, logger=loggers, callbacks=[callback], **{**quiet, **more})
    trainer.fit(Module(build), torch.utils.data.DataLoader(support.randn(64, 4), batch_size=4))
    return trainer


lightning_warnings = pytest.mark.filterwarnings(
    "ignore:.*(num_workers|LeafSpec|treespec|isinstance|GPU|tensorboardX|smaller than the logging interval)"
)


@lightning_warnings
@pytest.mark.parametrize(("every", "expected"), [(None, [2, 4, 6]), (3, [3, 6])])
def test_lightning_logger(every: Any, expected: list[int], tmp_path: Path) -> None:
    def build(params: Any) -> Any:
        return torch_optim.Adam(params, lr=0.1, stats_every=1)

    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    trainer = train(build, StatsLogger(every), loggers, log_every_n_steps=2, accumulate_grad_batches=2)
    (file,) = tmp_path.rglob("metrics.csv")
    found = [row for row in rows(file) if row["optimizer/iterations"]]
    assert [int(row["step"]) for row in found] == [int(row["optimizer/iterations"]) for row in found] == expected
    assert {name: float(found[-1][f"optimizer/{name}"]) for name in last(trainer.optimizers[0])} == last(trainer.optimizers[0])
    assert list(tmp_path.rglob("events.out.tfevents.*"))


@lightning_warnings
def test_lightning_logger_refuses(tmp_path: Path) -> None:
    for every in (0, -1, 1.5):
        with pytest.raises(ValueError, match="`every` must be None or an int > 0"):
            StatsLogger(every)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"needs an optimizer of fused_kopt.torch_optim. Received: SGD."):
        train(lambda params: torch.optim.SGD(params, 0.1), StatsLogger(), CSVLogger(tmp_path))
    with pytest.raises(RuntimeError, match="stats_every=1"):
        train(lambda params: torch_optim.SGD(params, 0.1), StatsLogger(), CSVLogger(tmp_path))
