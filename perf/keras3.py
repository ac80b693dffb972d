"""Keras 3's `apply` on torch: by its own classes, by subclasses that change nothing, and by ours in their place."""

import importlib
import importlib.util
import os
from typing import Any

import torch

from perf.cases import RATE, Case, Runner, Tensors
from perf.providers import Cost, Provider

CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "momentum": ("SGD", {"momentum": 0.9}),
    **{name.lower(): (name, {}) for name in ("SGD", "RMSprop", "Adam", "Adadelta", "Adagrad", "Adamax", "Nadam", "Ftrl", "Lion")},
}


def backend() -> Any:
    """Keras, on torch. Raises RuntimeError where it was imported on another backend."""
    os.environ["KERAS_BACKEND"] = "torch"  # Keras reads it at its import
    keras: Any = importlib.import_module("keras")
    if keras.backend.backend() != "torch":
        raise RuntimeError(f"Keras was imported before, on {keras.backend.backend()}; only its torch backend is measured.")
    return keras


class Keras(Provider):
    """Keras 3 on torch: `apply` under no_grad on the gradients of its variables, as Keras's own trainer calls it."""

    name = "keras"
    averages = True

    def unsuitable(self, case: Case) -> str | None:
        return "keras is not installed" if importlib.util.find_spec("keras") is None else None

    def slot_bytes(self, case: Case) -> float:
        return case.dtype.itemsize

    def make(self, case: Case, tensors: Tensors) -> Runner:
        keras, device = backend(), str(case.device)
        name, options = CLASSES[case.optimizer]
        with keras.device(device):
            variables = [keras.Variable(v, dtype=str(v.dtype).removeprefix("torch.")) for v in tensors.variables]
            optimizer = self.optimizers(keras, name)(RATE, global_clipnorm=case.clip, use_ema=case.averaged, **options)
            optimizer.build(variables)

        def step() -> None:
            with torch.no_grad(), keras.device(device):
                optimizer.apply([v.value.grad for v in variables], variables)

        return tensors.runner(step)

    def optimizers(self, keras: Any, name: str) -> Any:
        """The class to measure."""
        return getattr(keras.optimizers, name)


class Subclass(Keras):
    """A subclass that changes nothing: Keras steps tensor by tensor, as it does for any optimizer of a user's own."""

    def optimizers(self, keras: Any, name: str) -> Any:
        return type(name, (super().optimizers(keras, name),), {})


class Fused(Keras):
    """`fused_kopt.keras`: Keras's classes, with our launches."""

    name = "fused_kopt-keras"

    def optimizers(self, keras: Any, name: str) -> Any:
        return getattr(importlib.import_module("fused_kopt.keras"), name)


OURS = Fused("auto", Cost(1.3, 10))
STOCK = Keras("torch", Cost(9, 40, 20))
SUBCLASS = Subclass("subclass", Cost(9, 300, 20))
