"""Catalogue B, continued: what a launch writes, and nothing else. Guard bytes surround every tensor."""

import itertools
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import offline
import pytest
import torch
from support import (
    DEVICES,
    DTYPES,
    EXECUTORS,
    Guarded,
    assert_same,
    bits,
    build,
    launches,
    outcome,
    python,
    randn,
    run,
    small_blocks,
    state,
)
from torch import Tensor

from fused_kopt import execute, layout, prepare
from fused_kopt.buffers import Bucket
from fused_kopt.execute import Update
from fused_kopt.kernels import cpp, cpp_launch, launch
from fused_kopt.optimizers.adam import Scalars as AdamScalars
from fused_kopt.optimizers.adam import adam
from fused_kopt.slots import Slot


class Scalars(NamedTuple):
    learning_rate: float
    momentum: float


def momentum(p, g, slots, s):
    (velocity,) = slots
    velocity = velocity * s.momentum - g * s.learning_rate
    return p + velocity, (velocity,)


class Walled:
    """An update whose variables, gradients and slots all lie between guard bytes."""

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype = torch.float32, device: str = "cpu", offsets: Sequence[int] = ()) -> None:
        starts = offsets or [0] * len(sizes)
        self.variables = [Guarded(randn(n, seed=i, dtype=dtype).to(device), o) for i, (n, o) in enumerate(zip(sizes, starts, strict=True))]
        self.gradients = [Guarded(randn(n, seed=-i, dtype=dtype).to(device), o) for i, (n, o) in enumerate(zip(sizes, starts, strict=True))]
        self.bucket = Bucket(torch.device(device, 0) if device == "cuda" else torch.device(device), dtype)
        new, segments, flat = self.bucket.grown([v.variable for v in self.variables], [Slot("momentum", 0.5)])
        self.slots = Guarded(flat["momentum"])
        self.bucket.adopt(new, segments, {"momentum": self.slots.variable})
        variables, gradients = ([g.variable for g in side] for side in (self.variables, self.gradients))
        numbers = Scalars(float(np.float32(0.1)), float(np.float32(0.9)))
        self.update = Update(self.bucket, list(variables), list(gradients), ("momentum",), momentum, numbers)

    def check(self, what: object = "") -> None:
        """Run it; what it wrote is what the reference writes, and no guard byte, padding or gradient changed."""
        before = [bits(g.raw) for g in self.gradients]
        expected = self.update.copy()
        execute.run(expected, "reference")
        execute.run(self.update, "triton")
        results = [[bits(v) for v in u.variables if v is not None] + [bits(u.bucket.flat["momentum"])] for u in (self.update, expected)]
        assert_same(*results, what)
        assert all(guarded.intact() for guarded in (*self.variables, *self.gradients, self.slots)), what
        assert_same([bits(g.raw) for g in self.gradients], before)


def test_B25_B26_no_address_is_computed_from_a_32_bit_product() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        ttir = offline.compile_rule(adam, AdamScalars, 2, "sm_90", (dtype, dtype), True).ttir
        assert re.findall(r"arith\.muli .* : (?:i32|tensor<\d+xi32>)", ttir) == []
        assert "arith.muli" in ttir
        assert "tt.addptr" in ttir


def far_blocks(executor: str) -> None:
    """A step on elements 2**31 and beyond, with addresses such that these elements lie in small tensors."""
    bind, block = {"triton": (launch.bind, 1024), "compiled": (cpp_launch.bind, cpp.BLOCK)}[executor]
    first = 2**31 // block + 3
    start, tail = first * block, 77
    near = Walled([2 * block + tail])

    def far(tensor: Tensor) -> Any:
        return SimpleNamespace(dtype=tensor.dtype, data_ptr=lambda: tensor.data_ptr() - start * tensor.element_size())

    segment = layout.Segment((), (), start + 2 * block + tail, 0)
    kinds = dict.fromkeys(("dtype", "compute", "stored"), torch.float32)
    bucket = SimpleNamespace(device=near.bucket.device, segments=[segment], tables=None, planes=near.bucket.planes, **kinds)
    near.update.factors = torch.tensor([[1.0, float("inf"), 1.0, 1.0, 1.0]])
    moved = SimpleNamespace(**vars(near.update) | {"bucket": bucket})
    moved.variables, moved.gradients = ([far(t[0])] for t in (near.update.variables, near.update.gradients))
    moved.blocks = lambda size: np.array([(0, first + i) for i in range(3)], dtype=np.int32)
    addresses = (moved.variables[0].data_ptr(), moved.gradients[0].data_ptr(), segment.numel, far(near.slots.variable).data_ptr())
    moved.segment_tables = lambda: {torch.float32: np.array([addresses])}
    expected = near.update.copy()
    execute.run(expected, "reference")
    with small_blocks(block):
        bind(moved, prepare.keep)(moved.scalars, None)
    assert_same([bits(near.variables[0].variable)], [bits(expected.variables[0])])
    assert_same([bits(near.slots.variable)], [bits(expected.bucket.flat["momentum"])])
    assert near.variables[0].intact()
    assert near.slots.intact()
    print("exact")


@pytest.mark.parametrize("executor", ["triton", "compiled"])
def test_B25_elements_beyond_2_to_the_31_are_reached(executor: str) -> None:
    assert python(f"import test_reliability_b3 as t; t.far_blocks('{executor}')") == "exact\n"  # a wrong address is a segmentation fault


