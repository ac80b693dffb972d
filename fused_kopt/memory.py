"""How much memory training will take, before it starts: worked out from shapes with what `Optimizer.describe` knows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.filesize import decimal
from torch import Tensor, nn

from fused_kopt import clipping, description, layout, norms, planes, tensors, verification
from fused_kopt.description import BucketDescription
from fused_kopt.optimizer import Optimizer
from fused_kopt.planes import Kept, Pairs

# Bytes that the reference needs for an element of the variable at hand, by measurement: for a general power in float64, for the sums of
# `stats_every`, and for norms. For the rule itself see `_temporaries`: 2 to 7 numbers with up to three slots of a float32 variable, up to
# 21 where 8 planes are decoded.
POWER_BYTES, STATS_BYTES, NORM_BYTES = 16, 32, 48


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that variables, gradients and an optimizer take; `print()` it. Activations are not among them."""

    optimizer: str
    buckets: tuple[BucketDescription, ...]
    """Per device, dtype and precision policy: variables, elements, planes, executor."""
    variables: int
    gradients: int
    """All at once, as after `backward`."""
    tables: int
    """Addresses and sizes that launches keep between steps."""
    transient: int
    """The most that a step allocates and frees again: norms, copies, the first step's known-answer test, and the temporaries of the
    reference. An upper bound."""
    moved: int
    """What a step must read and write; see `Optimizer.describe`."""

    @property
    def elements(self) -> int:
        """Numbers that are trained."""
        return sum(bucket.elements for bucket in self.buckets)

    @property
    def slots(self) -> int:
        """Slots and masters, padding included: the flat buffers."""
        return sum(bucket.bytes_at_rest for bucket in self.buckets)

    @property
    def padding(self) -> int:
        """What of `slots` belongs to no element."""
        return sum(plane.padding for bucket in self.buckets for plane in bucket.planes)

    @property
    def at_rest(self) -> int:
        """Variables, gradients, slots, masters and tables: between backward pass and step."""
        return self.variables + self.gradients + self.slots + self.tables

    @property
    def peak(self) -> int:
        """The most during a step."""
        return self.at_rest + self.transient

    def __str__(self) -> str:
        each = f"{self.at_rest / self.elements:.2f} bytes per element" if self.elements else "no elements"
        parts = {"variables": self.variables, "gradients": self.gradients, "slots": self.slots, "tables": self.tables}
        lines = [
            f"{self.optimizer}: {self.elements:,} elements, {decimal(self.at_rest)} at rest ({each})",
            ", ".join(f"{name} {decimal(size)}" for name, size in parts.items()) + f"; {decimal(self.padding)} of it padding",
            *map(_bucket, self.buckets),
            f"a step allocates up to {decimal(self.transient)} more, and moves {decimal(self.moved)}",
        ]
        return "\n  ".join(lines)


def _bucket(bucket: BucketDescription) -> str:
    kept = (f"{p.name} {str(p.dtype).removeprefix('torch.')} {decimal(p.bytes)}" for p in bucket.planes)
    return f"{bucket.device} {str(bucket.dtype).removeprefix('torch.')}, {bucket.precision}: {', '.join(kept) or 'no slots'}"


