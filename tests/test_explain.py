"""`fused-kopt explain`: occupancy and floors worked out by hand, machine code written by hand, and real kernels."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import variants as rules
from rich.console import Console
from terminal import Run

from fused_kopt import execute
from fused_kopt.commands import explain, variants
from fused_kopt.commands.architectures import ARCHITECTURES, floor_seconds, occupancy
from fused_kopt.commands.common import RefusedError
from fused_kopt.commands.explain import Row, Settings
from fused_kopt.kernels import launch, machine_code, offline

# architecture, registers, shared, warps per program: warps on a multiprocessor, and what keeps more away
OCCUPANCY = {
    ("sm_90", 48, 4096, 8): (40, "registers"),  # 512 // 48 = 10 in each of 4 parts, 5 programs of 8
    ("sm_90", 33, 4096, 8): (48, "registers"),  # given as 40: 12 in each part
    ("sm_90", 72, 0, 8): (24, "registers"),  # 28 fit, but only whole programs run
    ("sm_90", 32, 0, 8): (64, "warps"),
    ("sm_90", 32, 0, 1): (32, "blocks"),
    ("sm_90", 32, 100 << 10, 8): (16, "shared memory"),  # 228 KiB // (100 + 1) KiB = 2
    ("sm_80", 32, 54 << 10, 8): (16, "shared memory"),  # 164 KiB // (54 + 1) KiB = 2
    ("sm_100", 255, 0, 16): (0, "registers"),  # 2 in each part: no program of 16 runs
    ("gfx942", 41, 4096, 4): (32, "warps"),  # given as 48: 10 on each SIMD, which holds 8
    ("gfx942", 96, 0, 4): (20, "registers"),  # 512 // 96 = 5 on each of 4 SIMDs
    ("gfx942", 8, 20_000, 4): (12, "shared memory"),  # given as 20,480: 64 KiB hold 3
}

# A thread's sum in two paths: the guard, a division with its slow path, 128-bit accesses; then, with masks, 32-bit ones.
SASS = """
        /*0000*/                   LDG.E.64 R2, desc[UR4][R8.64] ;
        /*0010*/              @P0 BRA `(.L_x_3) ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   BSSY B0, `(.L_x_2) ;
        /*0040*/              @!P1 BRA `(.L_x_1) ;
        /*0050*/                   MOV R0, 0x70 ;
        /*0060*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_rn) ;
        /*0070*/                   BRA `(.L_x_0) ;
.L_x_1:
        /*0080*/                   FMUL R4, R4, R5 ;
        /*0090*/                   FADD R4, R4, R5 ;
        /*00a0*/                   FADD R4, R4, R6 ;
        /*00b0*/                   FADD R4, R4, R7 ;
.L_x_0:
        /*00c0*/                   BSYNC B0 ;
.L_x_2:
        /*00d0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00e0*/                   EXIT ;
.L_x_3:
        /*00f0*/              @P2 LDG.E R4, desc[UR4][R2.64] ;
        /*0100*/              @P2 STG.E desc[UR4][R2.64], R4 ;
        /*0110*/                   EXIT ;
