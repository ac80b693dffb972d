"""GradientTape over torch autograd, so that Keras's custom training loop runs with only its imports changed."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

_active = threading.local()


def _stack() -> "list[GradientTape]":
    if not hasattr(_active, "tapes"):
        _active.tapes = []
    tapes: list[GradientTape] = _active.tapes
    return tapes


class GradientTape:
    """Records operations for differentiation, as tf.GradientTape does.

    Leaves with requires_grad are watched by themselves, other leaves by `watch`. `gradient` may be called once, or more
    often where `persistent=True`. Gradients computed while another tape records can be differentiated again.

    Args:
        persistent: keep the graph for further calls of `gradient`.
        watch_accessed_variables: False watches nothing but what `watch` names.
    """

    def __init__(self, persistent: bool = False, watch_accessed_variables: bool = True) -> None:
        self._persistent = persistent
        self._watch_all = watch_accessed_variables
        self._watched: dict[int, Tensor] = {}
        self._used = False
        self._grad_mode: torch.enable_grad | None = None

    def __enter__(self) -> Self:
        if self._grad_mode is not None:
            raise ValueError("Tape is still recording. Leave its with block before entering it again.")
        self._grad_mode = torch.enable_grad()
        self._grad_mode.__enter__()
        _stack().append(self)
        return self

    def __exit__(self, *exception: Any) -> None:
        _stack().remove(self)
        if self._grad_mode is not None:
            self._grad_mode.__exit__(*exception)
        self._grad_mode = None

    def watch(self, tensor: Any) -> None:
        """Record operations on a tensor, or on a nested list of them, from here on. Raises TypeError unless floating.

        The tensors keep requires_grad, which is how torch records, after the tape is left.
        """
        for t in flatten(tensor):
            if not t.dtype.is_floating_point:
                raise TypeError(f"Only floating tensors can be watched. Received dtype {t.dtype}.")
            t.requires_grad_(True)
            self._watched[id(t)] = t

    def watched_variables(self) -> tuple[Tensor, ...]:
        """What `watch` named, in order."""
        return tuple(self._watched.values())

    @contextmanager
    def stop_recording(self) -> Iterator[None]:
        """Operations inside are not recorded."""
        if self._grad_mode is None:
            raise ValueError("The tape is not recording, so that its recording cannot be stopped.")
        with torch.no_grad():
            yield

    def reset(self) -> None:
        """Forget what was watched, and allow `gradient` again."""
        self._watched.clear()
        self._used = False

    def gradient(self, target: Any, sources: Any, output_gradients: Any = None, unconnected_gradients: str = "none") -> Any:
        """The gradient of `target` (its sum, where it is not a scalar) with respect to `sources`.

        Args:
            target: a tensor or a nested list of them.
            sources: a tensor, or a nested list, tuple or dict; the result has its structure.
            output_gradients: what the backward pass starts from, like `target`. Default: ones.
            unconnected_gradients: "none", or "zero" for zeros where `target` does not depend on a source.

        Raises RuntimeError at a second call unless persistent, ValueError for another `unconnected_gradients`.
        """
        if unconnected_gradients not in ("none", "zero"):
            raise ValueError(f"`unconnected_gradients` must be 'none' or 'zero'. Received: {unconnected_gradients!r}.")
        if self._used:
            raise RuntimeError("A non-persistent GradientTape can only be used to compute one set of gradients. Use persistent=True.")
        self._used = not self._persistent
        sources = list(sources) if isinstance(sources, Iterator) else sources  # model.parameters()
        variables = flatten(sources)
        watched = variables if self._watch_all else [v for v in variables if id(v) in self._watched]
        others = [t for t in _stack() if t is not self]
        found = differentiate(flatten(target), watched, flatten_optional(output_gradients), self._persistent, bool(others))
        by_id = {id(v): g for v, g in zip(watched, found, strict=True)}
        grads = [by_id.get(id(v)) for v in variables]
        if unconnected_gradients == "zero":
            grads = [torch.zeros_like(v) if g is None else g for g, v in zip(grads, variables, strict=True)]
        return _like(sources, iter(grads))


def flatten(nested: Any) -> list[Tensor]:
    """The tensors of a tensor, a callable or a nested list, tuple or dict, in order. ValueError for None."""
    if nested is None:
        raise ValueError("A variable or a list of variables is needed. Received: None.")
    if isinstance(nested, Tensor):
        return [nested]
    if isinstance(nested, (str, bytes, set, frozenset)):
        raise TypeError(f"Tensors must come in a list, tuple or dict. Received: {type(nested).__name__}.")
    if callable(nested) and not hasattr(nested, "__iter__"):  # a ParameterList has a __call__
        return flatten(nested())
    items = nested.values() if isinstance(nested, dict) else nested
    return [t for item in items for t in flatten(item)]


def flatten_optional(nested: Any) -> list[Tensor] | None:
    """`flatten`, or None for None."""
    return None if nested is None else flatten(nested)


def _like(structure: Any, leaves: Iterator[Any]) -> Any:
    if isinstance(structure, Tensor):
        return next(leaves)
    if isinstance(structure, dict):
        return {key: _like(value, leaves) for key, value in structure.items()}
    if hasattr(structure, "_fields"):
        return type(structure)(*(_like(item, leaves) for item in structure))
    if isinstance(structure, (list, tuple)):
        return type(structure)(_like(item, leaves) for item in structure)
    return [_like(item, leaves) for item in structure]


def differentiate(
    targets: Sequence[Tensor], variables: Sequence[Tensor], seeds: Sequence[Tensor] | None, retain: bool, create: bool
) -> list[Tensor | None]:
    """Gradients of the targets' sum; None where a target does not depend on a variable."""
    connected = [i for i, t in enumerate(targets) if t.requires_grad]
    inputs = [v for v in variables if v.requires_grad]
    if not connected or not inputs:
        return [None] * len(variables)
    starts = [torch.ones_like(targets[i]) if seeds is None else seeds[i] for i in connected]
    outputs = [targets[i] for i in connected]
    found = torch.autograd.grad(outputs, inputs, starts, retain_graph=retain or create, create_graph=create, allow_unused=True)
    by_id = {id(v): g for v, g in zip(inputs, found, strict=True)}
    return [by_id.get(id(v)) for v in variables]


def gradients_of(loss: Tensor | Callable[[], Tensor], var_list: Any, grad_loss: Any, tape: Any) -> list[tuple[Tensor | None, Tensor]]:
    """(gradient, variable) pairs of a callable loss, or of a tensor that `tape` recorded.

    A callable `var_list` is called after the loss, which may create variables.
    """
    if not callable(var_list):
        var_list = flatten(var_list)
    if callable(loss) and not isinstance(loss, Tensor):
        with GradientTape() if tape is None else tape as tape:
            target = loss()
    elif tape is None:
        raise ValueError("`tape` is required when a `Tensor` loss is passed. Pass the GradientTape that recorded it, or a callable loss.")
    else:
        target = loss
    variables = flatten(var_list)
    return list(zip(tape.gradient(target, variables, output_gradients=grad_loss), variables, strict=True))


def required_gradients(loss: Tensor, variables: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a loss; ValueError where there is none."""
    found = differentiate([loss], variables, None, retain=True, create=False)
    for position, (gradient, variable) in enumerate(zip(found, variables, strict=True)):
        if gradient is None:
            label = getattr(variable, "name", None) or position
            raise ValueError(
                f"Variable {label} has `None` for gradient. Please make sure that all of your ops have a gradient defined "
                "and that the loss depends on the variable."
            )
    return [g for g in found if g is not None]