def estimate_memory(
    model_or_shapes: nn.Module | Iterable[Any], optimizer: Optimizer, gradient_dtype: torch.dtype | None = None
) -> MemoryEstimate:
    """The memory of training with an optimizer: at rest, during a step, and moved per step. Allocates nothing of that size.

        fused_kopt.estimate_memory(model, fused_kopt.Adam(precision="bf16_8bit"))
        fused_kopt.estimate_memory([((4096, 4096), torch.bfloat16)] * 32, fused_kopt.Lion())

    Args:
        model_or_shapes: a module, whose parameters that require gradients count; or an iterable of tensors, pairs (shape, dtype) and
            shapes, which are float32. Tensors may be on the meta device; those and shapes count as being on torch's default device.
        optimizer: an optimizer of this package. Its policies, its clipping, `verify_every` and `stats_every` count.
        gradient_dtype: of all gradients. Default: of a variable's `.grad` if there is one, else the variable's own.

    Raises TypeError for anything else, and what `Optimizer.describe` raises for policies and executors.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"`optimizer` must be one of fused_kopt.optimizers, or what a wrapper holds inside. Received: {type(optimizer).__name__}."
        )
    if isinstance(model_or_shapes, nn.Module):
        model_or_shapes = [p for p in model_or_shapes.parameters() if p.requires_grad]
    variables = list({id(v): v for v in [_variable(item, i) for i, item in enumerate(model_or_shapes)]}.values())
    pairs = [(_gradient(v, gradient_dtype), v) for v in variables]
    optimizer._check_precision(pairs)
    how = planes.owned(optimizer._state, optimizer._all_slots())
    found = description.describe(optimizer._name, pairs, how, optimizer.executor, optimizer._clipping())
    members = planes.members(pairs, how)
    work = [_Work(optimizer, kept, mine, bucket) for (kept, mine), bucket in zip(members, found.buckets, strict=True)]
    return MemoryEstimate(
        optimizer._name,
        found.buckets,
        sum(v.numel() * v.dtype.itemsize for v in variables),
        sum(clipping.values(g).numel() * g.dtype.itemsize for g, _ in pairs),
        sum(bucket.tables() for bucket in work),
        sum(bucket.norms() + bucket.copies() + bucket.sums() for bucket in work) + max((bucket.largest() for bucket in work), default=0),
        found.bytes_moved,
    )


def _variable(given: Any, position: int) -> Tensor:
    """What stands for a tensor or a shape."""
    what = f"model_or_shapes[{position}]"
    if isinstance(given, Tensor):
        if given.dtype not in tensors.FLOATING:
            raise TypeError(f"{what} must be float16, bfloat16, float32 or float64. Received: {given.dtype}.")
        return given
    shape, dtype = given if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], torch.dtype) else (given, torch.float32)
    if not isinstance(shape, Sequence) or not all(type(size) is int and size >= 0 for size in shape) or dtype not in tensors.FLOATING:
        raise TypeError(f"{what} must be a tensor, a shape, or (shape, floating dtype). Received: {given!r}.")
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _gradient(variable: Tensor, dtype: torch.dtype | None) -> Tensor:
    if variable.grad is not None and dtype in (None, variable.grad.dtype):
        return variable.grad
    return torch.empty_strided(variable.shape, layout.dense_stride(variable), dtype=dtype or variable.dtype, device="meta")


class _Work:
    """What a bucket's launches need besides what they update."""

    def __init__(self, optimizer: Optimizer, how: Kept, pairs: Pairs, bucket: BucketDescription) -> None:
        self.optimizer, self.how, self.pairs, self.bucket = optimizer, how, pairs, bucket
        self.counts = [v.numel() for v in planes.distinct(pairs)]
        self.compute = layout.compute_dtype(bucket.dtype).itemsize

    def programs(self) -> int:
        """Entries of the block table."""
        if self.bucket.executor == "reference":
            return 0
        if self.bucket.executor == "compiled":
            from fused_kopt.kernels import cpp

            block = cpp.BLOCK
        else:
            from fused_kopt.kernels import launch

            block = launch.block_size(self.bucket.dtype)
        return sum(-(-count // block) for count in self.counts)

    def tables(self) -> int:
        """Of a launch: int32 pairs for its programs, int64 rows for its variables, once more on a GPU, where rows of factors join them."""
        if self.bucket.executor == "reference":
            return 0
        rows = 8 * (3 + len(self.how.stored)) * len(self.counts) * len({g.dtype for g, _ in self.pairs})
        if self.bucket.executor == "triton":
            rows += rows + 5 * self.compute * len(self.counts)
        return 8 * self.programs() + rows + self._norm_tables()

    def _norm_tables(self) -> int:
        blocks = self._norm_blocks()
        return 8 * blocks + (8 + 24 + 5 * self.compute) * len(self.counts) + 8 if blocks else 0

    def _norm_blocks(self) -> int:
        return sum(-(-count // norms.BLOCK) for count in self.counts) if self.optimizer._clipping().by_norm else 0

    def norms(self) -> int:
        """float64 sums of blocks and variables, and rows of factors, twice where they are made of others."""
        blocks = self._norm_blocks()
        return 8 * blocks + (3 * 8 + 2 * 5 * self.compute) * len(self.counts) if blocks else 0

    def copies(self) -> int:
        """Variables and gradients that are laid out otherwise than their slots; with `verify_every` everything, twice."""
        own = sum(v.numel() * v.dtype.itemsize for v in planes.distinct(self.pairs) if not description.in_place(v))
        other = sum(g.numel() * g.dtype.itemsize for g, v in self.pairs if not description.fits(g, v))
        twice = 2 * (sum(self.counts) * self.bucket.dtype.itemsize + self.bucket.bytes_at_rest) if self.optimizer.verify_every else 0
        return own + other + twice

    def sums(self) -> int:
        """Three float64 of every program, where steps are measured."""
        return 24 * self.programs() if self.optimizer.stats_every else 0

    def largest(self) -> int:
        """What is needed for one variable after the other: by the reference, by its part in `verify_every` and in the known-answer test."""
        compiled = self.bucket.executor != "reference"
        longest = 0 if compiled and not self.optimizer.verify_every else max(self.counts, default=0)
        squares = 0 if compiled or not self.optimizer._clipping().by_norm else NORM_BYTES * longest
        known = verification.KNOWN if compiled else 0
        kept = 2 * self.bucket.dtype.itemsize + self.compute * (1 + len(self.how.slots))
        return max(squares, self._temporaries(longest)) + self._temporaries(known) + 4 * kept * known

    def _temporaries(self, elements: int) -> int:
        """The reference's for a variable of so many elements."""
        planes = len(self.how.stored)
        packed = planes > 0 and self.how.precision != "float32"
        each = (4 + 2 * planes + 3 * (packed or self.bucket.dtype.itemsize < self.compute)) * self.compute
        more = POWER_BYTES * (not self.optimizer.exact) + STATS_BYTES * bool(self.optimizer.stats_every)
        return (each + more) * elements
