"""A program that trains with fused_kopt.torch_optim, in a function of anybody's who knows torch.optim only."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from fused_kopt import hf, torch_optim

model = nn.Linear(3, 2)


def train(optimizer: torch.optim.Optimizer) -> None:
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=4)

    def closure() -> float:
        optimizer.zero_grad()
        value: Tensor = model(torch.ones(4, 3)).square().mean()
        value.backward()  # type: ignore[no-untyped-call]  # torch's own
        return value.item()

    optimizer.step(closure)
    schedule.step()
    optimizer.load_state_dict(optimizer.state_dict())


def parameters() -> list[nn.Parameter]:
    return list(model.parameters())


for made in (
    torch_optim.SGD(parameters(), lr=0.1, momentum=0.9, nesterov=True),
    torch_optim.RMSprop(model.named_parameters(), lr=0.1, alpha=0.8, momentum=0.5, centered=True),
    torch_optim.Adam([{"params": [model.weight], "lr": 0.1}, {"params": [model.bias]}], betas=(0.8, 0.99)),
    torch_optim.AdamW(parameters(), learning_rate=0.1, beta_1=0.8, epsilon=1e-6, weight_decay=0.01),
    torch_optim.Nadam(parameters(), lr=torch.tensor(0.1), global_clipnorm=1.0),
    torch_optim.Adamax(parameters(), amp="fused"),
    torch_optim.Lion(parameters(), executor="reference"),
):
    train(made)
plain: list[torch_optim.Optimizer] = [
    torch_optim.Adadelta(parameters(), rho=0.9),
    torch_optim.Adagrad(parameters()),
    torch_optim.Ftrl(parameters()),
]
for optimizer in plain:
    optimizer.zero_grad()
    optimizer.step()

adam = torch_optim.Adam(parameters())
assert_type(adam.param_groups, list[dict[str, Any]])
base: torch_optim.Optimizer = adam
base.clipnorm = 1.0


class Settings:
    """The attributes of transformers.TrainingArguments that are read."""

    learning_rate = 0.1
    adam_beta1 = 0.9
    adam_beta2 = 0.999
    adam_epsilon = 1e-8
    optim_args: str | None = None


cls, kwargs = hf.optimizer_cls_and_kwargs("adamw", Settings())
assert_type(cls, type[torch_optim.Optimizer])
train(cls(parameters(), **kwargs))


def wrong() -> None:
    """Never called: mistakes that a type checker finds."""
    torch_optim.AdamW(parameters(), lr="0.1")  # wrong: arg-type
    torch_optim.AdamW(3)  # wrong: arg-type
    torch_optim.SGD(parameters(), betas=(0.9, 0.9))  # wrong: call-arg
    torch_optim.SGD(parameters(), executor="gpu")  # wrong: arg-type
    torch_optim.Adam(parameters(), amp="yes")  # wrong: arg-type
    adam.step(3)  # wrong: arg-type
    hf.optimizer_cls_and_kwargs("adamw", None)  # wrong: arg-type
