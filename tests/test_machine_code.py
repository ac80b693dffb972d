"""The machine code of every rule, target and dtype: access widths, registers, spills, rounding. Compiled here, run nowhere."""

import itertools
import re
from collections import Counter
from typing import Any, NamedTuple

import offline
import pytest
import torch
import triton
import triton.language as tl
import variants
from offline import Code
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_kopt.kernels import launch, machine_code

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = {"f32": (F32, F32), "bf16": (BF16, BF16), "bf16-f32": (BF16, F32), "f16": (F16, F16), "f64": (F64, F64)}

# Registers: 72 let 28 warps share a multiprocessor. Powers run libdevice's float64 pow on four elements: 85 still let
# three blocks of 256 threads share the 65,536 registers; AMD has 512 per lane, of which 96 let five waves share a unit.
REGISTERS, POWER_REGISTERS, AMD_POWER_REGISTERS = 72, 85, 96
# ptxas puts one to four long-lived values (an address) aside where that reaches the next step of occupancy; `maxnreg=96`
# would avoid it for 2 to 20 registers more. Seen in float64 and in powers, never on a whole block's data.
STEPS, PUT_ASIDE = {48, 64, 80}, 8
AMD_SCALARS_ASIDE = 4  # scalar registers kept in a vector register's lanes: no memory is touched
AMD_FMA_PER_DIVISION, AMD_FMA_PER_ROOT = 5, {"f32": 2, "f64": 7}

ROUNDED = {f"{name}.rn.{kind}" for name in ("add", "sub", "mul", "div", "sqrt") for kind in ("f32", "f64", "f32.f16")}
# float32 has maxima that keep NaN; in float64 Triton adds a comparison
EXACT = {f"{name}.{kind}" for name in ("abs", "neg", "selp") for kind in ("f32", "f64")}
EXACT |= {"max.NaN.f32", "min.NaN.f32", "max.f64", "min.f64"}
CASTS = {"cvt.f32.f16", "cvt.rn.f16.f32", "cvt.rn.f16x2.f32"}
# what libdevice's float64 pow is made of, and the way there and back
POWER = {"fma.rn.f64", "rcp.approx.ftz.f64", "abs.ftz.f32", "cvt.rzi.f64.f64", "cvt.f64.f32", "cvt.rn.f32.f64"}
INTRINSICS = {"fabs", "maximum", "minimum", "sqrt", "amdgcn"}
POWER_INTRINSICS = INTRINSICS - {"sqrt"} | {"copysign", "fma", "frexp", "ldexp", "rint", "trunc"}


