"""The command line, in process: exit codes, tables, the picture, and what happens where something is wrong."""

import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from matplotlib import colors, image
from support import after_each
from terminal import Result, Run

import fused_kopt
from fused_kopt import cli, execute
from fused_kopt.commands import common, demo, variants, verify
from fused_kopt.kernels import launch
from fused_kopt.optimizers import registry

CPU = torch.device("cpu")
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
EIGHT = ("sgd", "rmsprop", "adam", "adadelta", "adagrad", "adamax", "nadam", "ftrl")


@pytest.fixture
def sabotage(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton executor puts one element of the third variable one unit in the last place off."""

    def damage(update: Any) -> None:
        if len(update.variables) > 2:  # not the known-answer test of a new kernel
            variable = update.variables[2]
            variable.view(-1).view(INTEGERS[variable.element_size()])[5] += 1

    after_each(monkeypatch, damage)


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "why_not_triton", lambda: "pip install 'fused-kopt[triton]'")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.usefixtures("no_triton")
def test_without_triton(run: Run, tmp_path: Path) -> None:
    why = "pip install 'fused-kopt[triton]'"
    code, out, err = run("verify")
    assert (code, out) == (2, "")
    assert "nothing to compare with the reference" in err
    assert why in err
    assert run("demo", "--executor", "triton", "--out", tmp_path) == Result(2, "", f"fused-kopt: --executor triton: {why}\n")
    assert run("demo", "--optimizers", "sgd", "--epochs", 1, "--out", tmp_path).rows[0][-1] == "reference"


def test_verify(run: Run) -> None:
    result = run("verify", "--optimizer", "sgd", "--steps", "2")
    variants, dtypes, executors, results, tensors, ulps = zip(*result.rows, strict=True)
    assert result.code == 0
    assert variants == ("sgd", "sgd momentum", "sgd nesterov") * 4
    assert dtypes == ("float32",) * 3 + ("float64",) * 3 + ("bfloat16",) * 3 + ("float16",) * 3
    assert (set(executors), set(results), set(ulps)) == ({"triton"}, {"equal"}, {"0"})
    assert tensors == ("12", "24", "24") * 4  # 2 steps of 6 variables, without and with a slot
    assert "12 of 12 equal bit for bit, 0 within 2 ulp, 0 failed" in result.out


def test_verify_covers_every_rule() -> None:
    made = {name: make() for name, make in variants.VARIANTS.items()}
    own = {cls for cls in registry._REGISTRY.values() if cls.__module__.startswith("fused_kopt.optimizers.")}
    assert {type(optimizer) for optimizer in made.values()} == own
    assert all(type(optimizer).__name__.lower() == name.split()[0] for name, optimizer in made.items())
    # dense gradients, and sparse ones of vectors and matrices
    reached = {rule for o in made.values() for rule in (o.rule(), o.sparse_rule(1), o.sparse_rule(2))}
    modules = {sys.modules[type(optimizer).__module__] for optimizer in made.values()}
    public = {f for m in modules for n, f in vars(m).items() if n[0] != "_" and getattr(f, "__code__", None) and f.__module__ == m.__name__}
    assert reached == {f for f in public if f.__code__.co_varnames[: f.__code__.co_argcount] == ("p", "g", "slots", "s")}


@pytest.mark.parametrize("dtype", variants.DTYPES.values(), ids=str)
def test_gradients_have_many_magnitudes_and_special_values(dtype: torch.dtype) -> None:
    first, second = verify._gradients(dtype, CPU, 2)
    sizes = first[-1][first[-1] != 0].abs().double().log10()
    special = second[2].double()
    assert [g.is_sparse for g in (*first, *second)] == [False] * 9 + [True, True, False]
    assert sizes.max() - sizes.min() > 8
    assert bool(special.isnan().any() and special.isposinf().any() and special.isneginf().any())
    assert ((special != 0) & (special.abs() < torch.finfo(dtype).tiny)).any()
    assert all(g.to_dense().isfinite().all() for step in (first, second) for g in step if g is not second[2])


@pytest.mark.usefixtures("sabotage")
def test_verify_finds_one_wrong_bit(run: Run) -> None:
    result = run("verify", "--optimizer", "ftrl", "--steps", "1")
    assert result.code == 1
    found = {row[0]: (row[3], row[5]) for row in result.rows}
    assert found["ftrl"] == found["ftrl shrinkage"] == ("DIFFERS", "1")
    assert found["ftrl power"] == found["ftrl power shrinkage"] == ("within 2 ulp", "1")
    assert "0 of 16 equal bit for bit, 8 within 2 ulp, 8 failed" in result.out


def test_verify_reports_an_executor_that_raises(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "bind", Mock(side_effect=RuntimeError("no kernel [here]")))
    result = run("verify", "--optimizer", "lion", "--device", "cpu")
    assert result.code == 1
    assert {row[3] for row in result.rows} == {"error"}
    assert result.out.count("no kernel [here]") == 1


def test_demo_trains_all_eight(run: Run, tmp_path: Path) -> None:
    result = run("demo", "--executor", "reference", "--out", tmp_path / "new" / "folder")
    names, _, accuracies, _, launches, verified, executors = zip(*result.rows, strict=True)
    assert result.code == 0
    assert names == EIGHT
    assert min(float(accuracy.removesuffix("%")) for accuracy in accuracies) >= 90
    assert (set(launches), set(verified), set(executors)) == ({"0"}, {"-"}, {"reference"})
    picture = image.imread(tmp_path / "new" / "folder" / "fused_kopt_demo.png")
    assert picture.shape[:2] == (715, 1170)
    for index in range(8):  # every curve is there
        assert (np.abs(picture[..., :3] - colors.to_rgb(f"C{index}")).max(axis=2) < 0.02).sum() > 300


def test_demo_runs_the_kernel_and_verifies(run: Run, tmp_path: Path) -> None:
    result = run("demo", "--optimizers", "RMSprop", "--epochs", 5, "--out", tmp_path)
    ((name, rate, accuracy, speed, launches, verified, executor),) = result.rows
    assert result.code == 0
    assert (name, rate, launches, verified, executor) == ("rmsprop", "0.002", "1", "5", "triton")
    assert (float(accuracy.removesuffix("%")) >= 90, int(speed) > 0) == (True, True)


def test_demo_fails_where_an_optimizer_does_not_train(run: Run, tmp_path: Path) -> None:
    result = run("demo", "--optimizers", "sgd,adagrad", "--epochs", 1, "--executor", "reference", "--out", tmp_path)
    assert result.code == 1
    assert "Failed to reach a test accuracy of 90%: sgd, adagrad" in result.out


@pytest.mark.usefixtures("sabotage")
def test_demo_fails_where_a_step_differs(run: Run, tmp_path: Path) -> None:
    result = run("demo", "--optimizers", "sgd", "--epochs", 1, "--executor", "triton", "--out", tmp_path)
    assert result.code == 1
    assert "sgd failed verification" in result.out.splitlines()[0]
    assert "variable 2 variable: 1 ulp" in result.out
    assert not list(tmp_path.iterdir())


def test_demo_repeats_itself_and_leaves_torch_as_it_was() -> None:
    threads, state, data = torch.get_num_threads(), torch.get_rng_state(), demo.digits(CPU)
    with common.one_thread():
        settings = [demo.Settings(epochs=1, seed=seed) for seed in (3, 3, 4)]
        first, again, other = (demo.train("adam", s, "reference", data, lambda: None).losses for s in settings)
    assert first == again != other
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("missing", [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")])
def test_demo_names_the_missing_extra(missing: tuple[str, str], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None if name == missing[0] else find(name, package))
    assert run("demo") == Result(2, "", f"fused-kopt: the demo needs {missing[1]}: pip install 'fused-kopt[demo]'\n")


def test_demo_refuses_a_directory_it_cannot_make(run: Run) -> None:
    result = run("demo", "--out", __file__)
    assert result.code == 2
    assert result.err.startswith("fused-kopt: --out: ")


ARGUMENTS = {
    "--help": (0, "usage: fused-kopt"),
    "demo --help": (0, "usage: fused-kopt demo"),
    "verify --help": (0, "usage: fused-kopt verify"),
    "": (2, "required"),
    "train": (2, "invalid choice: 'train'"),
    "demo --epochs 0": (2, "must be at least 1. Received: 0."),
    "demo --optimizers adam,lamb": (2, f"unknown: 'lamb'. Choose from {','.join(EIGHT)}."),
    "demo --executor cuda": (2, "invalid choice: 'cuda'"),
    "verify --device tpu": (2, "invalid choice: 'tpu'"),
    "verify --optimizer lamb": (2, "invalid choice: 'lamb'"),
    "doctor --steps 1": (2, "unrecognized arguments"),
}


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_arguments(arguments: str, run: Run) -> None:
    result, (code, text) = run(*arguments.split()), ARGUMENTS[arguments]
    assert result.code == code
    assert text in (result.err if code else result.out)


def test_as_a_process() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="fused-kopt")
    assert script.load() is cli.main
    command = [sys.executable, "-W", "error", "-m", "fused_kopt.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"fused-kopt {fused_kopt.__version__}\n", "")
