"""From what the caller passed to pairs that a launch can trust, and the table of factors."""

import itertools
import logging
import types
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_kopt import layout, tensors
from fused_kopt.execute import Update
from fused_kopt.prepare import NEUTRAL_FACTORS

logger = logging.getLogger("fused_kopt")


def present(grads_and_vars: Iterable[Any]) -> list[tuple[Any, Any]]:
    """The pairs that have a gradient. Raises what `listed` and `say_missing` raise."""
    pairs = listed(grads_and_vars)
    say_missing([g is None for g, _ in pairs], [v for _, v in pairs])
    return [pair for pair in pairs if pair[0] is not None]


def flattened(pairs: Any) -> tuple[Any, list[Any]]:
    """The pairs, to be read once more, and gradients and variables in turn; an empty list of anything but an ordered iterable of pairs.

    5,000 tuples cost 2 ms, most of it the garbage collector's; zip makes one and uses it again.
    """
    if isinstance(pairs, (tuple, map, filter, types.GeneratorType)):
        pairs = list(pairs)
    if isinstance(pairs, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        return pairs, list(itertools.chain.from_iterable(pairs))
    if isinstance(pairs, zip):
        first = list(itertools.islice(pairs, 1))
        if not first or len(first[0]) != 2:
            return itertools.chain(first, pairs), []
        flat = [*first[0], *itertools.chain.from_iterable(pairs)]
        return zip(flat[::2], flat[1::2], strict=True), flat
    return pairs, []


def listed(grads_and_vars: Iterable[Any]) -> list[tuple[Any, Any]]:
    """The pairs. Raises TypeError for anything but an ordered iterable of pairs."""
    if isinstance(grads_and_vars, (set, frozenset, dict, Tensor, str)) or not isinstance(grads_and_vars, Iterable):
        raise TypeError(f"grads_and_vars must be a list of (gradient, variable) pairs. Received: {type(grads_and_vars).__name__}.")
    return [_pair(pair, i) for i, pair in enumerate(grads_and_vars)]


def say_missing(absent: Sequence[bool], variables: Sequence[Any]) -> None:
    """Raises ValueError where all gradients are absent. Logs a warning that names the variables without where only some are."""
    missing = [name(v, i) for i, (gone, v) in enumerate(zip(absent, variables, strict=True)) if gone]
    if missing and len(missing) == len(absent):
        raise ValueError(f"No gradients provided for any variable: {missing}.")
    if missing:
        warn_missing(missing)


def warn_missing(names: Sequence[str]) -> None:
    """Keras's warning, at every step that it concerns."""
    logger.warning(
        "Gradients do not exist for variables %s when minimizing the loss. If you're using `model.compile()`, "
        "did you forget to provide a `loss` argument?",
        names,
    )


def _pair(pair: Any, position: int) -> tuple[Any, Any]:
    if not isinstance(pair, (tuple, list)):
        raise TypeError(f"grads_and_vars[{position}] must be a (gradient, variable) pair. Received: {type(pair).__name__}.")
    if len(pair) != 2:
        raise ValueError(f"grads_and_vars[{position}] must be a (gradient, variable) pair. Received {len(pair)} items.")
    return pair[0], pair[1]


def name(variable: Any, position: int) -> str:
    """How messages call a variable: its position, its name if it has one, its shape."""
    label = f" {variable.name!r}" if getattr(variable, "name", None) else ""
    return f"variable {position}{label} {tuple(variable.shape) if isinstance(variable, Tensor) else type(variable).__name__}"


def check(pairs: Sequence[tuple[Any, Any]], names: Sequence[str] | None = None) -> list[tuple[Tensor, Tensor]]:
    """Pairs of detached tensors; raises TypeError, ValueError or RuntimeError for anything a step cannot update safely."""
    checked = []
    for position, (gradient, variable) in enumerate(pairs):
        what = names[position] if names else name(variable, position)
        tensors.check_variable(variable, what)
        checked.append((_gradient(gradient, variable, f"gradient of {what}"), variable))
    distinct = list({id(v): v for _, v in checked}.values())
    overlap = tensors.first_overlap(distinct)
    if overlap:
        first, second = (name(distinct[i], i) for i in overlap)
        raise ValueError(f"{first} and {second} share memory: one would be updated through the other. Pass only one of them.")
    return checked


def _gradient(given: Any, variable: Tensor, what: str) -> Tensor:
    gradient = (given if isinstance(given, Tensor) else _from_array(given, variable, what)).detach()
    if gradient.layout == torch.sparse_coo:
        if gradient.sparse_dim() != 1:
            raise ValueError(
                f"{what} has {gradient.sparse_dim()} sparse dimensions; rows (1) are supported, as from Embedding(sparse=True)."
            )
        tensors.check_storage(gradient._values(), what)
        rows = gradient._indices()
        if rows.numel() and not (int(rows.min()) >= 0 and int(rows.max()) < variable.shape[0]):
            raise ValueError(f"{what} has row indices from {int(rows.min())} to {int(rows.max())} for {variable.shape[0]} rows.")
    else:
        tensors.check_storage(gradient, what)
    if gradient.shape != variable.shape:
        raise ValueError(f"{what}: gradient shape {tuple(gradient.shape)} != variable shape {tuple(variable.shape)}.")
    if gradient.device != variable.device:
        raise ValueError(f"{what} is on {gradient.device}, the variable on {variable.device}. Move one of them.")
    return gradient.resolve_neg() if gradient.layout == torch.strided else gradient


def _from_array(gradient: Any, variable: Tensor, what: str) -> Tensor:
    array = np.asarray(gradient)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{what} must be a tensor or an array of real numbers. Received: {type(gradient).__name__} of {array.dtype}.")
    # a copy: the array may be read-only or change under an asynchronous step, and torch reads native byte order and strides >= 0 only
    native = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    return torch.tensor(native, dtype=variable.dtype, device=variable.device)


def fit(gradient: Tensor, segment: layout.Segment, written: tensors.Written) -> Tensor:
    """The gradient in the segment's layout: itself, or a copy where its layout differs or the step would write over it."""
    if layout.same_layout(segment.shape, segment.stride, gradient.stride()) and not written.touches(gradient):
        return gradient
    return layout.clone(gradient, segment.stride)


def launch_factors(update: Update, rows: Sequence[Tensor | None]) -> Tensor | None:
    """The factor table of an update, one row per segment, from the rows of those present."""
    if all(row is None for row in rows):
        return None
    neutral = torch.tensor(NEUTRAL_FACTORS, dtype=update.bucket.compute, device=update.bucket.device)
    return torch.stack([neutral if row is None else row for row in rows])
