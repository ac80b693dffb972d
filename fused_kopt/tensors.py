"""What may be a variable or a gradient, and who shares memory with whom. Raw-pointer kernels need every answer first."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Above this the exact overlap search is refused and sharing is assumed.
OVERLAP_WORK = 100_000


def guards(tensors: Sequence[Tensor]) -> TensorGuards:
    """A test, 0.1 us for each, of whether as many others have these types, dtypes, devices, shapes and strides."""
    layouts: Any = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=layouts[0], dynamic_dims_strides=layouts[1])


def describe(tensor: Tensor) -> str:
    """Shape, dtype and device, for messages."""
    return f"shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device}"


def check_storage(tensor: Tensor, what: str, dtypes: Sequence[torch.dtype] = FLOATING) -> None:
    """Raises TypeError, RuntimeError or ValueError unless the tensor is plain strided memory that holds all its elements."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise RuntimeError(f"{what} belongs to a torch.func transform, in which gradients cannot be aggregated or applied in place.")
    if tensor.is_meta or type(tensor).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
        raise TypeError(f"{what} is a {type(tensor).__name__} on {tensor.device}, which has no storage of its own. Pass a local tensor.")
    if tensor.layout != torch.strided:
        raise TypeError(f"{what} has layout {tensor.layout}; variables must be strided, gradients strided or sparse COO.")
    if tensor.dtype not in dtypes:
        allowed = "float16, bfloat16, float32 or float64"
        raise TypeError(f"{what} must be floating point ({allowed}), got {tensor.dtype}. Leave it out of the list.")
    if tensor.numel() and tensor.untyped_storage().nbytes() < _end(tensor) * tensor.element_size():
        raise ValueError(f"{what} ({describe(tensor)}) outgrows its storage, which was resized or freed.")


def check_variable(variable: Any, what: str) -> None:
    """Raises TypeError or ValueError unless `variable` can be updated in place."""
    if not isinstance(variable, Tensor):
        raise TypeError(f"{what} must be a torch.Tensor or Parameter. Received: {type(variable).__name__}.")
    check_storage(variable, what)
    if variable.grad_fn is not None:
        raise ValueError(f"{what} ({describe(variable)}) is not a leaf: it is the result of {variable.grad_fn.name()}. Pass the leaf.")
    if variable.is_inference():
        raise ValueError(f"{what} is an inference tensor, which cannot be updated. Create it outside torch.inference_mode().")
    if overlaps_itself(variable):
        strides = tuple(variable.stride())
        raise ValueError(f"{what} has overlapping memory: shape {tuple(variable.shape)}, strides {strides}. Pass variable.clone().")


def _end(tensor: Tensor) -> int:
    """One past the last element's offset in the storage."""
    return int(tensor.storage_offset()) + 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements share memory: exact up to OVERLAP_WORK elements, assumed beyond where strides interleave."""
    span = 0
    for stride, size in sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        if stride <= span:
            break
        span += stride * (size - 1)
    else:
        return False
    if tensor.numel() == 0:
        return False
    if tensor.numel() > OVERLAP_WORK:
        return True
    offsets = np.zeros((), dtype=np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = np.add.outer(offsets, np.arange(size) * stride)
    return int(np.unique(offsets).size) < tensor.numel()


class Interval(NamedTuple):
    """The bytes a tensor spans: first address, one past the last, and the tensor's position in its list."""

    start: int
    end: int
    position: int


def interval(tensor: Tensor, position: int = 0) -> Interval:
    """The addresses between a tensor's first and last byte."""
    size = (_end(tensor) - int(tensor.storage_offset())) * tensor.element_size() if tensor.numel() else 0
    return Interval(tensor.data_ptr(), tensor.data_ptr() + size, position)


def share_memory(first: Tensor, second: Tensor) -> bool:
    """Whether any byte belongs to both: exact for interleaved views too, assumed where that is too much work."""
    try:
        return bool(np.shares_memory(_addresses(first), _addresses(second), max_work=OVERLAP_WORK))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _addresses(tensor: Tensor) -> Any:
    """A numpy array at the tensor's addresses, never dereferenced: numpy then decides overlap for device memory as well."""
    size = tensor.element_size()
    strides = tuple(s * size for s in tensor.stride())
    interface = {"version": 3, "shape": tuple(tensor.shape), "typestr": f"|V{size}", "strides": strides, "data": (tensor.data_ptr(), False)}
    return np.asarray(type("Addresses", (), {"__array_interface__": interface})())


def first_overlap(variables: Sequence[Tensor]) -> tuple[int, int] | None:
    """Positions of the first two distinct tensors found to share memory, or None."""
    spans = sorted(interval(v, i) for i, v in enumerate(variables) if v.numel())
    open_: list[Interval] = []
    for span in spans:
        open_ = [o for o in open_ if o.end > span.start]
        for other in open_:
            if share_memory(variables[other.position], variables[span.position]):
                return min(other.position, span.position), max(other.position, span.position)
        open_.append(span)
    return None


class Written:
    """The memory a step writes: answers whether a gradient lies in it."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        spans = sorted(interval(t) for t in tensors if t.numel())
        self.starts = np.array([s.start for s in spans], dtype=np.int64)
        # running maximum: a long span may cover several later ones; before the first start there is nothing
        self.ends = np.maximum.accumulate(np.array([0, *(s.end for s in spans)], dtype=np.int64))

    def touches(self, tensor: Tensor) -> bool:
        """Whether the tensor's bytes lie in or around written memory (never misses; may say yes for interleaved views)."""
        span = interval(tensor)
        return self.touches_any(np.array([span.start]), np.array([span.end]))

    def touches_any(self, starts: Any, ends: Any) -> bool:
        """The same for many at once: int64 arrays of first addresses and of one past the last."""
        highest = self.ends[np.searchsorted(self.starts, ends - 1, side="right")]
        return bool(((highest > starts) & (ends > starts)).any())
