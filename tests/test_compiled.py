"""The compiled executor (C++) against the reference, bit for bit; what it compiles, when, and where it keeps it."""

import copy
import ctypes
import platform
import re
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import support
import torch
import variants
from torch import Tensor

import fused_kopt
from fused_kopt import execute, layout, prepare, verification
from fused_kopt.execute import Update
from fused_kopt.kernels import cpp, cpp_build, cpp_launch
from fused_kopt.optimizer import Optimizer

BLOCK = cpp.BLOCK
SHAPES = [(), (0,), (7,), (3, 5), (2 * BLOCK + 17,), (1,), (2, 0), (BLOCK - 1,), (129, 131), (BLOCK,), (BLOCK + 1,)]


def variables(dtype: torch.dtype) -> list[Tensor]:
    found = [support.randn(*shape, seed=i).to(dtype) for i, shape in enumerate(SHAPES)]
    found[8] = found[8].t().contiguous().t()  # dense, in another order
    found[7] = torch.cat([found[7][:1], found[7]])[1:]  # unaligned
    found[3] = torch.stack([found[3]] * 2, -1)[..., 0]  # gaps between its elements
    return found


def gradients(step: int, dtype: torch.dtype) -> list[Tensor | None]:
    found: list[Tensor | None] = [support.randn(*shape, seed=100 * step + i).to(dtype) for i, shape in enumerate(SHAPES)]
    special = torch.tensor([0.0, -0.0, 1e-45, 1e-39, 6e-8, 65504.0, float("inf"), -float("inf"), float("nan")])
    found[8].view(-1)[: len(special)] = special.to(dtype)  # type: ignore[union-attr]
    found[(3 * step) % len(SHAPES)] = None
    return found


def same(optimizer: Optimizer, dtype: torch.dtype, gradient_dtype: torch.dtype) -> None:
    """Three free-running steps of two copies of an optimizer."""
    states = []
    for name in ("reference", "compiled"):
        twin, mine = copy.deepcopy(optimizer), variables(dtype)
        twin.executor = name  # type: ignore[assignment]
        for step in range(3):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                twin.apply_gradients(zip(gradients(step, gradient_dtype), mine, strict=True))
        states.append(support.state(twin, mine))
    support.assert_same(*states, type(optimizer).__name__)


@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
@pytest.mark.parametrize("optimizer", [v for v in variants.variants() if v.exact], ids=lambda o: o.rule().__name__)
def test_every_rule(optimizer: Optimizer, dtype: torch.dtype) -> None:
    same(optimizer, dtype, dtype)


