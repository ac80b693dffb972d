"""`fuse`: Keras's own optimizers, made fast where they are."""

import functools
from collections.abc import Mapping
from typing import TypeVar

import keras

from fused_kopt.keras import adadelta, adagrad, adam, adamax, ftrl, lion, nadam, rmsprop, sgd
from fused_kopt.keras.declaration import Declaration
from fused_kopt.keras.fused import Fused
from fused_kopt.keras.loss_scale import LossScaleOptimizer
from fused_kopt.keras.stepper import Stepper

Optimizer = TypeVar("Optimizer")
MODULES = (sgd, rmsprop, adam, adadelta, adagrad, adamax, nadam, ftrl, lion)


@functools.cache
def _declarations() -> Mapping[type, Declaration]:
    """By exact class: Keras instantiates classes of its backend's under the names of the public ones."""
    every = [declaration for module in MODULES for declaration in module.DECLARATIONS]
    return {type(d.stock.__new__(d.stock)): d for d in every}


def fuse(optimizer: Optimizer) -> Optimizer:
    """Let a stock Keras optimizer take its steps in fused launches, and return it.

    Its class, config, variables and files stay Keras's, so that what it saves loads where this package is not installed. Copies
    (also of a reloaded model) are plain Keras optimizers again; fuse them anew. Of a LossScaleOptimizer the inner
    optimizer is fused. Its `executor` and `stats_every` may be set afterwards. Does nothing to an optimizer of this package,
    or a fused one.

    Raises TypeError for anything but an instance of Keras's SGD, RMSprop, Adam, AdamW, Adadelta, Adagrad, Adamax, Nadam, Ftrl or
    Lion themselves: what a subclass or another optimizer computes is not known here.
    """
    if isinstance(optimizer, (Fused, LossScaleOptimizer)):
        return optimizer
    if type(optimizer) is keras.optimizers.LossScaleOptimizer:
        fuse(optimizer.inner_optimizer)  # type: ignore[attr-defined]
        return optimizer
    declaration = _declarations().get(type(optimizer))
    if declaration is None:
        names = sorted({d.stock.__name__ for d in _declarations().values()})
        given = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
        what = f"the class {given}" if isinstance(optimizer, type) else f"an instance of {type(optimizer).__module__}.{given}"
        raise TypeError(
            f"`fuse` takes an instance of keras.optimizers.{', '.join(names)} or LossScaleOptimizer. Received: {what}. "
            "Use it as it is, or take one of those."
        )
    if "apply" not in vars(optimizer):
        stepper = Stepper(optimizer, declaration, optimizer.apply)  # type: ignore[attr-defined]
        optimizer._stepper = stepper  # type: ignore[attr-defined]
        optimizer.apply = stepper.apply  # type: ignore[attr-defined]
        optimizer.describe = stepper.describe  # type: ignore[attr-defined]
        optimizer.last_stats = stepper.recorder.last  # type: ignore[attr-defined]
    return optimizer