class Case(NamedTuple):
    """One kernel to compile."""

    rule: str
    target: str
    dtypes: str
    clipped: bool

    def __str__(self) -> str:
        return "-".join((self.rule, self.target, self.dtypes, "clip" if self.clipped else "keep"))

    @property
    def power(self) -> bool:
        return "power" in self.rule

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Bytes per element of the variable, the gradient and a slot."""
        variable, gradient = DTYPES[self.dtypes]
        return variable.itemsize, gradient.itemsize, 8 if variable == F64 else 4


def compiled(case: Case) -> Code:
    rule = variants.RULES[case.rule]
    return offline.compile_rule(rule.function, rule.scalars, rule.slots, case.target, DTYPES[case.dtypes], case.clipped)


CASES = [Case(*values) for values in itertools.product(variants.RULES, offline.TARGETS, DTYPES, (False, True))]
# in float32 every rule on every target, clipped or not in turn
SOME = [case for i, case in enumerate(c for c in CASES if c.dtypes == "f32") if case.clipped == bool(i // 2 % 2)]
REST = sorted(set(CASES) - set(SOME))


def check(case: Case) -> None:
    code = compiled(case)
    check_guard(case, code.intermediate)
    check_full_block(case, machine_code.full_block(code.text, case.target == "gfx942"))
    if case.target == "gfx942":
        check_amd(case, code)
        return
    expected = expected_accesses(case) + expected_tables(case)
    assert accesses(code.intermediate) == expected
    assert Counter(sass_accesses(code.text)) == Counter(key[1:] for key in expected.elements())
    assert code.registers <= (POWER_REGISTERS if case.power else REGISTERS)
    if code.spilled:
        assert case.power or case.dtypes == "f64"
        assert code.registers in STEPS
        assert code.spilled <= PUT_ASIDE
    assert ".local" not in code.intermediate
    check_arithmetic(case, code.intermediate)


def check_full_block(case: Case, block: machine_code.FullBlock) -> None:
    """What `fused-kopt explain` shows is what a full block takes."""
    shown = Counter([*((False, "ld", size) for size in block.loads), *((False, "st", size) for size in block.stores)])
    assert shown == Counter({key: count for key, count in expected_accesses(case).items() if not key[0]})


def check_guard(case: Case, text: str) -> None:
    """The wide path is taken by full blocks of variables, gradients and slots that all start at a multiple of 16 bytes."""
    block = launch.block_size(DTYPES[case.dtypes][0])
    amd = (rf"icmp sgt i64 %\d+, {block - 1}\b", r"= or i64 (%\d+), %\d+", r"= and i64 %\d+, 15\b")
    nvidia = (rf"setp\.lt\.s64\s+%p\d+, %rd\d+, {block};", r"or\.b64\s+%rd\d+, %rd\d+, %rd\d+;", r"and\.b64\s+%rd\d+, %rd\d+, 15;")
    ors = 1 + variants.RULES[case.rule].slots
    for pattern, count in zip(amd if case.target == "gfx942" else nvidia, (1, ors, 1), strict=True):
        assert len(re.findall(pattern, text)) == count, pattern


def expected_accesses(case: Case) -> Counter[tuple[bool, str, int]]:
    """(masked, ld or st, bytes): a full block takes one access per thread and tensor, a masked one takes each element alone."""
    slots = variants.RULES[case.rule].slots
    variable, gradient, slot = case.sizes
    block = launch.block_size(DTYPES[case.dtypes][0])
    each = block // launch.THREADS
    expected: Counter[tuple[bool, str, int]] = Counter()
    for kind, sizes in (("ld", [variable, gradient, *[slot] * slots]), ("st", [variable, *[slot] * slots])):
        for size in sizes:
            expected[(False, kind, size * each)] += 1
            expected[(True, kind, size)] += each
    return expected


def expected_tables(case: Case) -> Counter[tuple[bool, str, int]]:
    """Loads of the block's row (2), the segment's (3, one more for each slot), the factors (5) and float64 scalars."""
    rule, (_, _, compute) = variants.RULES[case.rule], case.sizes
    expected = Counter({(False, "ld", 4): 2})
    expected[(False, "ld", 8)] += 3 + rule.slots
    expected[(False, "ld", compute)] += 5 * case.clipped + (len(used_scalars(rule)) if compute == 8 else 0)
    return expected


def used_scalars(rule: variants.Rule) -> set[str]:
    """The scalars that a rule reads."""
    read = set()

    class Scalars:
        def __getattr__(self, name: str) -> torch.Tensor:
            read.add(name)
            return torch.ones((), dtype=F64)

    x = torch.ones(1, dtype=F64)
    rule.function(x, x, (x,) * rule.slots, Scalars())
    return read


def accesses(ptx: str) -> Counter[tuple[bool, str, int]]:
    """(under a predicate, ld or st, bytes) of every access to global memory."""
    found = re.findall(r"(@%p\d+ )?\b(ld|st)\.global(?:\.v(\d))?\.b(\d+)", ptx)
    return Counter((bool(predicate), kind, int(count or 1) * int(bits) // 8) for predicate, kind, count, bits in found)


def sass_accesses(sass: str) -> list[tuple[str, int]]:
    """What the assembler made of them."""
    width = {".128": 16, ".64": 8, ".U16": 2, "": 4}
    found = re.findall(r"\b(LDG|STG)\.E((?:\.[\w]+)*)", sass)
    return [({"LDG": "ld", "STG": "st"}[kind], width["".join(re.findall(r"\.(?:128|64|U16)", tail))]) for kind, tail in found]


def check_arithmetic(case: Case, ptx: str) -> None:
    """Everything rounds alone, by name: only `.rn` keeps ptxas from contracting."""
    allowed = ROUNDED | EXACT | CASTS | (POWER if case.power else set())
    opcodes = set(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z]\w*(?:\.\w+)*)\s", ptx, re.MULTILINE))
    floating = {opcode for opcode in opcodes if re.search(r"\.(b?f16|f16x2|bf16x2|tf32|f32|f64)\b", opcode)}
    assert {opcode for opcode in floating - allowed if not re.fullmatch(r"setp\.[a-z]+\.f(32|64)", opcode)} == set()
    # int32 products must not reach an address; `.wide` has a 64-bit result
    assert not {opcode for opcode in opcodes if re.match(r"(mul|mad)\.lo", opcode)}


def amd_accesses(text: str) -> Counter[tuple[str, int]]:
    width = {"ushort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx4": 16}
    found = re.findall(r"\b(?:global|buffer|flat)_(load|store)_(\w+)", text)
    return Counter(({"load": "ld", "store": "st"}[kind], width[size]) for kind, size in found)


def check_amd(case: Case, code: Code) -> None:
    # tables come through scalar loads
    assert amd_accesses(code.text) == Counter(key[1:] for key in expected_accesses(case).elements())
    assert code.registers <= (AMD_POWER_REGISTERS if case.power else REGISTERS)
    assert code.spilled <= (AMD_SCALARS_ASIDE if case.power else 0)
    assert "scratch_" not in code.text
    assert "float_denorm_mode_32 3" in code.text  # subnormal numbers are kept
    check_amd_arithmetic(case, code)


def check_amd_arithmetic(case: Case, code: Code) -> None:
    """Correctly rounded operations in LLVM's language, and in the assembly no fma but those that divide and take roots."""
    flags = r"\bf(?:add|sub|mul|div|rem|neg|cmp)(?: \w+)* (?:fast|contract|reassoc|arcp|afn)\b"
    assert not re.search(flags + "|!fpmath|llvm.fmuladd", code.intermediate)
    intrinsics = {(name, kind) for name, kind in re.findall(r"@llvm\.(\w+)\.(?:v\d)?(f\d+)?", code.intermediate)}
    assert {name for name, _ in intrinsics} <= (POWER_INTRINSICS if case.power else INTRINSICS)
    assert ("fma", "f32") not in intrinsics
    assert case.power or "amdgcn.rcp" not in code.intermediate
    if case.power and case.dtypes == "f64":
        return  # pow's own fma are float64 too
    kind = "f64" if case.dtypes == "f64" else "f32"
    divisions = len(re.findall(f"v_div_fixup_{kind}", code.text))
    roots = len(re.findall({"f64": "v_rsq_f64", "f32": "v_sqrt_f32"}[kind], code.text))
    fused = len(re.findall(rf"\bv_(?:pk_)?(?:fma|fmac|mad|mac)_{kind}", code.text))
    assert fused == AMD_FMA_PER_DIVISION * divisions + AMD_FMA_PER_ROOT[kind] * roots
    # float16 operands: times one or plus zero is a conversion and one rounding
    assert not re.findall(r"v_fma_mix\w+ (?!.*(?:, 1\.0, |neg\(0\))).*", code.text)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_float32(case: Case) -> None:
    check(case)


