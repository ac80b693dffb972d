"""What Keras does not offer publicly, and its scalar variables on the host."""

from typing import Any

import keras
import torch

# Keras has no public way to ask; under a StatelessScope no variable may be written in place.
from keras.src.backend.common.stateless_scope import in_stateless_scope
from torch import Tensor

__all__ = ["Host", "in_stateless_scope"]

if keras.backend.backend() != "torch":
    raise ImportError(
        f"fused_kopt.keras needs Keras's torch backend; this process runs {keras.backend.backend()!r}. Set the environment variable "
        "KERAS_BACKEND=torch before keras is imported, or `backend` in ~/.keras/keras.json."
    )


class Host:
    """Reads and writes 0-d Keras variables. On a GPU a value is fetched once, then again only after somebody else wrote it.

    What is written past torch's version counter (`variable.value.data.fill_(x)`) is not noticed there; `assign` is.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, int, float]] = {}

    def read(self, variable: Any) -> float:
        """The variable's value as a Python number."""
        value: Tensor = variable._value
        if not self._remembers(value):
            return value.item()
        known = self._known.get(id(variable))
        if known is None or known[0] is not value or known[1] != value._version:
            self._known[id(variable)] = known = (value, value._version, value.item())
        return known[2]

    def write(self, variable: Any, number: float) -> None:
        """Set the variable in place."""
        value = variable._value
        with torch.no_grad():
            value.fill_(number)
        if self._remembers(value):
            rounded = torch.tensor(number, dtype=value.dtype, device="cpu").item()
            self._known[id(variable)] = (value, value._version, rounded)

    def _remembers(self, value: Tensor) -> bool:
        return not value.is_cpu
