"""Optimizers for Hugging Face's Trainer, from its TrainingArguments. Imports nothing of transformers."""

import ast
import inspect
from typing import Any, Protocol

from fused_kopt import torch_optim

CLASSES = {name.lower(): getattr(torch_optim, name) for name in torch_optim.__all__ if name != "Optimizer"}


class Arguments(Protocol):
    """What is read of transformers.TrainingArguments."""

    learning_rate: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    optim_args: str | None


def optimizer_cls_and_kwargs(name: str, args: Arguments) -> tuple[type[torch_optim.Optimizer], dict[str, Any]]:
    """What `Trainer(..., optimizer_cls_and_kwargs=...)` takes: a class of fused_kopt.torch_optim and its keyword arguments.

        args = TrainingArguments("out", learning_rate=3e-4, optim_args="global_clipnorm=1.0", max_grad_norm=0)
        trainer = Trainer(model, args, optimizer_cls_and_kwargs=fused_kopt.hf.optimizer_cls_and_kwargs("adamw", args), ...)

    Args:
        name: of the class, in any case: "adamw", "sgd", "lion"...
        args: TrainingArguments. `learning_rate` is taken always, `adam_beta1` and `adam_beta2` where the class has `betas`,
            `adam_epsilon` where it has `eps` as well; `optim_args` ("momentum=0.9,nesterov=True") last. `weight_decay` is not in the
            result: Trainer puts it into the parameter groups, 0 for biases and norms.

    Raises ValueError for an unknown name and for `optim_args` that are not `name=value` pairs.
    """
    cls = CLASSES.get(name.lower())
    if cls is None:
        raise ValueError(f"`name` must be one of {', '.join(CLASSES)}. Received: name={name!r}.")
    known = inspect.signature(cls).parameters
    found: dict[str, Any] = {"lr": args.learning_rate}
    if "betas" in known:
        found["betas"] = (args.adam_beta1, args.adam_beta2)
        if "eps" in known:
            found["eps"] = args.adam_epsilon
    return cls, found | _parsed(args.optim_args)


def _parsed(text: str | None) -> dict[str, Any]:
    """`a=1,b=True,c=word` as a dict."""
    found: dict[str, Any] = {}
    for pair in text.split(",") if text else ():
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not (name.isidentifier() and equals and value):
            raise ValueError(f"`optim_args` must be name=value pairs with commas between them. Received: {pair!r} in optim_args={text!r}.")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found
