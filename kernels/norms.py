"""Square norms of many gradients: one launch reads them once, a second one folds the blocks' sums.

The order of the sums is part of the contract, so that every executor gives the same bits (`fused_kopt.norms` says which).
"""

import triton
import triton.language as tl

from fused_kopt.kernels.update import decode


@triton.jit
def paired(x, LENGTH: tl.constexpr, LEVELS: tl.constexpr):
    """The sum of float64[LENGTH], LENGTH = 2 ** LEVELS: neighbours are added, again and again."""
    for level in tl.static_range(LEVELS):
        even, odd = tl.split(tl.reshape(x, (LENGTH >> (level + 1), 2)))
        x = even + odd
    return x


@triton.jit
def squared(gradient, lanes, mask, f, PREPARE: tl.constexpr, GRADIENT: tl.constexpr, COMPUTE: tl.constexpr):
    x = PREPARE(decode(tl.load(gradient + lanes, mask=mask), GRADIENT, COMPUTE), f).to(tl.float64)
    if mask is not None:
        x = tl.where(mask, x, 0.0)
    return x * x


@triton.jit
def sum_block(
    gradient, left, f,
    PREPARE: tl.constexpr, GRADIENT: tl.constexpr, COMPUTE: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The sum of the squares of 8 tiles; those of a full block are loaded without masks."""
    lanes = tl.arange(0, TILE)
    tiles = ()
    for i in tl.static_range(8):
        place = lanes + i * TILE
        tiles += (squared(gradient, place, None if FULL else place < left, f, PREPARE, GRADIENT, COMPUTE),)
    a, b, c, d = tiles[0] + tiles[4], tiles[1] + tiles[5], tiles[2] + tiles[6], tiles[3] + tiles[7]
    return paired((a + c) + (b + d), TILE, 10)


@triton.jit
def square_blocks(
    segments, blocks, factors, sums,
    PREPARE: tl.constexpr, GRADIENT: tl.constexpr, COMPUTE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """float64[grid] sums of the squares of 8 * TILE elements each, prepared by the one row of `factors`. TILE is 1024.

    segments: int64[n, 3] as for an update without slots. blocks: int32[grid, 2] = segment, block of it.
    """
    program = tl.program_id(0).to(tl.int64)
    row = segments + 3 * tl.load(blocks + 2 * program).to(tl.int64)
    start = tl.load(blocks + 2 * program + 1).to(tl.int64) * (8 * TILE)
    gradient = tl.load(row + 1)
    left = tl.load(row + 2) - start
    f = ()
    for i in tl.static_range(5):
        f += (tl.load(factors + i),)
    G: tl.constexpr = tl.pointer_type(tl.uint16 if GRADIENT == tl.bfloat16 else GRADIENT)
    if (left >= 8 * TILE) & (gradient % 16 == 0):
        total = sum_block(tl.multiple_of(gradient.to(G), 16) + start, left, f, PREPARE, GRADIENT, COMPUTE, TILE, True)
    else:
        total = sum_block(gradient.to(G) + start, left, f, PREPARE, GRADIENT, COMPUTE, TILE, False)
    tl.store(sums + program + tl.arange(0, 1), total)


@triton.jit
def fold(values, starts, sums, LANES: tl.constexpr):
    """float64[n]: each the sum of values[starts[i]:starts[i + 1]], LANES (1024) running sums, then their neighbours."""
    i = tl.program_id(0)
    first, last = tl.load(starts + i), tl.load(starts + i + 1)
    lanes = tl.arange(0, LANES)
    total = tl.full([LANES], 0.0, tl.float64)
    for at in range(first, last, LANES):
        total += tl.load(values + at + lanes, mask=at + lanes < last, other=0.0)
    tl.store(sums + i + tl.arange(0, 1), paired(total, LANES, 10))
