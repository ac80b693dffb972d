"""Weights, files and copies: Keras's, but for what it does silently or by halves."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fused_kopt.keras import plan


class Stateful:
    """Comes before a stock Keras optimizer."""

    name: str
    built: bool
    variables: list[Any]
    _copied: Any = ()  # weights of the optimizer that this one is an unbuilt copy of

    def build(self, variables: Any) -> None:
        """Create the slots of the variables; in a copy of an optimizer that was built, with that one's values."""
        super().build(variables)  # type: ignore[misc]
        if self._copied:
            self.built = True
            self.set_weights(self._copied)
            self._copied = ()

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Write values into `variables`, in their order. Raises ValueError for a wrong count or shape; nothing is written then."""
        if not self.built:
            super().set_weights(weights)  # type: ignore[misc] # raises Keras's ValueError
        wrong = _differences(self.variables, weights)
        if wrong:
            raise ValueError(f"The weights do not fit the optimizer {self.name!r}: {wrong}")
        for variable, value in zip(self.variables, weights, strict=True):
            variable.assign(value)

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """Take the state from a file. A state of another count is skipped with a warning, as in Keras, that says what differs.

        Raises ValueError for another shape; nothing is written then.
        """
        saved = [store[str(i)] for i in range(len(store.keys()))]
        wrong = _differences(self.variables, saved)
        if wrong and len(saved) == len(self.variables):
            raise ValueError(f"The saved state does not fit the optimizer {self.name!r}: {wrong}")
        if wrong:
            hint = "" if self.built else "it has not been built (call optimizer.build(model.trainable_variables) first); "
            warnings.warn(f"Skipping variable loading for optimizer '{self.name}': {hint}{wrong}", stacklevel=2)
            return
        for variable, value in zip(self.variables, saved, strict=True):
            variable.assign(value)

    def __reduce__(self) -> Any:
        # A copy is not built, so that Keras's own loses the state; this one takes it when it is.
        weights = [variable.numpy() for variable in self.variables] if self.built else list(self._copied)
        return _copy, (type(self), self.get_config(), weights)  # type: ignore[attr-defined]


def _copy(cls: Any, config: Any, weights: Any) -> Any:
    copy = cls.from_config(config)
    copy._copied = weights
    return copy


def _differences(variables: Sequence[Any], given: Sequence[Any]) -> str:
    """How given arrays differ from variables, or ''."""
    shapes: list[Any] = [tuple(np.shape(array)) for array in given]
    own: list[Any] = [tuple(variable.shape) for variable in variables]
    if own == shapes:
        return ""
    at = next((i for i, (a, b) in enumerate(zip(own, shapes, strict=False)) if a != b), min(len(own), len(shapes)))
    here = plan.label(variables[at]) if at < len(own) else "nothing"
    there = shapes[at] if at < len(shapes) else "nothing"
    text = f"it has {len(own)} variables, {len(shapes)} were given. The first difference is at {at}: {here} here, {there} there."
    if len(own) == len(shapes):
        return text
    options = "momentum, centered, amsgrad, use_ema, gradient_accumulation_steps, a schedule instead of a float"
    return f"{text} The class and its options ({options}) decide on the variables."
