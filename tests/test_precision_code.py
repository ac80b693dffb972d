"""The machine code of packed kernels: registers, spills, access widths, instructions, rounding. Compiled here, run nowhere."""

import functools
import re
from typing import Any

import pytest
import test_machine_code as machine
import torch

from fused_kopt import options, precision, prepare, slots
from fused_kopt.hyperparameters import Step
from fused_kopt.kernels import machine_code, offline
from fused_kopt.optimizers import Adam, Lion
from fused_kopt.optimizers.adam import Scalars, adam
from fused_kopt.precision import Precision

BF16 = torch.bfloat16
POLICIES: dict[str, Precision] = {
    **{name: policy for name, policy in precision.NAMED.items() if name != "float32"},
    "int8": Precision(master="int8"),
    "int8 block8": Precision(master="int8", slots="block8"),
    "float8": Precision(master="int16", slots="float8_e4m3"),
}
# Of one byte or less 8 elements per thread, else 4. NVIDIA's three; the shuffles of a group's largest go through 64 to 128 bytes.
REGISTERS = {"bf16_8bit": 160, "int8 block8": 104, "float8": 104, "int8": 88}
DEFAULT_REGISTERS = 72


@functools.cache
def compiled(policy: str, target: str) -> offline.Code:
    stored, groups = POLICIES[policy], Adam().slot_groups()
    rule = stored.rule(BF16, slots.flatten(groups), adam)
    scalars: Any = options.extended(Scalars, "key_low", "key_high") if stored.random else Scalars
    planes = stored.planes(BF16, groups)
    kinds = tuple((plane.stored or torch.float32, plane.group) for plane in planes)
    return offline.build(offline.Spec(rule, prepare.keep, scalars, len(planes), BF16, BF16, planes=kinds), target)


def per_eight(policy: str, target: str) -> float:
    """Instructions that one thread executes in a full block, for 8 elements."""
    each = 8 if any(p.stored and p.stored.itemsize == 1 for p in POLICIES[policy].planes(BF16, Adam().slot_groups())) else 4
    return machine_code.full_block(compiled(policy, target).text, target == "gfx942").instructions * 8 / each


@pytest.mark.slow(every=5)
@pytest.mark.parametrize("target", offline.TARGETS)
@pytest.mark.parametrize("policy", list(POLICIES))
def test_resources_and_rounding(policy: str, target: str) -> None:
    code = compiled(policy, target)
    assert code.spilled == 0
    assert ".local" not in code.intermediate
    assert "scratch_" not in code.text
    if target == "gfx942":
        assert ("fma", "f32") not in {(n, k) for n, k in re.findall(r"@llvm\.(\w+)\.(?:v\d)?(f\d+)?", code.intermediate)}
        return
    assert code.registers <= REGISTERS.get(policy, DEFAULT_REGISTERS)
    assert not re.search(r"\b(?:fma|mad)\.rn\.f32", code.intermediate)
    block = machine_code.full_block(code.text, False)
    elements = 8 if policy in REGISTERS else 4
    wide = [size for size in (*block.loads, *block.stores) if size != 4]
    assert min(wide) >= 8  # at least 64 bits; what is left are scales, one float32 for 64 elements
    scales = 2 * sum(p.group > 1 for p in POLICIES[policy].planes(BF16, Adam().slot_groups()))
    assert [*block.loads, *block.stores].count(4) == scales
    bytes_each = sum((p.stored or torch.float32).itemsize for p in POLICIES[policy].planes(BF16, Adam().slot_groups()) if p.group == 1)
    assert sum(wide) == elements * (2 * 2 + 2 + 2 * bytes_each)  # variable and planes in and out, gradient in, each byte once


def test_an_8_bit_remainder_takes_500_instructions_for_8_elements() -> None:
    """FlashOptim's kernel takes 1,216, with 8-bit slots."""
    for target in ("sm_80", "sm_90"):
        assert per_eight("int8", target) <= 500
        assert per_eight("int8 block8", target) <= 800
        assert per_eight("bf16_8bit", target) <= 900  # with 32 random bits for every element


def test_a_rule_stays_small_under_a_policy() -> None:
    """Lion under the 8-bit policy: one slot, no division, no root; codecs alone cost less than Adam's arithmetic."""
    stored, groups = POLICIES["bf16_8bit"], Lion().slot_groups()
    flat = slots.flatten(groups)
    rule = stored.rule(BF16, flat, Lion().rule())
    kind: Any = type(Lion().scalars(Step(0, torch.float32)))
    planes = stored.planes(BF16, groups)
    kinds = tuple((plane.stored or torch.float32, plane.group) for plane in planes)
    scalars = options.extended(kind, "key_low", "key_high")
    code = offline.build(offline.Spec(rule, prepare.keep, scalars, len(planes), BF16, BF16, planes=kinds), "sm_90")
    assert code.spilled == 0
    assert machine_code.full_block(code.text, False).instructions < per_eight("bf16_8bit", "sm_90")


def test_targets_are_those_of_the_other_kernels() -> None:
    assert {case.target for case in machine.CASES} == set(offline.TARGETS)
