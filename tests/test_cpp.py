"""The C++ executor's surroundings: whose library is loaded, and on how many threads it runs."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fused_kopt import SGD, norms, prepare
from fused_kopt.execute import Update
from fused_kopt.kernels import cpp_build, cpp_launch
from fused_kopt.kernels.cpp_op import Value
from fused_kopt.optimizers.sgd import Scalars, sgd

SOURCE = 'extern "C" int answer() { return 42; }'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a new user."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    return tmp_path / ".cache/fused_kopt"


CHANGES: dict[str, Any] = {
    "FLAGS": (*cpp_build.FLAGS, "-DOTHER"),
    "_version": lambda path: "g++ 99.0",
    "_machine": lambda: "a machine that shares the disk",
    "compiler": lambda: str(Path(cpp_build.shutil.which("c++") or "").resolve()),
}


def test_a_library_is_known_by_its_source(folder: Path) -> None:
    assert cpp_build.load(SOURCE).answer() == 42
    assert cpp_build.load(SOURCE.replace("42", "43")).answer() == 43
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("name", CHANGES)
def test_a_library_is_known_by_all_that_decides_its_code(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpp_build.load(SOURCE)
    before = set(folder.iterdir())
    monkeypatch.setattr(cpp_build, name, CHANGES[name])
    cpp_build.load(SOURCE)
    assert len(set(folder.iterdir()) - before) == 1


def test_a_folder_of_another_user_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpp_build.cache_folder() == folder
    monkeypatch.setattr(cpp_build.os, "getuid", lambda: 12_345)
    assert cpp_build.cache_folder() != folder


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of threads of every call, none of which does anything; torch has three."""
    found: list[int] = []
    before = torch.get_num_threads()

    def kernel(*arguments: Any) -> Callable[..., None]:
        return lambda *call: found.append(call[-1])

    monkeypatch.setattr(cpp_launch, "kernel", kernel)
    monkeypatch.setattr(cpp_launch, "norm_kernels", lambda *arguments: (kernel(), lambda *call: None))
    torch.set_num_threads(3)
    yield found
    torch.set_num_threads(before)


@pytest.mark.parametrize(("size", "expected"), [(cpp_launch.ONE_THREAD, 1), (cpp_launch.ONE_THREAD + 1, 3)])
def test_the_callers_threads_are_used_where_they_pay(size: int, expected: int, threads: list[int]) -> None:
    variable = torch.zeros(size)
    optimizer = SGD()
    optimizer.build([variable])
    (bucket,) = optimizer._state.buckets.values()
    update = Update(bucket, [variable], [variable.clone()], (), sgd, Scalars(0.5, 0.0))
    cpp_launch.bind(update, prepare.keep)(update.scalars, None)
    row = torch.tensor(prepare.NEUTRAL_FACTORS)
    norms.Norms([size], (torch.float32, torch.float32), torch.device("cpu")).squares(np.array([variable.data_ptr()]), row, "compiled")
    assert threads == [expected] * 2


def test_numbers_on_either_side() -> None:
    """A rule may put a Python number left or right of an operator; it is written in the compute type."""
    body: list[str] = []
    x = Value("x", body)
    for value in (1.5 - x, x - 1.5, 1.5 + x, x + 1.5, 2 * x, x * 2, -x):
        assert isinstance(value, Value)
    assert [line.partition(" = ")[2] for line in body] == [
        "C(1.5) - x;", "x - C(1.5);", "C(1.5) + x;", "x + C(1.5);", "C(2.0) * x;", "x * C(2.0);", "-x;"
    ]  # fmt: skip
