"""What a multiprocessor holds, and how many warps of a kernel fit on it at once."""

from typing import NamedTuple


class Architecture(NamedTuple):
    """Limits of one multiprocessor (compute unit on AMD), and the memory's speed."""

    gpu: str
    warp: int
    """Threads per warp (wavefront)."""
    parts: int
    """Schedulers, each with its own registers."""
    warps: int
    """Per multiprocessor."""
    blocks: int
    """Programs per multiprocessor."""
    registers: int
    """Per part, in warps' registers: one for each thread of a warp."""
    register_unit: int
    """A warp is given registers per thread in multiples of it."""
    shared: int
    """Bytes per multiprocessor."""
    shared_unit: int
    """A program is given shared memory in multiples of it."""
    shared_reserved: int
    """Bytes that the system takes per program."""
    bandwidth: float
    """GB/s."""
    source: str
    """Where the bandwidth comes from."""


# NVIDIA: CUDA programming guide, "Compute Capabilities", table "Technical Specifications per Compute Capability": 64 warps,
# 32 blocks, 65,536 registers, 164 or 228 KiB of shared memory per multiprocessor, of which 1 KiB per block is the system's.
# Registers lie in four parts of 16,384 and are given to a warp in units of 256, 8 per thread (CUDA occupancy calculator).
# AMD: CDNA3 instruction set architecture (4 SIMDs, 512 registers per lane in units of 8, 64 KiB of LDS) and LLVM's AMDGPU
# back end (8 waves per SIMD; 16 programs of several waves per compute unit, one barrier each).
# Bandwidth: a measured copy on an H100; of the others nobody measured here, so nine tenths of the data sheet, as on the H100.
_GUESS = "90% of the data sheet's"
ARCHITECTURES = {
    "sm_80": Architecture("A100 80GB", 32, 4, 64, 32, 512, 8, 164 << 10, 128, 1024, 1835, f"{_GUESS} 2,039"),
    "sm_90": Architecture("H100 SXM", 32, 4, 64, 32, 512, 8, 228 << 10, 128, 1024, 3000, "a measured copy; data sheet: 3,350"),
    "sm_100": Architecture("B200", 32, 4, 64, 32, 512, 8, 228 << 10, 128, 1024, 7200, f"{_GUESS} 8,000"),
    "gfx942": Architecture("MI300X", 64, 4, 32, 16, 512, 8, 64 << 10, 512, 0, 4770, f"{_GUESS} 5,300"),
}


class Occupancy(NamedTuple):
    """How many warps share a multiprocessor, and what keeps more away."""

    warps: int
    fraction: float
    limit: str
    """"warps", "blocks", "registers" or "shared memory"."""


def occupancy(architecture: Architecture, registers: int, shared: int, warps: int) -> Occupancy:
    """The theoretical occupancy. registers: per thread. shared: bytes per program. warps: per program."""
    a = architecture
    per_part = a.registers // _up(max(registers, 1), a.register_unit)
    programs = {
        "warps": a.warps // warps,
        "blocks": a.blocks,
        "registers": per_part * a.parts // warps,
        "shared memory": a.shared // _up(shared + a.shared_reserved, a.shared_unit) if shared + a.shared_reserved else a.blocks,
    }
    limit = min(programs, key=lambda name: programs[name])
    return Occupancy(programs[limit] * warps, programs[limit] * warps / a.warps, limit)


def floor_seconds(elements: int, bytes_per_element: int, bandwidth: float) -> float:
    """The time that moving the bytes takes. bandwidth: GB/s."""
    return elements * bytes_per_element / (bandwidth * 1e9)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
