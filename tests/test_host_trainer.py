"""Hugging Face's Trainer: our classes as its optimizer, resumption bit for bit, learning rates in its log."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import OPTIONS, assert_equal, leaves, make, torch_optim
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

STEPS = 8
CONFIG = GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
ROWS = [torch.arange(start, start + 8) % 32 for start in range(32)]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def network(dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    """A transformer of 4000 parameters, untrained."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(CONFIG).to(dtype)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    given = {"max_steps": STEPS, "save_steps": STEPS // 2, "logging_steps": 1, "per_device_train_batch_size": 4, "weight_decay": 0.1}
    return TrainingArguments(str(folder), **{**given, **options}, report_to="none", use_cpu=True, disable_tqdm=True)


def trainer(model: GPT2LMHeadModel, args: TrainingArguments, **options: Any) -> Trainer:
    return Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in ROWS], **options)


def states(trained: Trainer) -> Any:
    assert trained.optimizer is not None
    return trained.model.state_dict(), trained.optimizer.state_dict()


def logged(trained: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trained.state.log_history if name in entry]


@pytest.mark.parametrize(("dtype", "mixed"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("name", OPTIONS)
def test_training_and_resumption(name: str, dtype: torch.dtype, mixed: bool, tmp_path: Path) -> None:
    args = arguments(tmp_path, bf16=mixed)
    chosen = (getattr(torch_optim, name), OPTIONS[name])
    whole = trainer(network(dtype), args, optimizer_cls_and_kwargs=chosen)
    whole.train()
    losses = logged(whole, "loss")
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    resumed = trainer(network(dtype), args, optimizer_cls_and_kwargs=chosen)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert logged(resumed, "loss") == losses
    assert_equal(states(resumed), states(whole))
    assert resumed.optimizer is not None
    kinds = {value.dtype for value in leaves(resumed.optimizer.state_dict()["state"]).values() if value.is_floating_point()}
    assert kinds == {torch.float32}  # also of bfloat16 parameters


def test_an_optimizer_and_its_schedule(tmp_path: Path) -> None:
    """The rate that is logged is the rate of the step."""
    model = network()
    optimizer = make("AdamW", model.named_parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    run = trainer(model, arguments(tmp_path), optimizers=(optimizer, schedule))
    run.train()
    assert logged(run, "learning_rate") == [OPTIONS["AdamW"]["lr"] * 0.5**step for step in range(STEPS)]