.L_x_4:
        /*0120*/                   BRA `(.L_x_4);
"""
# the same without a jump to the full block's path
PREDICATED = """
        /*0000*/                   LDG.E.64 R2, desc[UR4][R8.64] ;
        /*0010*/             @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/             @!P0 STG.E.128 desc[UR4][R2.64], R4 ;
        /*0030*/             @!P0 EXIT ;
        /*0040*/              @P2 LDG.E R4, desc[UR4][R2.64] ;
        /*0050*/              @P2 STG.E desc[UR4][R2.64], R4 ;
        /*0060*/                   EXIT ;
"""
AMD = """
kernel:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\ts_cbranch_scc1 .LBB0_2
\tbuffer_load_dword v5, v28, s[20:23], 0 offen
\tbuffer_store_dword v5, v28, s[20:23], 0 offen
\ts_endpgm
.LBB0_2:                                ; full
\tglobal_load_dwordx2 v[0:1], v8, s[6:7]
\tglobal_load_ushort v2, v8, s[6:7]
\tglobal_store_dwordx4 v8, v[0:3], s[6:7]
\ts_endpgm
.Lfunc_end0:
\tglobal_store_dwordx4 v8, v[0:3], s[6:7]
"""


@pytest.mark.parametrize("case", OCCUPANCY, ids=str)
def test_occupancy(case: tuple[str, int, int, int]) -> None:
    name, registers, shared, warps = case
    found, (expected, limit) = occupancy(ARCHITECTURES[name], registers, shared, warps), OCCUPANCY[case]
    assert (found.warps, found.limit) == (expected, limit)
    assert found.fraction == expected / ARCHITECTURES[name].warps


def test_floor_time() -> None:
    assert math.isclose(floor_seconds(100_000_000, 28, 3000), 0.000_933_333, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("text", "amd", "expected"),
    [
        (SASS, False, (12, (16,), (16,))),  # 0000 to 0040, 0080 to 00e0
        (PREDICATED, False, (4, (16,), (16,))),
        (AMD, True, (6, (8, 2), (16,))),
    ],
    ids=["branch", "predicate", "amd"],
)
def test_the_way_through_a_full_block(text: str, amd: bool, expected: tuple[Any, ...]) -> None:
    assert machine_code.full_block(text, amd) == expected


@pytest.mark.parametrize(
    ("text", "what"),
    [("", "no stores"), (SASS.replace("BRA `(.L_x_0)", "BRX R2"), "computed jumps"), (SASS.replace("@P0 BRA", "BRA"), "no way")],
)
def test_unknown_machine_code_is_refused(text: str, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        machine_code.full_block(text, False)


@pytest.mark.parametrize(("dtype", "expected"), [("float32", 28), ("bfloat16", 22), ("float64", 56)])
def test_bytes_per_element_of_adam(dtype: str, expected: int) -> None:
    adam = variants.kernels("adam")[0]
    assert adam.bytes_per_element(variants.DTYPES[dtype], variants.DTYPES[dtype]) == expected


def test_every_rule_is_explained() -> None:
    found = variants.kernels(None)
    assert {kernel.name: (kernel.rule, kernel.slots) for kernel in found} == {r.name: (r.function, r.slots) for r in rules.RULES.values()}


def row(optimizer: str, architecture: str, clipped: bool = False) -> Row:
    return explain._row(variants.kernels(optimizer)[0], torch.float32, clipped, architecture)


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_adam(architecture: str) -> None:
    plain, clipped = (row("adam", architecture, clipped) for clipped in (False, True))
    for found in (plain, clipped):
        assert (found.loads, found.stores, found.spilled, found.problems) == ((16,) * 4, (16,) * 3, 0, [])
        assert 32 <= found.registers <= 72
        assert found.occupancy == occupancy(
            ARCHITECTURES[architecture], found.registers, found.shared, 256 // ARCHITECTURES[architecture].warp
        )
    # 4 accesses, at least 9 operations, a root and a division of 8 or more each
    assert 29 < plain.instructions < clipped.instructions < 100
    assert row("sgd", architecture).instructions < plain.instructions / 2


def test_a_table(run: Run) -> None:
    result = run("explain", "--optimizer", "Adam", "--clipped", "--elements", 100_000_000, "--bandwidth", 2800)
    cells = {(row[0], row[1]): row[2:] for row in result.rows}
    assert result.code == 0
    names = [f"Adam {prefix}{name}" for name in ("adam", "amsgrad") for prefix in ("", "sparse_")]
    assert list(cells) == [(name, f"float32{clipped}") for name in names for clipped in ("", " clipped")]
    assert cells[names[0], "float32"][3:5] == ["4x128", "3x128"]
    assert [value[6] for value in cells.values()] == ["28"] * 4 + ["36"] * 4
    assert cells[names[0], "float32"][8] == "1,000 us"
    assert "100,000,000 elements at 2,800 GB/s (as asked)" in result.out


def test_a_kernel_that_spills_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    build, narrow = offline.build, machine_code.full_block
    monkeypatch.setattr(offline, "build", lambda *arguments: build(*arguments)._replace(spilled=9))
    monkeypatch.setattr(machine_code, "full_block", lambda *arguments, **named: narrow(*arguments, **named)._replace(loads=(4,) * 16))
    result = run("explain", "--optimizer", "lion")
    assert result.code == 1
    assert "sm_90 lion float32: 9 accesses to local memory, more than 8" in result.out
    assert "sm_90 lion float32: a thread's part of a full block takes 16 loads and 2 stores, not 3 and 2" in result.out


ARGUMENTS = {
    "--help": (0, "Example: fused-kopt explain"),
    "--arch sm_70": (2, "unknown: 'sm_70'. Choose from sm_80,sm_90,sm_100,gfx942."),
    "--dtype int8": (2, "unknown: 'int8'"),
    "--optimizer lamb": (2, "invalid choice: 'lamb'"),
    "--bandwidth 0": (2, "must be a finite number above 0. Received: 0."),
    "--bandwidth nan": (2, "must be a finite number above 0"),
    "--elements 0": (2, "must be at least 1"),
}


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_arguments(arguments: str, run: Run) -> None:
    result, (code, text) = run("explain", *arguments.split()), ARGUMENTS[arguments]
    assert result.code == code
    assert text in (result.err if code else result.out)


def test_what_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "TOOLS", Path("/nowhere"))
    assert "--arch sm_90: this Triton comes without NVIDIA's disassembler" in run("explain").err
    monkeypatch.setattr(offline, "backends", {})
    assert "--arch gfx942: this Triton has no compiler for it" in run("explain", "--arch", "gfx942").err
    monkeypatch.setattr(launch, "INTERPRETED", True)
    assert "TRITON_INTERPRET=1 leaves nothing to compile" in run("explain").err
    monkeypatch.setattr(execute, "why_not_triton", lambda: "pip install 'fused-kopt[triton]'")
    result = run("explain")
    assert (result.code, result.err) == (2, "fused-kopt: kernels cannot be compiled: pip install 'fused-kopt[triton]'\n")


def test_a_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("ptxas died")

    monkeypatch.setattr(offline, "build", broken)
    with pytest.raises(RefusedError, match=r"kernel of sgd for sm_90 cannot be compiled and read: RuntimeError\('ptxas died'\)"):
        explain.explain(Settings(optimizer="sgd"), Console(quiet=True))
