"""Codecs by themselves: what they lose, what they keep, what they do to numbers that are none."""

from typing import Any

import numpy as np
import pytest
import torch
from support import bits, randn
from torch import Tensor

from fused_kopt import codecs, op, options, precision
from fused_kopt.precision import Precision
from fused_kopt.slots import Slot

EDGES = [0x00000000, 0x80000000, 0x00000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x3F808000, 0x3F818000]
NAN = [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF]
KEYED = type("Keyed", (), {"key_low": torch.tensor(12345.0), "key_high": torch.tensor(54321.0)})


def patterns(values: Any) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.uint32).view(np.float32))


def some(count: int = 100_000) -> Tensor:
    """float32 of all magnitudes, and the edges."""
    drawn = np.random.default_rng(0).integers(0, 1 << 32, count, dtype=np.uint64).astype(np.uint32)
    values = patterns([*EDGES, *drawn])
    return values[values == values]


def put(p, g, slots, s):  # type: ignore[no-untyped-def]
    """A rule that makes its gradient the variable."""
    return g, slots[1:]


def through(master: str, values: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 variable, and what is read back, after float32 `values` were stored."""
    codec, _, dtype = precision.MASTERS[master]
    rule = options.around(codec, put)
    zero = torch.zeros_like(values, dtype=torch.float32 if dtype.is_floating_point else torch.int32)
    position = torch.zeros_like(values, dtype=torch.int32)
    p, planes = rule(torch.zeros_like(values), values, (position, zero), None)
    kept = planes[-1].to(dtype)
    stored = p.bfloat16()
    assert np.array_equal(bits(stored.float()), bits(p))  # it fits
    found = precision._Seen(torch.zeros(()))
    again = kept.float() if dtype.is_floating_point else kept.to(torch.int32)
    options.around(codec, options.around(codecs.bare, precision._see))(stored.float(), values, (position, again), found)
    return stored, found.values[0]


def test_a_master_of_16_more_bits_loses_nothing() -> None:
    values = some()
    stored, back = through("int16", values)
    assert np.array_equal(bits(back), bits(values))
    ordinary = values.abs() < 3e38  # the largest numbers round to infinity, as in any bfloat16
    assert bool(((stored.float() - values).abs() <= values.abs() / 256 + 1e-40)[ordinary].all())


def test_a_master_of_8_more_bits_is_off_by_2_to_the_minus_16() -> None:
    values = some()
    values = values[(values.abs() > 2e-38) & (values.abs() < 3.3e38)]  # normal numbers
    stored, back = through("int8", values)
    error = ((back.double() - values.double()) / values.double()).abs().max()
    assert 1.5e-5 < float(error) <= 2**-16
    assert float(((stored.double() - values.double()) / values.double()).abs().max()) > 1e-3  # the control: the variable alone


def test_a_compensated_variable_has_16_bits() -> None:
    values = randn(10_000)
    _, back = through("kahan", values)
    assert float(((back.double() - values.double()) / values.double()).abs().max()) <= 2**-16


def test_a_float32_master_is_exact_and_follows_the_variable() -> None:
    values = some()
    _, back = through("float32", values)
    assert np.array_equal(bits(back), bits(values))
    rule = options.around(codecs.master_float32, put)
    p, (kept,) = rule(torch.tensor([2.0]), torch.tensor([3.0]), (torch.zeros(1), torch.tensor([1.001])), None)
    assert (p.item(), kept.item()) == (3.0, 3.0)
    found = precision._Seen(torch.zeros(()))
    options.around(codecs.master_float32, precision._see)(
        torch.tensor([2.0]), torch.zeros(1), (torch.zeros(1), torch.tensor([1.001])), found
    )
    assert found.values[0].item() == 2.0  # somebody wrote 2.0 into the variable, whose master was 1.001


@pytest.mark.parametrize("master", list(precision.MASTERS))
def test_what_is_not_a_number_stays_none(master: str) -> None:
    stored, back = through(master, patterns(NAN))
    assert bool(stored.isnan().all())
    assert bool(back.isnan().all())


# Eight bits.


def packed(values: Tensor, stored: str, positive: bool = False, rounding: Any = codecs.half) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and what is read back, after a slot took `values`."""
    codec = precision.EIGHT[stored][0][positive]

    def fill(p, g, slots, s):  # type: ignore[no-untyped-def]
        return p, (*slots[1:-1], g)

    zero = torch.zeros_like(values)
    position, code = torch.arange(values.numel(), dtype=torch.int32), torch.zeros_like(values, dtype=torch.int32)
    scale = torch.zeros(-(-values.numel() // op.GROUP))
    _, (code, scale) = options.around.__wrapped__(codec, fill, rounding)(zero, values, (position, code, scale), KEYED)
    assert 0 <= int(code.min()) <= int(code.max()) <= 255
    found = precision._Seen(torch.zeros(()))
    options.around.__wrapped__(codec, precision._see, rounding)(zero, zero, (position, code, scale), found)
    return code, scale, found.values[-1]


@pytest.mark.parametrize("count", [1, 63, 64, 65, 6400, 6401])
@pytest.mark.parametrize(("stored", "positive", "relative", "floor"), [
    ("block8", False, 2**-4, 2**-15),
    ("block8", True, 2**-4, 2**-31),
    ("float8_e4m3", False, 2**-4, 2**-18),
    ("float8_e5m2", False, 2**-3, 2**-31),
])  # fmt: skip
def test_eight_bits_keep_magnitudes(stored: str, positive: bool, relative: float, floor: float, count: int) -> None:
    """relative: half a step of the mantissa. floor: below so much of the group's largest, errors are absolute."""
    values = randn(count) * torch.exp2(randn(count, seed=1) * 4)
    values = values.abs() if positive else values
    _, scale, back = packed(values, stored, positive)
    top = op.spread(op.number(op.largest(op.bits(values.abs()), values)), values)
    assert bool(((back - values).abs() <= values.abs() * relative * 1.001 + top * floor).all())
    assert bool(((back - values).abs() > values.abs() * relative / 4).any()) or count == 1  # the bound is near
    assert bool((torch.sign(back) * torch.sign(values) >= 0).all())
    assert torch.equal(back[top == values.abs()].abs() > 0, torch.ones_like(back[top == values.abs()], dtype=torch.bool))
    assert scale.numel() == -(-count // 64)


@pytest.mark.parametrize(("stored", "dtype"), [("float8_e4m3", torch.float8_e4m3fn), ("float8_e5m2", torch.float8_e5m2)])
def test_codes_are_torchs_float8(stored: str, dtype: torch.dtype) -> None:
    values = randn(6400) * torch.exp2(randn(6400, seed=1) * 6)
    code, scale, back = packed(values, stored)
    of_torch = code.to(torch.uint8).view(dtype).float() * op.spread(scale, values)
    assert torch.equal(of_torch, back)
    inverse = op.spread(1 / scale, values)
    wanted = (values * inverse).to(dtype).float()
    differ = wanted != code.to(torch.uint8).view(dtype).float()
    assert float(differ.float().mean()) < 1e-3  # ties: torch's go to even, ours away from zero


@pytest.mark.parametrize("stored", list(precision.EIGHT))
@pytest.mark.parametrize("positive", [False, True])
def test_a_group_of_zeros_and_one_that_is_not_finite(stored: str, positive: bool) -> None:
    values = torch.cat([torch.zeros(64), torch.full((64,), 2.0), torch.full((64,), float("inf")), torch.full((64,), float("nan"))])
    _, _, back = packed(values, stored, positive)
    assert bool((back[:64] == 0).all())
    assert bool((back[64:128] == 2.0).all())
    assert not bool(back[128:].isfinite().any())


def test_a_small_denominator_is_not_lost() -> None:
    """Beside a gradient 10,000 times as large, the second moment of a small one must not become zero."""
    values = torch.tensor([1.0, 1e-8, 1e-30, 0.0])
    _, _, back = packed(values, "block8", positive=True)
    assert bool((back[1:] > 0).all())
    assert float(back[1]) == pytest.approx(1e-8, rel=0.07)
    assert float(packed(values, "block8")[2][1]) == 0.0  # the control: the signed codes end at 2^-16


# Random rounding.


@pytest.mark.parametrize(("stored", "positive"), [("block8", False), ("block8", True), ("float8_e4m3", False), ("float8_e5m2", False)])
def test_random_rounding_of_eight_bits_is_unbiased(stored: str, positive: bool) -> None:
    count = 64 * 4096
    values = torch.full((count,), 0.0213)
    values[::64] = 1.0  # the group's largest
    _, _, back = packed(values, stored, positive, codecs.noise)
    near = torch.unique(back[values < 1])
    assert near.numel() == 2
    chosen = back[values < 1].double()
    spread = float(near.max() - near.min()) / 2
    assert abs(float(chosen.mean()) - 0.0213) < 5 * spread / chosen.numel() ** 0.5  # 5 standard deviations at the most
    assert abs(float(packed(values, stored, positive)[2][1]) - 0.0213) > 20 * spread / chosen.numel() ** 0.5  # to nearest: biased


def test_random_rounding_to_bfloat16_is_unbiased() -> None:
    count = 1 << 18
    x = torch.full((count,), 1 + 0.3 / 128)
    position = torch.arange(count, dtype=torch.int32)
    rounded = codecs.randomly(x, codecs.noise(position, KEYED))
    assert set(rounded.tolist()) == {1.0, 1 + 1 / 128}
    assert abs(float((rounded > 1).double().mean()) - 0.3) < 5 * (0.3 * 0.7 / count) ** 0.5


def test_noise_looks_random() -> None:
    count = 1 << 18
    position = torch.arange(count, dtype=torch.int32)
    words = codecs.noise(position, KEYED)
    for bit in range(32):
        ones = float(((words >> bit) & 1).double().mean())
        assert abs(ones - 0.5) < 5 * 0.5 / count**0.5, bit
    other = type("Keyed", (), {"key_low": torch.tensor(12346.0), "key_high": torch.tensor(54321.0)})
    agree = ((words ^ codecs.noise(position, other)) & 0xFFFF).double().mean() / 0x7FFF
    assert abs(float(agree) - 1) < 0.01  # the next step's bits are others, in half of the places
    a, b = ((words >> 16) & 0xFFFF).double(), ((words[1:] >> 16) & 0xFFFF).double()
    assert abs(float(np.corrcoef(a[:-1], b)[0, 1])) < 5 / count**0.5  # neighbours


def test_keys_differ_by_seed_and_step() -> None:
    keys = {Precision(seed=seed).key(step) for seed in range(40) for step in range(1000)}
    assert len(keys) == 40_000
    assert all(x == int(x) and 0 <= x < 1 << 16 for key in keys for x in key)


# Policies.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"master": "int4"}, "`master` must be one of none, float32, int16, int8, kahan. Received: master='int4'"),
        ({"slots": "int4"}, "`slots` must be one of float32"),
        ({"slots": (("m", "int4"),)}, "`slots` must be one of float32"),
        ({"rounding": "up"}, "`rounding` must be one of nearest, stochastic"),
        ({"seed": -1}, r"`seed` must be an int in \[0, 2\^32\). Received: seed=-1"),
        ({"seed": 1.5}, "`seed` must be an int"),
        ({"master": "int16", "rounding": "stochastic"}, "Nothing is rounded stochastically"),
        ({"slots": "float16", "rounding": "stochastic"}, "Slots of float16 are rounded to nearest only"),
    ],
)
def test_policies_without_meaning(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Precision(**arguments)


def test_get() -> None:
    assert precision.get("bf16_split") == Precision(master="int16")
    assert precision.get(Precision(seed=3)) == Precision(seed=3)
    for policy in (*precision.NAMED.values(), Precision(slots=(("m", "bfloat16"),), seed=7)):
        assert precision.get(precision.serialize(policy)) == policy
    with pytest.raises(ValueError, match="`precision` must be one of float32, bf16_master"):
        precision.get("bf16")
    with pytest.raises(TypeError, match=r"must be a name or a Precision\. Received: int"):
        precision.get(16)  # type: ignore[arg-type]


def test_bytes_per_element() -> None:
    """Of Adam's state besides the variable, in bits: what the table in the docs says."""
    groups = ((Slot("m"),), (Slot("v", positive=True),))
    expected = {"float32": 64, "bf16_master": 96, "bf16_split": 80, "bf16_kahan": 48, "bf16_stochastic": 32, "bf16_8bit": 25}
    found = {}
    for name, policy in precision.NAMED.items():
        planes = [p for p in policy.planes(torch.bfloat16, groups) if p.group]
        found[name] = sum((p.stored or torch.float32).itemsize * 8 / p.group for p in planes)
    assert found == expected
