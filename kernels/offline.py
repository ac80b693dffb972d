"""Compiling the kernel for a GPU that need not be there, and what its machine code says."""

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_kopt.kernels import launch, rules
from fused_kopt.kernels.tuning import Config, kernel_hash
from fused_kopt.kernels.update import update_bucket

NVIDIA = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
TARGETS = {**{name: GPUTarget("cuda", arch, 32) for name, arch in NVIDIA.items()}, "gfx942": GPUTarget("hip", "gfx942", 64)}
TRITON_NAME = {torch.float32: "fp32", torch.float64: "fp64"}
default = launch.default
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Spec(NamedTuple):
    """Which kernel: what decides its text."""

    rule: Callable[..., Any]
    prepare: Callable[..., Any]
    scalars: type
    slots: int
    variable: torch.dtype
    gradient: torch.dtype
    measured: Callable[..., Any] | None = None
    planes: tuple[tuple[torch.dtype, int], ...] = ()
    """Of each slot its dtype, and how many elements share a value. Empty: the compute dtype, 1."""

    @property
    def compute(self) -> torch.dtype:
        """What the kernel computes in, and its slots' dtype."""
        return torch.float64 if self.variable == torch.float64 else torch.float32

    def constants(self, block: int, interpret: bool = False) -> dict[str, Any]:
        """The kernel's constexprs."""
        wrap = rules.interpreted if interpret else rules.compiled
        planes = self.planes or ((self.compute, 1),) * self.slots
        return {
            "RULE": wrap(self.rule),
            "PREPARE": wrap(self.prepare),
            "MEASURED": self.measured and wrap(self.measured),
            "SCALARS": launch.Build(self.scalars) if interpret or self.compute == torch.float64 else None,
            "STRIDE": 0,
            "VARIABLE": launch.TRITON_DTYPE[self.variable],
            "GRADIENT": launch.TRITON_DTYPE[self.gradient],
            **dict(zip(("STORED", "GROUPS", "GROUPED"), launch.stored(planes), strict=True)),
            "COMPUTE": launch.TRITON_DTYPE[self.compute],
            "BLOCK": block,
        }

    def signature(self) -> dict[str, Any]:
        """The types of its other arguments."""
        name, pointer = TRITON_NAME[self.compute], "*" if self.compute == torch.float64 else ""
        scalars = self.scalars(*[pointer + name] * len(self.scalars._fields))  # type: ignore[attr-defined]
        return {"segments": "*i64", "blocks": "*i32", "factors": f"*{name}", "s": scalars, "sums": "*fp64"}


class Code(NamedTuple):
    """A compiled kernel: its assembly (SASS or AMD's) and what its resources say."""

    text: str
    intermediate: str  # PTX or LLVM's intermediate language
    ttir: str  # Triton's own intermediate language
    registers: int  # per thread
    spilled: int  # accesses to local memory (NVIDIA) or spilled registers (AMD)
    shared: int  # bytes per program


def hash_of(rule: Callable[..., Any]) -> str:
    """The hash under which a rule's configuration is stored: of the kernel's text and of the rule's."""
    return kernel_hash(update_bucket, rules.compiled(rule))


def why_not(target: str | None = None) -> str | None:
    """Why kernels cannot be compiled, nor read for a target where one is named, or None."""
    if launch.INTERPRETED:
        return "TRITON_INTERPRET=1 leaves nothing to compile; unset it before Triton is imported"
    if target is None:
        return None
    if not any(backend.compiler.supports_target(TARGETS[target]) for backend in backends.values()):
        return f"this Triton has no compiler for it, only {', '.join(backends)}"
    if target in NVIDIA and not (TOOLS / "nvdisasm").exists():
        return f"this Triton comes without NVIDIA's disassembler ({TOOLS / 'nvdisasm'})"
    return None


def build(spec: Spec, target: str, config: Config | None = None) -> Code:
    """Compile a kernel for a target, in its default configuration or another."""
    block, warps = config or launch.default(spec.variable, TARGETS[target].warp_size, spec.planes)
    constants = spec.constants(block) | ({} if spec.measured else {"sums": None})
    aligned = [["tt.divisibility", 16]]
    pointers: dict[Any, Any] = {(i,): aligned for i in range(3)}
    source = ASTSource(update_bucket, spec.signature() | dict.fromkeys(constants, "constexpr"), constexprs=constants, attrs=pointers)
    # explicit, as in a launch: the default of enable_fp_fusion flips between Triton releases
    kernel = triton.compile(source, target=TARGETS[target], options={"num_warps": warps, "enable_fp_fusion": False})
    asm, shared = kernel.asm, kernel.metadata.shared
    if TARGETS[target].backend == "hip":
        return Code(asm["amdgcn"], asm["llir"], asm["ttir"], *_amd_resources(asm["amdgcn"]), shared)
    registers, sass = _disassembled(asm["cubin"])
    # STACK counts a called slow path's return address too; a spill is an access to local memory
    return Code(sass, asm["ptx"], asm["ttir"], registers, len(re.findall(r"\b(?:STL|LDL)\b", sass)), shared)


def _disassembled(cubin: bytes) -> tuple[int, str]:
    """Registers and SASS."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout
    registers = re.search(r"REG:(\d+)", usage)
    assert registers, usage
    return int(registers[1]), sass


def _amd_resources(text: str) -> tuple[int, int]:
    """Registers and spilled registers."""
    number = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", text)}
    return number["vgpr_count"], number["vgpr_spill_count"] + number["sgpr_spill_count"]
