"""The compiled executor: the same rule through torch.compile (Inductor's C++), one vectorised, multi-threaded pass on CPU."""

import functools
import shutil
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._inductor import config as inductor

from fused_kopt import prepare

# Below so many elements a variable is packed with its neighbours: a call of its own costs about 25 us, as much as
# copying so many elements there and back.
PACKED = 16_384


def why_not() -> str | None:
    """Why torch.compile cannot build C++ here, or None."""
    compilers = [name for name in inductor.cpp.cxx if name]
    if any(shutil.which(name) for name in compilers):
        return None
    return f"no C++ compiler found among {compilers}; install g++ or clang++"


@functools.cache
def kernel(rule: Callable[..., Any], scalars: Any, clipped: bool, dtypes: tuple[torch.dtype, torch.dtype]) -> Callable[..., None]:
    """One compiled function per rule and dtypes of variable and gradient.

    Shapes, addresses, learning rates and steps do not recompile it; Inductor's disk cache serves the next process.
    """

    def step(p: Tensor, g: Tensor, slots: Sequence[Tensor], row: Tensor, factors: Tensor) -> None:
        g = g.to(row.dtype)
        if clipped:
            g = prepare.scale_and_clip(g, factors.unbind())
        new, values = rule(p.to(row.dtype), g, slots, scalars(*row.unbind()))
        p.copy_(new)
        for slot, value in zip(slots, values, strict=True):
            slot.copy_(value)

    # dynamo's limit of variants counts per code object: every kernel gets its own
    name = f"{rule.__name__}_{clipped}_{dtypes[0]}_{dtypes[1]}".replace("torch.", "")
    own = types.FunctionType(step.__code__.replace(co_name=name), step.__globals__, name, None, step.__closure__)
    compiled: Callable[..., None] = torch.compile(own, dynamic=True, fullgraph=True)
    return compiled


class Piece(NamedTuple):
    """What one call updates: 1-D tensors of one length, and what copies packed variables back."""

    variable: Tensor
    gradient: Tensor
    start: int  # in the flat buffers
    factors: Tensor | None
    members: list[int]  # packed segments; empty for a variable updated in place


def run(update: Any) -> None:
    """Execute an update (`fused_kopt.execute.Update`) in place."""
    row = torch.tensor(update.scalars, dtype=update.bucket.compute, device="cpu")
    for piece in _pieces(update):
        scalars: Any = type(update.scalars)
        step = kernel(update.rule, scalars, piece.factors is not None, (piece.variable.dtype, piece.gradient.dtype))
        slots = [_flat(flat, piece.start, piece.variable.numel()) for flat in update.slots]
        step(piece.variable, piece.gradient, slots, row, row if piece.factors is None else piece.factors)
        if piece.members:
            torch._foreach_copy_([_flat(update.variables[i]) for i in piece.members], _parts(update, piece.variable, piece))


def _flat(tensor: Tensor, start: int = 0, length: int | None = None) -> Tensor:
    """A dense tensor's elements in storage order, or some of them: the same memory, no view.

    dynamo guards on what a view is a view of, and would compile again for another kind of base.
    """
    size = tensor.numel() if length is None else length
    return torch.empty(0, dtype=tensor.dtype, device="cpu").set_(
        tensor.untyped_storage(), int(tensor.storage_offset()) + start, (size,), (1,)
    )


def _parts(update: Any, packed: Tensor, piece: Piece) -> list[Tensor]:
    segments = [update.bucket.segments[i] for i in piece.members]
    return [packed[s.offset - piece.start :][: s.numel] for s in segments]


def _pieces(update: Any) -> Iterator[Piece]:
    """Large variables one by one, runs of small neighbours packed."""
    pack: list[int] = []
    for index, (segment, variable, gradient) in enumerate(zip(update.bucket.segments, update.variables, update.gradients, strict=True)):
        joins = variable is not None and 0 < segment.numel < PACKED
        if pack and not (joins and pack[-1] == index - 1 and update.gradients[pack[0]].dtype == gradient.dtype):
            yield _packed(update, pack)
            pack = []
        if joins:
            pack.append(index)
        elif variable is not None and segment.numel:
            factors = None if update.factors is None else update.factors[index]
            yield Piece(_flat(variable), _flat(gradient), segment.offset, factors, [])
    if pack:
        yield _packed(update, pack)


def _packed(update: Any, pack: list[int]) -> Piece:
    """Neighbours copied side by side, as they lie in the flat buffers; padding is zero. Gradients are clipped on the way."""
    first, last = (update.bucket.segments[i] for i in (pack[0], pack[-1]))
    gradients = [_flat(update.gradients[i]) for i in pack]
    if update.factors is not None:
        gradients = [
            prepare.scale_and_clip(g.to(update.bucket.compute), update.factors[i].unbind()) for i, g in zip(pack, gradients, strict=True)
        ]
    length = last.end - first.offset
    variable = torch.zeros(length, dtype=update.bucket.dtype, device="cpu")
    gradient = torch.zeros(length, dtype=gradients[0].dtype, device="cpu")
    piece = Piece(variable, gradient, first.offset, None, pack)
    torch._foreach_copy_(_parts(update, variable, piece), [_flat(update.variables[i]) for i in pack])
    torch._foreach_copy_(_parts(update, gradient, piece), gradients)
    return piece
