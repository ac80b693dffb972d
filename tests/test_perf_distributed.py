"""`python -m perf.distributed`: what is counted, fitted and planned, on one rank here and on two started ones."""

import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fused_kopt.commands import division
from perf import rows, shares, wire
from perf.wire import Line
from perf.workloads import Sampled

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch.distributed.optim scripts functions at its import
    from perf import distributed, sharers

# FSDP2 and ZeroRedundancyOptimizer touch deprecated parts of torch
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
CPU = torch.device("cpu")
SHAPES = [(100, 64), (64,), (30, 10), (7,)]
ELEMENTS = 6771
PROVENANCE = rows.Provenance("2026-01-01T00:00:00+00:00", "abc", "Some CPU, 2 cores", 2, "2.13.0", "none", "3.11", "0.1.0", "none", 10.0)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("made", sharers.SHARERS, ids=lambda made: made.name)
def test_all_ways_step(made: type[sharers.Sharer]) -> None:
    sharer = made(SHAPES, CPU)
    before = [v.detach().clone() for v in sharer.variables]
    for _ in range(3):
        sharer.prepare()
        sharer.step()
    state = sharer.state_bytes()
    padding = 8 * 64 * len(SHAPES)
    assert 8 * ELEMENTS <= state <= 8 * ELEMENTS + padding
    parameters: list[Any] = list(sharer.model.parameters()) if isinstance(sharer, sharers.FullySharded) else sharer.variables
    after = [p.full_tensor() if isinstance(p, dist.tensor.DTensor) else p for p in parameters]
    gradients = sharers.drawn(SHAPES, CPU, 1)
    for old, new, gradient in zip(before, after, gradients, strict=True):
        # Adam with one and the same gradient moves by the rate, 0.001, against its sign; epsilon matters where it is small
        moved = (new.detach() - old)[gradient.abs() > 0.01]
        assert torch.allclose(moved, -0.003 * gradient[gradient.abs() > 0.01].sign(), rtol=1e-3)


@pytest.mark.usefixtures("one_rank")
def test_collectives_are_counted() -> None:
    flat, other = torch.zeros(1024), torch.zeros(1024)
    with wire.Counted(4) as counted:  # as if there were four ranks
        dist.all_reduce(flat)
        dist.broadcast(flat, 0)
        dist.all_to_all_single(flat, other)
        dist.barrier()
    assert counted.calls == {"allreduce_": 1, "broadcast_": 1, "alltoall_base_": 1, "barrier": 1}
    assert counted.sent == (2 + 1 + 1) * 4096 * 3 // 4


def test_a_line_is_found_through_its_points() -> None:
    line = Line(2e-4, 1e9)
    points = [(float(size), line.latency + size / line.rate) for size in wire.SIZES]
    assert wire.fitted(points) == pytest.approx(line)
    assert wire.fitted([(size, 1e-9 * size - 1e-7) for size, _ in points]).latency == 0.0  # none is negative


def found(seconds: float) -> dict[str, Any]:
    lines = {kind: Line(1e-3, 1e9) for kind in wire.KINDS}
    names = [made.name for made in sharers.SHARERS]
    return {"found": {name: {"seconds": [seconds] * 5, "sent": 100, "wire": 110.0, "state": 50} for name in names}, "lines": lines}


def test_plans_by_hand() -> None:
    setting = shares.Setting(PROVENANCE, 2, "W", Sampled("all", SHAPES), "gloo", 0.5)
    made = {row.provider: row for row in shares.rows(found(0.1), {1: found(0.2), 2: found(0.1)}, setting)}
    reduced, sharded = made["fused_kopt all-reduce"], made["fused_kopt sharded"]
    flat, share = 6400 + 64 + 320 + 64, (6848 + 127) // 128 * 64
    assert (reduced.planned_state, sharded.planned_state) == (8 * flat, 8 * share)
    assert reduced.planned_bytes == 4 * flat + 32  # of a ring of two, twice a half
    assert sharded.planned_bytes == 4 * 2 * share * 3 // 2 + 32  # gloo's reduce-scatter is an all-reduce
    moved = 28 * ELEMENTS
    assert reduced.planned_seconds == rows.rounded(0.1 * (moved + 8 * ELEMENTS) / moved + 2e-3 + (4 * flat + 32) / 1e9)
    mine = division.update(shares.job(setting.sample, 2, "1")).moved
    assert sharded.planned_seconds == rows.rounded(0.1 * (mine + 8 * ELEMENTS) / moved + 3e-3 + (8 * share + 32) / 1e9)
    assert made["FSDP2, torch fused"].planned_seconds == 0
    assert made["fused_kopt alone"].state_ideal == 2 * sharded.state_ideal == 8 * ELEMENTS


def test_rows_and_tables(tmp_path: Path) -> None:
    settings = [shares.Setting(PROVENANCE, n, "W", Sampled("all", SHAPES), "gloo", 0.5) for n in (1, 2)]
    made = [row for setting in settings for row in shares.rows(found(0.1), {1: found(0.2), 2: found(0.1)}, setting)]
    rows.append(tmp_path, [replace(row, date="2025-01-01T00:00:00+00:00", seconds=9.0) for row in made] + made)
    assert shares.read(tmp_path / "some-cpu-2-cores.csv")[len(made) :] == made
    built = shares.build(tmp_path)
    assert "9 s" not in built["distributed"]
    assert "| fused_kopt sharded | 100 ms (100 ms); 0 KiB; 0 KiB | 100 ms (100 ms); 0 KiB; 0 KiB |" in built["distributed"]
    assert len(re.findall(r"^\| fused_kopt", built["plan"], re.MULTILINE)) == 2
    assert shares.build(tmp_path / "none") == {"distributed": "No rows yet.", "plan": "No rows yet."}


@pytest.mark.slow
def test_the_command_measures_two_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--ranks", "2", "--workload", "1000x64", "--sample", "1", "--seconds", "0", "--commit", "abc"]
    assert distributed.main([*options, "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.iterdir()
    made = {(row.provider, row.ranks): row for row in shares.read(file)}
    assert {name for name, _ in made} == {way.name for way in sharers.SHARERS}
    sharded = made["fused_kopt sharded", 2]
    assert sharded.planned_state == sharded.state_bytes == 8 * 64_000 // 2
    # ranks also agree on the step: 32 bytes each
    assert 4 * 64_000 <= sharded.sent_bytes <= 4 * 64_000 + 64
    assert sharded.planned_bytes == 4 * 64_000 * 3 // 2 + 32
    assert made["FSDP2, fused_kopt", 2].state_bytes == sharded.state_bytes
    assert "2 ranks  fused_kopt sharded" in capsys.readouterr().out