@pytest.mark.parametrize("gradient", support.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
def test_gradients_of_another_dtype(dtype: torch.dtype, gradient: torch.dtype) -> None:
    same(fused_kopt.Adam(0.01), dtype, gradient)


def test_a_general_power_stays_within_its_bound() -> None:
    optimizer = fused_kopt.Ftrl(0.1, learning_rate_power=-0.4)
    pairs = [(support.randn(5000, seed=1), support.randn(5000))]
    report = verification.verify(optimizer, pairs, "compiled")
    assert report.passes(exact=False)
    assert max(c.max_ulp for c in report.comparisons) <= 2**12  # the difference of two powers magnifies 2 ulp


@pytest.mark.parametrize("options", [{"clipvalue": 0.5}, {"clipnorm": 0.7}, {"clipvalue": 0.9, "global_clipnorm": 2.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clipping(options: dict[str, float], dtype: torch.dtype) -> None:
    same(fused_kopt.SGD(0.1, momentum=0.9, **options), dtype, dtype)


class One(NamedTuple):
    one: float


def _copy(p: Any, g: Any, slots: Any, s: Any) -> Any:
    return g * s.one, ()


@pytest.mark.parametrize("prefix", ["", "#undef __F16C__\n"], ids=["instructions", "integers"])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_and_a_sample_of_every_rounding(half: torch.dtype, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 65,536 patterns decode as torch decodes them; of the 2^32 float32 patterns every 1,021st encodes as torch encodes it."""
    source = cpp.update_source
    monkeypatch.setattr(cpp, "update_source", lambda *arguments: prefix + source(*arguments))
    monkeypatch.setattr(cpp_launch, "kernel", cpp_launch.kernel.__wrapped__)

    def through(values: Tensor, dtype: torch.dtype) -> Tensor:
        optimizer = fused_kopt.SGD()
        variable = torch.zeros(len(values), dtype=dtype)
        optimizer.build([variable])
        (bucket,) = optimizer._state.buckets.values()
        execute.run(Update(bucket, [variable], [values], (), _copy, One(1.0)), "compiled")
        return variable

    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(half)
    support.assert_same([support.bits(patterns.float())], [support.bits(through(patterns, torch.float32))])
    wide = torch.arange(-(2**31), 2**31, 1021).to(torch.int32).view(torch.float32)
    support.assert_same([support.bits(wide.to(half))], [support.bits(through(wide, half))])


def test_a_wrong_rule_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    support.after_each(monkeypatch, lambda update: update.variables[0].view(-1)[-1:].mul_(1 + 2**-22))
    verification._known_answer.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="known-answer test"):
            fused_kopt.SGD(0.1, executor="compiled").apply_gradients([(torch.ones(3), torch.ones(3))])
    finally:
        verification._known_answer.cache_clear()  # other tests shall not inherit the verdict


@pytest.fixture
def frozen() -> Iterator[None]:
    """Any compilation is an error."""
    fused_kopt.SGD(0.1, executor="compiled").apply_gradients([(torch.ones(3), torch.ones(3))])
    before = fused_kopt.stats().compilations
    yield
    assert fused_kopt.stats().compilations == before


def test_nothing_compiles_again(frozen: None) -> None:
    """Other shapes, addresses, rates and counts run the same kernel, one call a step."""
    optimizer = fused_kopt.SGD(0.5, executor="compiled")
    for step, size in enumerate((5, 1, 40_000, 100_003)):
        optimizer.learning_rate = 0.1 * (step + 1)
        variable = torch.zeros(size)
        with support.launches(1):
            optimizer.apply_gradients([(torch.ones(size), variable)])
        assert torch.equal(variable, torch.full((size,), -float(optimizer.learning_rate)))


def test_the_number_of_threads_does_not_change_bits() -> None:
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(support.outcome("nadam", "compiled", [support.randn(70_001)], [[support.randn(70_001, seed=1)]] * 3))
    finally:
        torch.set_num_threads(threads)
    support.assert_same(results[0], results[1])
    support.assert_same(results[0], results[2])


def assembly(optimizer: Optimizer, dtype: torch.dtype) -> str:
    text = cpp.update_source(optimizer.rule(), prepare.scale_and_clip, *_form(optimizer, dtype), (dtype, dtype))
    path = cpp_build.compiler()
    assert path
    flags = [flag for flag in cpp_build.FLAGS if flag != "-march=native"] + ["-march=x86-64-v3", "-fopenmp-simd"]  # AVX2 and fma
    return subprocess.run([path, *flags, "-S", "-x", "c++", "-", "-o", "-"], input=text, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86 assembly")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("optimizer", [v for v in variants.variants() if v.exact], ids=lambda o: o.rule().__name__)
def test_machine_code(optimizer: Optimizer, dtype: torch.dtype) -> None:
    """Every rule vectorises, and nothing is contracted."""
    code = assembly(optimizer, dtype)
    assert not re.search(r"\bvfn?m(?:add|sub)", code)
    assert re.search(r"\bvmulps\s.*%ymm", code)
    if "std::sqrt" in cpp.update_source(optimizer.rule(), prepare.keep, *_form(optimizer, dtype), (dtype, dtype)):
        assert re.search(r"\bvsqrtps\s.*%ymm", code)


def _form(optimizer: Optimizer, dtype: torch.dtype) -> tuple[Any, cpp.Planes]:
    """The class of its scalars, and its slots' dtypes."""
    planes = ((layout.compute_dtype(dtype), 1),) * sum(map(len, optimizer.slot_groups()))
    return type(optimizer.scalars(fused_kopt.hyperparameters.Step(0, torch.float32))), planes


def test_a_rule_must_not_branch() -> None:
    def branching(p: Any, g: Any, slots: Any, s: Any) -> Any:
        return (p if p > g else g), ()

    with pytest.raises(TypeError, match="branch-free"):
        cpp.update_source(branching, prepare.keep, One, (), (torch.float32, torch.float32))


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_build.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"executor='compiled' is not available: no C\+\+ compiler"):
        fused_kopt.SGD(executor="compiled").apply_gradients([(torch.ones(2), torch.ones(2))])
    execute.warn_fallback.cache_clear()
    with pytest.warns(RuntimeWarning, match="falls back to the reference"):
        assert execute.choose("auto", torch.device("cpu"), execute.WORTH_COMPILING) == "reference"


def test_auto_compiles_where_it_pays() -> None:
    cpu = torch.device("cpu")
    assert execute.choose("auto", cpu, execute.WORTH_COMPILING - 1) == "reference"
    assert execute.choose("auto", cpu, execute.WORTH_COMPILING) == "compiled"
    assert execute.choose("auto", cpu, 16, 16) == "compiled"  # many small tensors: the reference takes them one by one
    with pytest.raises(RuntimeError, match="not on cuda"):
        execute.choose("compiled", torch.device("cuda"))


SOURCE = 'extern "C" int answer() { return 42; }'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a new user."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    return tmp_path / ".cache/fused_kopt"


def test_the_cache_serves_the_next_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpp_build.load(SOURCE).answer() == 42
    assert len(list(folder.iterdir())) == 1
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(cpp_build, "_build", lambda *_: pytest.fail("built again"))
    assert cpp_build.load(SOURCE).answer() == 42


def test_a_damaged_file_is_built_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda path: None)  # built, but not loaded: the loader knows a path for ever
        cpp_build.load(SOURCE)
    (library,) = folder.iterdir()
    library.write_bytes(b"\x7fELF damaged")
    assert cpp_build.load(SOURCE).answer() == 42
    assert library.stat().st_size > 1000


def test_a_folder_that_others_can_write_is_not_used(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert cpp_build.cache_folder() != folder
    assert isinstance(cpp_build.load(SOURCE), ctypes.CDLL)
    assert not list(folder.iterdir())


def test_what_the_compiler_says_is_passed_on(folder: Path) -> None:
    with pytest.raises(cpp_build.BuildError, match="expected"):
        cpp_build.load("int f( {")


def test_torchs_threads_are_used(folder: Path) -> None:
    """The library brings no OpenMP runtime of its own: two would compete for the cores."""
    cpp_build.load(cpp.update_source(_copy, prepare.keep, One, (), (torch.float32, torch.float32)))
    (library,) = folder.iterdir()
    assert b"GOMP_parallel" in library.read_bytes()
    assert b"libgomp" not in library.read_bytes()
