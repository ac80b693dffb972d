"""The one kernel: every optimizer, every variable of a bucket, one launch. The rule reaches it as a constexpr."""

import triton
import triton.language as tl

from fused_kopt.kernels.op import GROUP


@triton.jit
def decode(x, STORED: tl.constexpr, COMPUTE: tl.constexpr):
    if STORED == tl.bfloat16:
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(COMPUTE)
    elif STORED.is_int():
        return x.to(tl.int32)
    else:
        return x.to(COMPUTE)


@triton.jit
def encode(x, STORED: tl.constexpr):
    if STORED == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
        return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16)
    else:
        return x.to(STORED)


@triton.jit
def total(x):
    """The sum of a block."""
    return tl.sum(x)


@triton.jit
def store_squares(values, mask, sums):
    """Store the sum of the squares of each of three blocks, in this program's row of sums, float64[grid, 3]."""
    row = sums + 3 * tl.program_id(0).to(tl.int64)
    for i in tl.static_range(3):
        x = values[i]
        if mask is not None:
            x = tl.where(mask, x, 0.0)
        tl.store(row + i, total(x * x))


@triton.jit
def update_block(
    variable, gradient, slots, s, factors, sums, at,
    RULE: tl.constexpr, PREPARE: tl.constexpr, MEASURED: tl.constexpr, VARIABLE: tl.constexpr, GRADIENT: tl.constexpr,
    STORED: tl.constexpr, GROUPS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Load, compute, store BLOCK elements. Pointers are at the block's first element; `slots` holds a position where GROUPS is 0.

    at: the elements, the groups, and the masks of both, None for a full block.
    """
    lanes, groups, mask, few = at
    p = decode(tl.load(variable + lanes, mask=mask), VARIABLE, COMPUTE)
    g = decode(tl.load(gradient + lanes, mask=mask), GRADIENT, COMPUTE)
    values = ()
    for i in tl.static_range(len(slots)):
        if GROUPS[i] == 0:
            values += ((slots[i] + lanes, mask),)
        elif GROUPS[i] > 1:
            values += (tl.load(slots[i] + groups, mask=few),)
        else:
            values += (decode(tl.load(slots[i] + lanes, mask=mask), STORED[i], COMPUTE),)
    new, values = RULE(p, PREPARE(g, factors), values, s)
    stored = encode(new, VARIABLE)
    tl.store(variable + lanes, stored, mask=mask)
    first: tl.constexpr = len(slots) - len(values)
    for i in tl.static_range(len(values)):
        if GROUPS[first + i] > 1:
            tl.store(slots[first + i] + groups, values[i], mask=few)
        else:
            tl.store(slots[first + i] + lanes, encode(values[i], STORED[first + i]), mask=mask)
    if MEASURED is not None:
        after = decode(stored, VARIABLE, COMPUTE).to(tl.float64)
        store_squares((MEASURED(g, factors).to(tl.float64), after - p.to(tl.float64), after), mask, sums)


@triton.jit
def update_bucket(
    segments, blocks, factors, s, sums,
    RULE: tl.constexpr, PREPARE: tl.constexpr, MEASURED: tl.constexpr, SCALARS: tl.constexpr, STRIDE: tl.constexpr,
    VARIABLE: tl.constexpr, GRADIENT: tl.constexpr,
    STORED: tl.constexpr, GROUPS: tl.constexpr, GROUPED: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update one bucket in place, one program per block.

    segments: int64[n, 3 + slots] = addresses of variable and gradient, numel (0: absent in this step), addresses of the slots.
    blocks: int32[grid, 2] = segment, block of it. factors: COMPUTE[n, 5], what PREPARE does to the gradient.
    s: the scalars, as floats, or where SCALARS builds them as pointers to those of segment 0; those of the next one lie
    STRIDE elements on. STORED, GROUPS: of each slot its dtype, and how many elements share a value (0: a position, not an address);
    GROUPED: whether any do. sums: None, or float64[grid, 3] for the squares of the gradients as MEASURED gives them, of the steps,
    and of the new variables.
    """
    SLOTS: tl.constexpr = len(STORED)
    block = blocks + 2 * tl.program_id(0).to(tl.int64)
    segment = tl.load(block).to(tl.int64)
    start = tl.load(block + 1).to(tl.int64) * BLOCK
    row = segments + (3 + SLOTS) * segment
    variable = tl.load(row)
    gradient = tl.load(row + 1)
    left = tl.load(row + 2) - start
    together = variable | gradient
    addresses = ()
    for i in tl.static_range(SLOTS):
        addresses += (tl.load(row + 3 + i),)
        together |= addresses[i] if GROUPS[i] > 0 else 0  # a position is counted from, wherever it is
    f = ()
    for i in tl.static_range(5):
        f += (tl.load(factors + 5 * segment + i),)
    if SCALARS is not None:
        # a float argument of a kernel is float32: float64 scalars come through memory
        scalars = SCALARS(*[tl.load(x + STRIDE * segment) for x in s])
    else:
        scalars = s
    lanes = tl.arange(0, BLOCK)
    groups = tl.arange(0, BLOCK // GROUP) if GROUPED else lanes
    # bfloat16 travels as its bits: the interpreter truncates and AMD's cast differs, integer rounding is right everywhere
    V: tl.constexpr = tl.pointer_type(tl.uint16 if VARIABLE == tl.bfloat16 else VARIABLE)
    G: tl.constexpr = tl.pointer_type(tl.uint16 if GRADIENT == tl.bfloat16 else GRADIENT)
    if (left >= BLOCK) & (together % 16 == 0):
        # the cast first and in place, then the hint, then the offset: the order that vectorises to 128 bits (a cast in a
        # function of its own loses the hint in Triton 3.6)
        v = tl.multiple_of(variable.to(V), 16) + start
        g = tl.multiple_of(gradient.to(G), 16) + start
        views = ()
        for i in tl.static_range(SLOTS):
            if GROUPS[i] == 0:
                views += ((addresses[i] + start).to(tl.int32),)
            else:
                aligned = tl.multiple_of(addresses[i].to(tl.pointer_type(tl.uint16 if STORED[i] == tl.bfloat16 else STORED[i])), 16)
                views += (aligned + start // GROUPS[i],)
        at = (lanes, groups, None, None)
        update_block(v, g, views, scalars, f, sums, at, RULE, PREPARE, MEASURED, VARIABLE, GRADIENT, STORED, GROUPS, COMPUTE)
    elif (left > 0) | GROUPED | (MEASURED is not None):  # the test saves registers, except in kernels with groups; sums need zeros
        v = variable.to(V) + start
        g = gradient.to(G) + start
        views = ()
        for i in tl.static_range(SLOTS):
            if GROUPS[i] == 0:
                views += ((addresses[i] + start).to(tl.int32),)
            else:
                near = addresses[i].to(tl.pointer_type(tl.uint16 if STORED[i] == tl.bfloat16 else STORED[i]))
                views += (near + start // GROUPS[i],)
        at = (lanes, groups, lanes < left, groups * GROUP < left)
        update_block(v, g, views, scalars, f, sums, at, RULE, PREPARE, MEASURED, VARIABLE, GRADIENT, STORED, GROUPS, COMPUTE)


@triton.jit
def advance(table, counter, row, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Make the next row of a table current, in a captured graph too. counter: int64[2] = row to come, rows; the last one repeats."""
    step = tl.load(counter)
    lanes = tl.arange(0, WIDTH)
    here = tl.minimum(step, tl.load(counter + 1) - 1)
    tl.store(row + lanes, tl.load(table + here * COUNT + lanes, mask=lanes < COUNT), mask=lanes < COUNT)
    tl.store(counter, step + 1)