def test_B27_a_grid_of_any_size_is_one_dimensional(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = list(torch.zeros(70_000).unbind())
    bucket = Bucket(torch.device("cpu"), torch.float32)
    bucket.adopt(*bucket.grown(variables, [Slot("momentum")]))
    grids: list[Any] = []
    monkeypatch.setattr(launch, "_run", lambda kernel, grid, *rest: grids.append(grid))
    update = Update(bucket, list(variables), list(variables), ("momentum",), momentum, Scalars(0.0, 0.0))
    execute.run(update, "triton")
    assert grids == [70_000]
    assert update.blocks(1024).tolist() == [[i, 0] for i in range(70_000)]


def test_B28_every_combination_of_critical_sizes(slow: bool) -> None:
    draw = random.Random(0)
    with small_blocks(16) as block:
        for sizes in itertools.product([0, 1, block - 1, block, block + 1, 2 * block], repeat=4 if slow else 3):
            walled = Walled(sizes)
            if draw.random() < 0.25:  # absent in this step
                index = draw.randrange(len(sizes))
                walled.update.variables[index] = walled.update.gradients[index] = None
            walled.check(sizes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_B29_no_size_writes_beyond_its_end(dtype: torch.dtype, device: str) -> None:
    with small_blocks(16) as block:
        block = launch.block_size(dtype) if device == "cuda" else block
        Walled(range(2 * block + 2), dtype, device).check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_B30_views_at_every_alignment_in_one_launch(dtype: torch.dtype, device: str) -> None:
    with small_blocks(16) as block:
        block = launch.block_size(dtype) if device == "cuda" else block
        walled = Walled([3 * block + 5] * 16, dtype, device, offsets=range(16))
        assert {segment.offset % 16 for segment in walled.bucket.segments} == {0}  # slots are aligned whatever the variables are
        assert {v.variable.data_ptr() % 16 for v in walled.variables} == set(range(0, 16, torch.finfo(dtype).bits // 8))
        walled.check()
    # the gradient aligned otherwise than its variable
    walled.update.gradients.reverse()
    walled.check()


def test_B31_thousands_of_tiny_tensors_take_one_launch_and_one_table() -> None:
    initial, gradients = ([randn(1 + i % 4, seed=s + i) for i in range(1000)] for s in (0, 9))
    optimizer, variables = build("momentum", "triton"), [v.clone() for v in initial]
    with small_blocks(4):
        with launches(1):
            optimizer.apply_gradients(list(zip(gradients, variables, strict=True)))
        (bucket,) = optimizer._state.buckets.values()
        tables = bucket.tables[4]
        uploaded = tables._segments
        with launches(1):
            optimizer.apply_gradients(list(zip(gradients, variables, strict=True)))
    assert bucket.tables[4] is tables
    assert tables._segments is uploaded
    assert tables.grid == 1000
    assert_same(state(optimizer, variables), outcome("momentum", "reference", initial, [gradients] * 2))


STRANGE_ARRAYS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "fortran": lambda w: w.copy(order="F"),
    "reversed": lambda w: w[..., ::-1].copy()[..., ::-1] if w.ndim else w,
    "gaps": lambda w: np.repeat(w, 2, -1)[..., ::2] if w.ndim else w,
    "byte order": lambda w: w.astype(w.dtype.newbyteorder()),
    "read-only": lambda w: np.broadcast_to(w, w.shape),
}


@pytest.mark.parametrize("kind", STRANGE_ARRAYS)
def test_B32_weights_and_gradients_may_be_arrays_in_any_layout_and_byte_order(kind: str) -> None:
    change = STRANGE_ARRAYS[kind]
    optimizer, (variable,) = run("adam", "reference", [randn(4, 6)], [[change(randn(4, 6, seed=1).numpy())]])
    assert_same(state(optimizer, [variable]), outcome("adam", "reference", [randn(4, 6)], [[randn(4, 6, seed=1)]]))
    expected = [np.asarray(w) for w in optimizer.get_weights()]
    assert all(w.flags.c_contiguous and w.dtype.isnative for w in expected)
    given = [change(w) for w in expected]
    optimizer.set_weights([w * 0 for w in expected])
    optimizer.set_weights(given)
    assert_same([bits(w) for w in optimizer.weights], [bits(w) for w in expected])


@pytest.mark.parametrize("executor", EXECUTORS)
def test_B33_shared_mapped_and_read_only_memory(executor: str, tmp_path: Path) -> None:
    expected = outcome("adam", "reference", [randn(9)], [[randn(9, seed=1)]])
    mapped = torch.from_file(str(tmp_path / "weights"), shared=True, size=9, dtype=torch.float32)
    for variable in (torch.zeros(9).share_memory_(), mapped, torch.from_numpy(np.zeros(9, np.float32))):
        variable.copy_(randn(9))
        gradient = randn(9, seed=1).numpy()
        gradient.flags.writeable = False
        optimizer = build("adam", executor)
        optimizer.apply_gradients([(gradient, variable)])
        assert_same(state(optimizer, [variable]), expected)
    assert np.array_equal(np.fromfile(tmp_path / "weights", np.uint32), expected[0])
