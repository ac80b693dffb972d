"""Measured launches: their sums on every executor, the update's bits, the proof of their kernels, and their machine code."""

import itertools
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import offline
import pytest
import support
import test_machine_code as machine
import torch
import variants
from test_machine_code import Case
from torch import Tensor

import fused_kopt
from fused_kopt import execute, prepare, verification
from fused_kopt.buffers import Bucket
from fused_kopt.execute import Chosen, Update
from fused_kopt.kernels import cpp
from fused_kopt.kernels.offline import Spec, build
from fused_kopt.slots import Slot

EXECUTORS: tuple[Chosen, ...] = ("reference", "triton", "compiled")
# Blocks of every executor, a tail, one element, none; the last starts at an odd address.
SIZES = (70_001, 8192, 3, 0, 1, 1030)
FACTORS = (0.5, 0.75, 0.5, 1.5, 2.0)


def update(rule: str, dtype: torch.dtype, clipped: bool, gradient: torch.dtype | None = None) -> Update:
    """An update of variables of SIZES with one segment absent."""
    kind = variants.RULES[rule]
    memory, grads = (support.randn(sum(SIZES), seed=seed, dtype=kind) for seed, kind in ((1, dtype), (2, gradient or dtype)))
    variables: list[Tensor | None] = list(memory.split(SIZES))
    gradients: list[Tensor | None] = list(grads.split(SIZES))
    bucket, names = Bucket(torch.device("cpu"), dtype), tuple(f"slot {i}" for i in range(kind.slots))
    bucket.adopt(*bucket.grown([v for v in variables if v is not None], [Slot(name, 0.25) for name in names]))
    variables[2] = gradients[2] = None
    factors = torch.tensor([FACTORS] * len(SIZES), dtype=bucket.compute) if clipped else None
    return Update(bucket, variables, gradients, names, kind.function, kind.scalars(*(0.5,) * len(kind.scalars._fields)), True, factors)


def measured(update: Update, executor: Chosen) -> Update:
    """The update, run on copies that are measured."""
    copy = replace(update.copy(), sums=torch.zeros(3, dtype=torch.float64))
    execute.run(copy, executor)
    return copy


