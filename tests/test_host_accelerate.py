"""Hugging Face's accelerate in one process; distributed_checks.py has DDP and the FSDP2 switch."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from hosts import OPTIONS, assert_equal, make
from safetensors.torch import load_file
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 6


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    """accelerate keeps its state in singletons."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def batches(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(6, 4, generator=random).to(dtype) for _ in range(STEPS)]


def train(model: Any, optimizer: Any, inputs: list[Tensor], accelerator: Any = None) -> None:
    for x in inputs:
        optimizer.zero_grad()
        loss = model(x).float().square().mean()
        loss.backward() if accelerator is None else accelerator.backward(loss)
        optimizer.step()


def by_hand(name: str, dtype: torch.dtype = torch.float32) -> Any:
    model = network(dtype)
    optimizer = make(name, model.named_parameters())
    train(model, optimizer, batches(dtype))
    return model.state_dict(), optimizer.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_prepare_keeps_the_state(name: str, dtype: torch.dtype) -> None:
    """`prepare` loads the optimizer's own state dict: here half-way, so that there is state to keep."""
    model = network(dtype)
    optimizer = make(name, model.named_parameters())
    train(model, optimizer, batches(dtype)[:2])
    before = optimizer.state_dict()
    accelerator = Accelerator(cpu=True)
    model, prepared = accelerator.prepare(model, optimizer)
    assert_equal(prepared.state_dict(), before)
    train(model, prepared, batches(dtype)[2:], accelerator)
    assert_equal((model.state_dict(), prepared.state_dict()), by_hand(name, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_save_state_and_load_state(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = network(dtype)
    model, optimizer = accelerator.prepare(model, make(name, model.named_parameters()))
    train(model, optimizer, batches(dtype)[:2], accelerator)
    accelerator.save_state(str(tmp_path))
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    other = network(dtype)
    other, resumed = accelerator.prepare(other, make(name, other.named_parameters()))
    train(other, resumed, batches(dtype)[:1], accelerator)
    accelerator.load_state(str(tmp_path))
    train(other, resumed, batches(dtype)[2:], accelerator)
    assert_equal((other.state_dict(), resumed.state_dict()), by_hand(name, dtype))


def test_save_model_writes_every_tensor(tmp_path: Path) -> None:
    """safetensors drops tensors that share memory."""
    accelerator = Accelerator(cpu=True)
    model = network()
    model, optimizer = accelerator.prepare(model, make("AdamW", model.parameters()))
    train(model, optimizer, batches(), accelerator)
    accelerator.save_model(model, str(tmp_path))
    assert_equal(load_file(tmp_path / "model.safetensors"), dict(model.state_dict()))


@pytest.mark.parametrize("name", OPTIONS)
def test_accumulation_clipping_and_schedule(name: str) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    optimizer: Any = make(name, model.named_parameters())
    schedule: Any = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    for x in batches():
        with accelerator.accumulate(model):
            accelerator.backward(model(x).square().mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    single = network()
    other = make(name, single.named_parameters())
    for first, second in zip(batches()[::2], batches()[1::2], strict=True):
        for x in (first, second):
            (single(x).square().mean() / 2).backward()
        nn.utils.clip_grad_norm_(single.parameters(), 0.01)
        other.step()
        other.zero_grad()
        other.param_groups[0]["lr"] *= 0.5
    assert_equal(model.state_dict(), single.state_dict())
    assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"] == OPTIONS[name]["lr"] * 0.5**3


@pytest.mark.parametrize("amp", [None, "fused"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_that_overflows_changes_nothing(name: str, amp: Any) -> None:
    """accelerate asks whether `step` was called. With amp="fused" it always is, and skips itself."""
    Accelerator(cpu=True)
    model = network()
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=4.0)
    ours = make(name, model.named_parameters(), amp=amp)
    optimizer = AcceleratedOptimizer(ours, scaler=scaler)
    for overflow in (False, True, False):
        before = copy.deepcopy((model.state_dict(), ours.state_dict()["state"]))
        optimizer.zero_grad()
        scaler.scale(model(batches()[0]).square().mean()).backward()
        if overflow:
            model[0].weight.grad[0, 0] = float("inf")
        optimizer.step()
        assert optimizer.step_was_skipped is (overflow and amp is None)
        if overflow:
            assert_equal((model.state_dict(), ours.state_dict()["state"]), before)
    assert scaler.get_scale() == 2.0
    single = network()
    other = make(name, single.named_parameters())
    train(single, other, batches()[:1] * 2)
    assert_equal((model.state_dict(), ours.state_dict()), (single.state_dict(), other.state_dict()))
