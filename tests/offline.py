"""Offline compilation of the kernel and counts over its machine code; needs no GPU."""

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_kopt import prepare as preparation
from fused_kopt.kernels import launch, rules
from fused_kopt.kernels.update import update_bucket

NVIDIA = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
TARGETS = {**{name: GPUTarget("cuda", arch, 32) for name, arch in NVIDIA.items()}, "gfx942": GPUTarget("hip", "gfx942", 64)}
TRITON_NAME = {torch.float32: "fp32", torch.float64: "fp64"}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Code(NamedTuple):
    """A compiled kernel: its assembly (SASS or AMD's) and what its resources say."""

    text: str
    intermediate: str  # PTX or LLVM's intermediate language
    registers: int
    spilled: int  # accesses to local memory (NVIDIA) or spilled registers (AMD)
    ttir: str = ""  # Triton's own intermediate language


@functools.cache
def compile_rule(rule: Callable[..., Any], scalars: type, slots: int, target: str, dtypes: tuple[Any, Any], clipped: bool) -> Code:
    """Compile one rule for one target. dtypes: of the variable and of the gradient."""
    variable, gradient = dtypes
    compute = torch.float64 if variable == torch.float64 else torch.float32
    wide = compute == torch.float64
    name = TRITON_NAME[compute]
    aligned = [["tt.divisibility", 16]]
    prepare = preparation.scale_and_clip if clipped else preparation.keep
    pointers: dict[Any, Any] = {(i,): aligned for i in range(3)} | {(3, i): aligned for i in range(slots)}
    signature = {
        "segments": "*i64",
        "blocks": "*i32",
        "factors": f"*{name}",
        "slots": (f"*{name}",) * slots,
        "s": scalars(*[("*" if wide else "") + name] * len(scalars._fields)),  # type: ignore[attr-defined]
    }
    constants = {
        "RULE": rules.compiled(rule),
        "PREPARE": rules.compiled(prepare),
        "SCALARS": launch.Build(scalars) if wide else None,
        "VARIABLE": launch.TRITON_DTYPE[variable],
        "GRADIENT": launch.TRITON_DTYPE[gradient],
        "COMPUTE": launch.TRITON_DTYPE[compute],
        "BLOCK": launch.block_size(variable),
    }
    source = ASTSource(update_bucket, signature | dict.fromkeys(constants, "constexpr"), constexprs=constants, attrs=pointers)
    options = {"num_warps": launch.THREADS // TARGETS[target].warp_size, "enable_fp_fusion": False}
    kernel = triton.compile(source, target=TARGETS[target], options=options)
    if target == "gfx942":
        return _amd(kernel.asm["amdgcn"], kernel.asm["llir"])._replace(ttir=kernel.asm["ttir"])
    return _nvidia(kernel.asm["ptx"], kernel.asm["cubin"])._replace(ttir=kernel.asm["ttir"])


def _nvidia(ptx: str, cubin: bytes) -> Code:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout
    registers = re.search(r"REG:(\d+)", usage)
    assert registers, usage
    # STACK counts a called slow path's return address too; a spill is an access to local memory
    return Code(sass, ptx, int(registers[1]), len(re.findall(r"\b(?:STL|LDL)\b", sass)))


def _amd(text: str, llir: str) -> Code:
    number = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", text)}
    return Code(text, llir, number["vgpr_count"], number["vgpr_spill_count"] + number["sgpr_spill_count"])
