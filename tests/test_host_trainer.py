"""Hugging Face's Trainer: our classes as its optimizer, resumption bit for bit, learning rates in its log."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import OPTIONS, assert_equal, leaves, make, torch_optim
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from fused_kopt import hf

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


@pytest.mark.slow(every=2)
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
    kinds = {value.dtype for value in leaves(resumed.optimizer.state_dict()["state"]).values() if value.dim()}
    assert kinds == {torch.float32}  # the slots, also of bfloat16 parameters


def test_an_optimizer_and_its_schedule(tmp_path: Path) -> None:
    """The rate that is logged is the rate of the step."""
    model = network()
    optimizer = make("AdamW", model.named_parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    run = trainer(model, arguments(tmp_path), optimizers=(optimizer, schedule))
    run.train()
    assert logged(run, "learning_rate") == [OPTIONS["AdamW"]["lr"] * 0.5**step for step in range(STEPS)]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("adamw", {"adam_beta1": 0.8}, {"betas": (0.8, 0.999), "eps": 1e-8}),
        ("Lion", {"adam_beta2": 0.99}, {"betas": (0.9, 0.99)}),
        ("nadam", {"optim_args": "eps=1e-7"}, {"betas": (0.9, 0.999), "eps": 1e-7}),
        (
            "SGD",
            {"optim_args": "momentum=0.9, nesterov=True, executor=reference"},
            {"momentum": 0.9, "nesterov": True, "executor": "reference"},
        ),
        ("ftrl", {}, {}),
    ],
)
def test_training_arguments_become_ours(name: str, options: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    args = arguments(tmp_path, learning_rate=0.02, **options)
    cls, found = hf.optimizer_cls_and_kwargs(name, args)
    assert cls.__name__.lower() == name.lower()
    assert found == {"lr": 0.02, **expected}
    run = trainer(network(), args, optimizer_cls_and_kwargs=(cls, found))
    run.train()
    assert type(run.optimizer.optimizer) is cls
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.1, 0.0]
    assert logged(run, "learning_rate")[0] == 0.02


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("adafactor", None, "`name` must be one of sgd, adadelta"),
        ("sgd", "momentum", "`optim_args` must be name=value pairs.*'momentum'"),
        ("sgd", "momentum=", "'momentum='"),
    ],
)
def test_refusals(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        hf.optimizer_cls_and_kwargs(name, arguments(tmp_path, optim_args=text))
