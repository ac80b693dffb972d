"""Optimizers whose state lies in host memory, where the `compiled` executor updates it, part by part, beside the copies."""

from typing import Any, TypeVar

from fused_kopt.distributed.hosting import Hosting, OffloadStats
from fused_kopt.distributed.sharded import taking_steps

# 1.3 ms at 25 GB/s (PCIe 4): long against a launch, short against a step. Pinned memory is handed out in powers of two.
PART_BYTES = 1 << 25
Offloaded = TypeVar("Offloaded")


def offload(optimizer: Offloaded, part_bytes: int = PART_BYTES) -> Offloaded:
    """Keep an optimizer's slots and masters in host memory, and update there, before its first step.

        optimizer = fused_kopt.distributed.offload(fused_kopt.Adam(precision="bf16_split"))
        ...
        optimizer.apply_gradients(zip(grads, variables))

    Nothing of the optimizer stays on the device. Every variable has a twin in pinned memory, of its dtype. A step copies gradients down,
    updates twins and slots with the `compiled` executor, and copies twins up: the copies of other parts go on beside the update of
    one. The bits are those of the same optimizer without offload on the CPU. Variables may lie on the CPU too; copies are then made one
    after the other, and nothing is gained.

    Args:
        optimizer: any optimizer of this package without slots, perhaps sharded, or a LossScaleOptimizer around one. It is changed in
            place and returned. Its executor must be "auto", "compiled" or "reference".
        part_bytes: consecutive variables of a dtype form parts of about this size, each a launch. A variable is never cut. A sharded
            optimizer's parts stay as they are.

    What changes: `weights` and what `get_slot` returns lie on the CPU; gradient_transformers get the pairs on the host. A value that the
    caller writes into a variable counts, unless it is written through `.data` (`variables_changed`).

    Raises TypeError for other objects; ValueError for a `part_bytes` that is no int >= 1, for an optimizer that has slots or is offloaded
    already, for executor="triton". A step raises ValueError for a variable given twice or on another kind of device, RuntimeError for a
    sparse gradient and in a CUDA graph capture.
    """
    inner = taking_steps(optimizer)
    if inner is None:
        raise TypeError(f"`optimizer` must be one of fused_kopt.optimizers, or a LossScaleOptimizer. Received: {type(optimizer).__name__}.")
    if not isinstance(part_bytes, int) or part_bytes < 1:
        raise ValueError(f"`part_bytes` must be an int >= 1. Received: part_bytes={part_bytes!r}.")
    if inner._state.buckets or any(isinstance(stage, Hosting) for stage in inner._stages):
        raise ValueError("This optimizer has slots, or is offloaded, already. Offload a new one, then load a checkpoint into it.")
    if inner.executor == "triton":
        raise ValueError('executor="triton" does not run in host memory. Use executor="auto" or "compiled".')
    inner._stages.append(Hosting(part_bytes))
    return optimizer


def offload_stats(optimizer: Any) -> OffloadStats:
    """What the last step moved and waited for. Waits for nothing itself. Raises TypeError unless the optimizer is offloaded."""
    return _stage(optimizer).stats


def variables_changed(optimizer: Any) -> None:
    """Let the next step fetch the values of all variables: they were written through `.data`, which leaves no trace.

    Raises TypeError unless the optimizer is offloaded.
    """
    _stage(optimizer).forget()


def _stage(optimizer: Any) -> Hosting:
    inner = taking_steps(optimizer)
    for stage in () if inner is None else inner._stages:
        if isinstance(stage, Hosting):
            return stage
    raise TypeError(f"This {type(optimizer).__name__} is not offloaded. Pass what fused_kopt.distributed.offload returned.")
