"""The measurement of steps on DTensors: that it measures what it says, and keeps it."""

import dataclasses
import statistics
from pathlib import Path

import pytest
import torch

from perf import dtensors, rows


def test_steps_cost_less_than_torchs(tmp_path: Path) -> None:
    """The ratio is 6 to 7 on a quiet machine; 2 leaves room for any neighbour. One rank, in this process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        taken = dtensors.measure(200, 15)
    finally:
        torch.distributed.destroy_process_group()
    ours, fused = (statistics.median(taken[name]) for name in dtensors.OPTIMIZERS)
    assert {len(times) for times in taken.values()} == {15}
    assert fused > 2 * ours


@pytest.mark.slow
def test_ranks_measure_and_rows_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dtensors.main(["--counts", "4", "--repetitions", "5", "--out", str(tmp_path), "--commit", "abc"]) == 0
    (path,) = tmp_path.glob("*.csv")
    found = rows.read_as(dtensors.Row, path)
    assert [(row.optimizer, row.ranks, row.tensors, row.elements, row.repetitions) for row in found] == [
        ("fused_kopt", 2, 4, 2 * 17 * 33, 5),
        ("torch-fused", 2, 4, 2 * 17 * 33, 5),
    ]
    assert "| 4 | 2 |" in capsys.readouterr().out


def test_the_last_run_is_shown(tmp_path: Path) -> None:
    provenance = rows.provenance(torch.device("cpu"), "abc", 1e9)
    old = [dtensors.row(name, 2, 200, [4e-3 * k], provenance) for k, name in enumerate(dtensors.OPTIMIZERS, 1)]
    new = [dataclasses.replace(row, date="2030-01-01", tensors=8, seconds=row.seconds / 2 ** (k + 1)) for k, row in enumerate(old)]
    rows.append(tmp_path, [*old, *new])
    assert rows.read_as(dtensors.Row, next(tmp_path.glob("*.csv"))) == [*old, *new]
    built = dtensors.build(tmp_path)["dtensors"]
    assert built.endswith(
        "| DTensors | ranks | fused_kopt | torch fused | takes |\n| --- | --- | --- | --- | --- |\n| 8 | 2 | 2 ms | 2 ms | 1.0x |"
    )
    assert dtensors.build(tmp_path / "nothing")["dtensors"] == "No rows yet."
