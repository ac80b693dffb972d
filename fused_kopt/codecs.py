"""How values are stored, as rules around a rule: what lies in memory is decoded, updated and encoded in the one launch.

A codec's `slots` are (position, planes of the slots..., planes of the variable). `position` counts the elements of all variables;
a plane of which GROUP elements share one value comes and goes with one value a group. Integers arrive as int32.
Everything is integer operations on bit patterns, and the same text for every executor; see `fused_kopt.options`.
"""

from fused_kopt import op
from fused_kopt.options import inner


def bare(p, g, slots, s):
    """The innermost: the rule knows nothing of positions."""
    return inner(p, g, slots[1:], s)


# Rounding a float32 to the upper half of its bits.


def nearest(x):
    """To the nearest bfloat16, ties to even, as a float32."""
    b = op.bits(x)
    return op.where(x == x, op.number((b + 0x7FFF + ((b >> 16) & 1)) & -0x10000), x)


def noise(at, s):
    """32 random bits for every element, the same in every layout: a hash of its position and of `s`'s key of seed and step.

    Source: C. Wellons, lowbias32 (2018).
    """
    x = op.position(at) ^ (op.integer(s.key_low) | (op.integer(s.key_high) << 16))
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975
    return x ^ ((x >> 16) & 0xFFFF)


def randomly(x, random):
    """To one of the two bfloat16 next to x, in proportion to their distances; as a float32. random: at least 16 random bits."""
    return op.where(x == x, op.number((op.bits(x) + (random & 0xFFFF)) & -0x10000), x)


# The variable, bfloat16 in memory.


def master_float32(p, g, slots, s):
    """A float32 copy. Where the variable is not the copy's rounding, somebody else wrote it, and it counts."""
    kept = slots[-1]
    p, values = inner(op.where(nearest(kept) == p, kept, p), g, slots[:-1], s)
    return nearest(p), values + (p,)  # noqa: RUF005 - Triton has no starred tuples


def master_int16(p, g, slots, s):
    """The other 16 bits, signed: with the variable's they are the float32, without loss."""
    p, values = inner(op.number(op.bits(p) + slots[-1]), g, slots[:-1], s)
    b = op.where(p == p, op.bits(p), 0x7FC00000)
    high = (b + 0x8000) & -0x10000
    return op.number(high), values + (b - high,)  # noqa: RUF005


def master_int8(p, g, slots, s):
    """The next 8 bits, signed, of the float32 rounded to 24 bits: relative error at most 2^-16."""
    p, values = inner(op.number(op.bits(p) + (slots[-1] << 8)), g, slots[:-1], s)
    b = (op.where(p == p, op.bits(p), 0x7FC00000) + 0x80) >> 8
    high = (b + 0x80) >> 8
    return op.number(high << 16), values + (b - (high << 8),)  # noqa: RUF005


def master_kahan(p, g, slots, s):
    """What rounding lost, as a bfloat16 to be added next time. Source: W. Kahan, Further remarks on reducing truncation errors, 1965."""
    p, values = inner(p + slots[-1], g, slots[:-1], s)
    near = nearest(p)
    return near, values + (p - near,)  # noqa: RUF005


def stochastic(p, g, slots, s):
    """No master: rounded at random to one of the two bfloat16 next to it, in proportion to their distances."""
    p, values = inner(p, g, slots, s)
    return randomly(p, noise(slots[0], s)), values


# One slot each: the first after the position is decoded and moved to the end, so that as many codecs as slots bring the rule's order.


def plain(p, g, slots, s):
    """As stored."""
    p, values = inner(p, g, slots[:1] + slots[2:] + slots[1:2], s)
    return p, values[-1:] + values[:-1]


def bfloat16(p, g, slots, s):
    """Rounded at random."""
    p, values = inner(p, g, slots[:1] + slots[2:] + slots[1:2], s)
    return p, (randomly(values[-1], noise(slots[0], s) >> 16),) + values[:-1]  # noqa: RUF005


# Eight bits, and a scale for every group. A code is the upper bits of a float32, counted from a base.


def half(at, s):
    """To the nearest: what is added before bits are cut off."""
    return -0x80000000


rounding = half  # what `options.around` puts here: `half` or `noise`


