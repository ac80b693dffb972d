"""`fused-kopt convert` and `fused-kopt inspect`: tables, files, exit codes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from golden.moves import FILES, VARIABLES
from terminal import Run

import fused_kopt
from fused_kopt import checkpoint

ADAM = FILES / "move_h5_adam.h5"


def build() -> list[tuple[str, torch.Tensor]]:
    """What --model names."""
    return [(name, torch.zeros(shape)) for name, shape in VARIABLES.items()]


def wrong() -> list[tuple[str, torch.Tensor]]:
    return [*build()[:3], ("second/bias", torch.zeros(9))]


def module() -> torch.nn.Module:
    return torch.nn.Linear(2, 2)


def torch_file(folder: Path, with_names: bool = False) -> Path:
    pairs = build()
    optimizer = torch.optim.Adam(pairs if with_names else [v for _, v in pairs])
    for _, variable in pairs:
        variable.grad = torch.ones_like(variable)
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "run.pt")
    return folder / "run.pt"


def test_from_tensorflow_to_ours(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "run.safetensors"
    result = run("convert", ADAM, target, "--model", "test_checkpoint_cli:build")
    assert result.code == 0
    assert ["m of first/kernel", "(4, 3)", "(4, 3)", ""] in result.rows
    assert "Adam of OptimizerV2 after 9 steps, 4 variables: written to" in result.out
    named, moved = build(), checkpoint.read(target)
    optimizer = checkpoint.new_optimizer(moved)
    checkpoint.load(target, optimizer, named)
    assert int(optimizer.iterations) == 9


def test_a_dry_run_writes_nothing(run: Run, tmp_path: Path) -> None:
    result = run("convert", ADAM, tmp_path / "run.pt", "--dry-run")
    assert result.code == 0
    assert "would be written as torch" in result.out
    assert list(tmp_path.iterdir()) == []


def test_names_in_order_and_renames(run: Run, tmp_path: Path) -> None:
    source = torch_file(tmp_path)
    assert run("convert", source, tmp_path / "a.safetensors", "--names", "a,b,c,d").code == 0
    assert list(checkpoint.read(tmp_path / "a.safetensors").slots) == ["a", "b", "c", "d"]
    assert run("convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--names", "a=x.weight").code == 0
    assert list(checkpoint.read(tmp_path / "b.safetensors").slots) == ["x.weight", "b", "c", "d"]


def test_get_weights_as_npz(run: Run, tmp_path: Path) -> None:
    optimizer, pairs = fused_kopt.Adam(), build()
    optimizer.apply_gradients([(torch.ones_like(v), v) for _, v in pairs])
    np.savez(tmp_path / "w.npz", *optimizer.get_weights())
    names = ",".join(VARIABLES)
    assert run("convert", tmp_path / "w.npz", tmp_path / "w.pt", "--optimizer", "Adam", "--names", names).code == 0
    assert run("convert", tmp_path / "w.pt", tmp_path / "again.npz").code == 0
    with np.load(tmp_path / "w.npz") as first, np.load(tmp_path / "again.npz") as second:
        assert first.files == second.files
        assert all(np.array_equal(first[name], second[name]) for name in first.files)


def test_inspect(run: Run, tmp_path: Path) -> None:
    result = run("inspect", ADAM)
    assert result.code == 0
    assert ["iterations", "9"] in result.rows
    found = {tuple(row[:3]) for row in result.rows if len(row) == 4}
    assert {("first/kernel", "m", "float32 (4, 3)"), ("second/bias", "(its value)", "float32 (2,)")} <= found
    assert ("#3", "m", "float32 (2,)") in {tuple(row[:3]) for row in run("inspect", torch_file(tmp_path)).rows if len(row) == 4}


REFUSED = {
    "another shape": (["--model", "test_checkpoint_cli:wrong"], "m of second/bias"),
    "no module": (["--model", "nowhere_to_be_found:build"], "importable from here"),
    "no function": (["--model", "test_checkpoint_cli:absent"], "absent"),
    "half names": (["--names", "a=b,c"], "not both"),
    "unknown names": (["--names", "a=b"], "No variable is called 'a'"),
    "an unknown target": (["--to", "h5"], "does not exist"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_refusals(row: str, run: Run, tmp_path: Path) -> None:
    options, message = REFUSED[row]
    result = run("convert", ADAM, tmp_path / "run.safetensors", *options)
    assert result.code == 2
    assert message in result.err + result.out
    assert list(tmp_path.iterdir()) == []


def test_a_module_has_no_order_of_keras(run: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", np.int64(0))
    result = run("convert", tmp_path / "w.npz", tmp_path / "w.pt", "--optimizer", "sgd", "--model", "test_checkpoint_cli:module")
    assert result.code == 2
    assert "orders its own" in result.err


def test_inspect_refuses(run: Run, tmp_path: Path) -> None:
    assert run("inspect", tmp_path / "absent.h5").code == 2
    assert run("inspect", tmp_path / "absent.xyz").code == 2