@pytest.mark.slow(every=31)
@pytest.mark.parametrize("case", REST, ids=str)
def test_other_dtypes(case: Case) -> None:
    check(case)


def test_no_rule_is_left_out() -> None:
    assert set(variants.RULES) == variants.written()


@pytest.mark.parametrize("target", offline.TARGETS)
def test_fusion_would_be_seen(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the same kernel with enable_fp_fusion=True does not pass."""
    compile_ = triton.compile
    fused = {"enable_fp_fusion": True}
    monkeypatch.setattr(triton, "compile", lambda source, target, options: compile_(source, target=target, options=options | fused))
    monkeypatch.setattr(offline, "compile_rule", offline.compile_rule.__wrapped__)
    case = Case("momentum", target, "f32", False)
    with pytest.raises(AssertionError):
        check(case)
    assert re.search(r"\bfma\.rn\.f32|\bv_(?:pk_)?fma\w*_f32", compiled(case).intermediate + compiled(case).text)


@triton.jit
def hinted(table, HINT: tl.constexpr, BLOCK: tl.constexpr):
    address = tl.load(table)
    if HINT == "before the cast":
        start = tl.multiple_of(address, 16).to(tl.pointer_type(tl.float32))
    elif HINT == "after the cast":
        start = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)
    else:
        start = address.to(tl.pointer_type(tl.float32))
    lanes = tl.arange(0, BLOCK)
    tl.store(start + lanes, tl.load(start + lanes) + 1.0)


@pytest.mark.parametrize(("hint", "width"), [("after the cast", 16), ("before the cast", 4), ("none", 4)])
def test_only_a_hint_after_the_cast_vectorises(hint: str, width: int) -> None:
    constants: dict[str, Any] = {"HINT": hint, "BLOCK": launch.BLOCK}
    source = ASTSource(hinted, {"table": "*i64"} | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    options = {"num_warps": launch.THREADS // 32, "enable_fp_fusion": False}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    each = launch.BLOCK // launch.THREADS * 4 // width
    assert accesses(ptx) == Counter({(False, "ld", 8): 1, (False, "ld", width): each, (False, "st", width): each})