def expected_sums(before: Update, after: Update) -> list[float]:
    """Of gradients before clipping, steps and new variables, by numpy, each element in float64."""
    factor = 1.0 if before.factors is None else FACTORS[0]
    found = np.zeros(3)
    for g, old, new in zip(before.gradients, before.variables, after.variables, strict=True):
        if g is not None and old is not None and new is not None:
            x, y = (t.double().numpy() for t in (old, new))
            found += [((g.double().numpy() * factor) ** 2).sum(), ((y - x) ** 2).sum(), (y**2).sum()]
    return [float(x) for x in found]


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_sums_of_squares(executor: Chosen, dtype: torch.dtype, clipped: bool) -> None:
    given = update("adam", dtype, clipped)
    plain = given.copy()
    execute.run(plain, executor)
    found = measured(given, executor)
    for a, b in zip(plain.variables, found.variables, strict=True):
        assert a is b is None or (a is not None and b is not None and np.array_equal(support.bits(a), support.bits(b)))
    support.assert_same(*([support.bits(u.bucket.flat[name]) for name in u.names] for u in (plain, found)))
    assert found.sums is not None
    # 1e-12: another order of 80,000 float64 additions
    assert found.sums.tolist() == pytest.approx(expected_sums(given, found), rel=1e-12)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_gradients_of_two_dtypes_add_to_the_same_sums(executor: Chosen) -> None:
    given = update("sgd", torch.float32, True)
    given.gradients[1] = given.gradients[1] if given.gradients[1] is None else given.gradients[1].to(torch.bfloat16)
    found = measured(given, executor)
    assert found.sums is not None
    assert found.sums.tolist() == pytest.approx(expected_sums(given, found), rel=1e-12)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_what_a_16_bit_variable_rounds_away_is_no_step(executor: Chosen) -> None:
    bucket = Bucket(torch.device("cpu"), torch.bfloat16)
    variable, gradient = torch.full((5000,), 256.0, dtype=torch.bfloat16), torch.full((5000,), 0.5)
    bucket.adopt(*bucket.grown([variable], []))
    sgd = variants.RULES["sgd"]
    found = measured(Update(bucket, [variable], [gradient], (), sgd.function, sgd.scalars(0.5, 0.0)), executor)
    assert found.sums is not None
    assert found.sums.tolist() == [5000 * 0.25, 0.0, 5000 * 65536.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_gradient_that_is_not_finite_shows(executor: Chosen, bad: float) -> None:
    given = update("sgd", torch.float32, False)
    assert given.gradients[1] is not None
    given.gradients[1][77] = bad
    sums = measured(given, executor).sums
    assert sums is not None
    assert not sums.isfinite().any()


def test_threads_do_not_share_sums() -> None:
    given, threads = update("momentum", torch.float32, False), torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        found = [measured(given, "compiled").sums for _ in range(5)]
        torch.set_num_threads(1)
        found.append(measured(given, "compiled").sums)
    finally:
        torch.set_num_threads(threads)
    assert len({tuple(sums.tolist()) for sums in found if sums is not None}) == 1


def damage(update: Update) -> None:
    if update.sums is not None:
        update.sums[1] *= 1 + 1e-9


def test_a_wrong_sum_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the known-answer test of compiled kernels, and by verify_every on any executor."""
    support.after_each(monkeypatch, damage)
    monkeypatch.setattr(verification, "_known_answer", verification._known_answer.__wrapped__)
    given = replace(update("sgd", torch.float32, False), sums=torch.zeros(3, dtype=torch.float64))
    assert verification.proven(replace(given, sums=None), "compiled", "compiled") == "compiled"
    with pytest.raises(RuntimeError, match="1 of 2 tensors differ from the reference\n  variable -1 sums"):
        verification.proven(given, "compiled", "compiled")
    with pytest.warns(RuntimeWarning, match="falls back to the reference"):
        assert verification.proven(given, "compiled", "auto") == "reference"
    optimizer = fused_kopt.Adam(executor="triton", verify_every=1, stats_every=2)
    variable = torch.ones(5)
    optimizer.apply_gradients([(torch.ones(5), variable)])
    before = variable.clone()
    with pytest.raises(fused_kopt.FusedMismatchError, match="Nothing was written"):
        optimizer.apply_gradients([(torch.ones(5), variable)])
    assert torch.equal(variable, before)


# Registers of a measured kernel: up to 85 three blocks of 256 threads share the 65,536 of a multiprocessor, as in a plain one.
MEASURED_REGISTERS = machine.POWER_REGISTERS


def check(case: Case) -> None:
    """A measured kernel moves the data of the plain one, in the same widths, and stores three sums on either path."""
    rule = variants.RULES[case.rule]
    how, what = (prepare.scale_and_clip, prepare.scale) if case.clipped else (prepare.keep, prepare.keep)
    code = build(Spec(rule.function, how, rule.scalars, rule.slots, *machine.DTYPES[case.dtypes], what), case.target)
    assert code.spilled == 0
    assert code.registers <= MEASURED_REGISTERS
    # three sums, stored by one thread at the end of either path
    expected = machine.expected_accesses(case) + Counter({(True, "st", 8): 6})
    if case.target == "gfx942":
        # LLVM may merge the ends of the paths
        wanted, found = Counter(key[1:] for key in expected.elements()), machine.amd_accesses(code.text)
        assert not found - wanted
        assert not wanted - found - Counter({("st", 8): 3})
        assert "scratch_" not in code.text
        assert not re.search(r"\bf(?:add|sub|mul)(?: \w+)* (?:fast|contract|reassoc)\b|llvm.fmuladd", code.intermediate)
        return
    expected += machine.expected_tables(case)
    assert machine.accesses(code.intermediate) == expected
    assert Counter(machine.sass_accesses(code.text)) == Counter(key[1:] for key in expected.elements())
    allowed = machine.ROUNDED | machine.EXACT | machine.CASTS | {"cvt.f64.f32", "cvt.f64.f16"}
    opcodes = set(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z]\w*(?:\.\w+)*)\s", code.intermediate, re.MULTILINE))
    floating = {o for o in opcodes if re.search(r"\.(b?f16|f16x2|bf16x2|tf32|f32|f64)\b", o)} - allowed
    assert {o for o in floating if not re.fullmatch(r"setp\.[a-z]+\.f(32|64)", o)} == set()
    assert {o for o in opcodes if re.match(r"(mul|mad)\.lo", o)} <= {"mad.lo.s64"}  # 3 * program, in 64 bits


# One slot, three, and long arithmetic; general powers have more registers than any other rule already.
CASES = [
    Case(*values) for values in itertools.product(("sgd", "momentum", "amsgrad", "ftrl"), offline.TARGETS, machine.DTYPES, (False, True))
]
SOME = [case for i, case in enumerate(c for c in CASES if c.dtypes == "f32") if case.clipped == bool(i // 2 % 2)]


@pytest.mark.parametrize("case", SOME, ids=str)
def test_machine_code(case: Case) -> None:
    check(case)


@pytest.mark.slow(every=31)
@pytest.mark.parametrize("case", sorted(set(CASES) - set(SOME)), ids=str)
def test_machine_code_of_other_dtypes(case: Case) -> None:
    check(case)


def test_a_plain_kernel_knows_nothing_of_sums() -> None:
    """Without stats a kernel has no parameter and no statement more. `test_machine_code.py` counts its accesses."""
    rule = variants.RULES["momentum"]
    sources = [
        cpp.update_source(rule.function, prepare.keep, rule.scalars, ((torch.float32, 1),), (torch.float32,) * 2, what)
        for what in (None, prepare.keep)
    ]
    assert ["sum" in source for source in sources] == [False, True]
    code = offline.compile_rule(rule.function, rule.scalars, rule.slots, "sm_90", (torch.float32, torch.float32), False)
    # two tables, factors, two scalars, and Triton's own two
    assert re.findall(r"\.param \.(\w+) ", code.intermediate) == ["u64", "u64", "u64", "f32", "f32", "u64", "u64"]