def scale_of(x, top, at):
    """A group's largest magnitude over `top`, and what its elements are to be multiplied by: 0 where that is not finite."""
    scale = op.number(op.largest(op.bits(op.abs(x)), at)) * top
    one = scale * 0.0 + 1.0
    usable = op.where(scale > 2e-38, op.where(scale < 3e38, one, 0.0), 0.0)
    return scale, op.div(usable, op.where(usable > 0.0, scale, one))


def limited(code, top):
    return op.where(code > top, top, op.where(code > 0, code, 0))


def signed(x, code):
    return op.where(x < 0.0, code | 0x80, code)


def block(p, g, slots, s):
    """A sign, and 127 magnitudes of 4 exponent bits and 3 of mantissa below the group's largest; below 2^-16 of it, zero."""
    code = slots[1] & 0x7F
    old = op.where(code > 0, op.number((code << 20) + 0x37900000), 0.0) * op.spread(slots[2], g)
    p, values = inner(p, g, slots[:1] + slots[3:] + (op.where(slots[1] > 127, -old, old),), s)
    x = values[-1]
    scale, inverse = scale_of(x, 1.0, slots[0])
    step = (rounding(slots[0], s) >> 12) & 0xFFFFF
    code = (op.bits(op.abs(x) * op.spread(inverse, x)) - 0x37900000 + step) >> 20
    return p, (signed(x, limited(code, 127)), scale) + values[:-1]  # noqa: RUF005


def block_positive(p, g, slots, s):
    """For slots that are never negative: 256 magnitudes of 5 exponent bits and 3 of mantissa. None of them is zero, unless the
    whole group is: a root in a denominator stays at least 2^-16 of the group's largest."""
    old = op.number((slots[1] << 20) + 0x2F900000) * op.spread(slots[2], g)
    p, values = inner(p, g, slots[:1] + slots[3:] + (old,), s)
    x = values[-1]
    scale, inverse = scale_of(x, 1.0, slots[0])
    code = (op.bits(x * op.spread(inverse, x)) - 0x2F900000 + ((rounding(slots[0], s) >> 12) & 0xFFFFF)) >> 20
    return p, (limited(code, 255), scale) + values[:-1]  # noqa: RUF005


def float8_e4m3(p, g, slots, s):
    """torch.float8_e4m3fn: largest 448, smallest step 2^-9."""
    code = slots[1] & 0x7F
    small = (op.number(code | 0x4B000000) - 8388608.0) * 0.001953125
    old = op.where(code > 7, op.number((code << 20) + 0x3C000000), small) * op.spread(slots[2], g)
    p, values = inner(p, g, slots[:1] + slots[3:] + (op.where(slots[1] > 127, -old, old),), s)
    x = values[-1]
    scale, inverse = scale_of(x, 1 / 448, slots[0])
    y, f = op.abs(x) * op.spread(inverse, x), rounding(slots[0], s)
    large = ((op.bits(y) + ((f >> 12) & 0xFFFFF)) >> 20) - 0x3C0
    small = op.integer(y * 512.0 + fraction(y, f))
    return p, (signed(x, limited(op.where(large > 7, large, small), 126)), scale) + values[:-1]  # noqa: RUF005


def float8_e5m2(p, g, slots, s):
    """torch.float8_e5m2: largest 57344, smallest step 2^-16."""
    code = slots[1] & 0x7F
    small = (op.number(code | 0x4B000000) - 8388608.0) * 1.52587890625e-05
    old = op.where(code > 3, op.number((code << 21) + 0x38000000), small) * op.spread(slots[2], g)
    p, values = inner(p, g, slots[:1] + slots[3:] + (op.where(slots[1] > 127, -old, old),), s)
    x = values[-1]
    scale, inverse = scale_of(x, 1 / 57344, slots[0])
    y, f = op.abs(x) * op.spread(inverse, x), rounding(slots[0], s)
    large = ((op.bits(y) + ((f >> 11) & 0x1FFFFF)) >> 21) - 0x1C0
    small = op.integer(y * 65536.0 + fraction(y, f))
    return p, (signed(x, limited(op.where(large > 3, large, small), 123)), scale) + values[:-1]  # noqa: RUF005


def fraction(y, f):
    """The random bits as a number in [0, 1); a half for `half`."""
    return op.number(op.bits(y * 0.0) & 0 | ((f >> 9) & 0x7FFFFF) | 0x3F800000) - 1.0
