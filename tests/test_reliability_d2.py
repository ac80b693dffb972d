"""Catalogue D, continued: the compiled path, driven on the CPU by a driver that compiles for a GPU and launches nothing."""

import hashlib
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import offline
import pytest
import torch
from support import SOME_RULES, after_each, build, launches, python, randn
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import fused_kopt
from fused_kopt import execute, verification
from fused_kopt.buffers import Bucket
from fused_kopt.execute import Update
from fused_kopt.kernels import launch
from fused_kopt.kernels.update import update_bucket
from fused_kopt.optimizers.sgd import Scalars, momentum
from fused_kopt.slots import Slot

DEVICE = 99  # no other test's kernels are cached for it


class Driver:
    """Triton's driver for an H100 that is not there: kernels are compiled and `launched` is noted."""

    def __init__(self) -> None:
        self.utils = self
        self.kernels: list[Any] = []
        self.grids: list[tuple[int, ...]] = []

    def get_current_device(self) -> int:
        return DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}

    def load_binary(self, *arguments: Any) -> tuple[Any, ...]:
        return object(), None, 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        self.kernels.append(metadata)
        return lambda *arguments: self.grids.append(arguments[:3])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Driver]:
    """Tensors on the CPU take the compiled path, with a cold disk cache."""
    fake = Driver()
    monkeypatch.setattr(driver, "_active", fake)
    monkeypatch.setattr(launch, "interprets", lambda device: False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    forget()
    yield fake
    forget()


def forget() -> None:
    """As a new process would know no compiled kernel."""
    update_bucket.device_caches.pop(DEVICE, None)
    launch._kernels.clear()


def step(optimizer: Any, variables: list[Tensor], present: range | None = None, shift: int = 0) -> None:
    """A step with fresh gradients, at addresses `shift` elements past an aligned one."""
    pairs = [(torch.ones(v.numel() + shift)[shift:].view(v.shape), v) for v in variables]
    optimizer.apply_gradients([p for i, p in enumerate(pairs) if present is None or i in present])


def test_D11_a_launch_makes_the_device_of_its_tensors_current(gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Tensor] = []
    guard = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: entered.append(tensor) or guard(tensor))
    variable = torch.ones(3)
    step(build("sgd", "triton"), [variable])
    assert [t.device for t in entered] == [variable.device]
    assert gpu.grids == [(1, 1, 1)]


def update_on(device: str) -> Update:
    bucket, variables = Bucket(torch.device("cpu"), torch.float32), [torch.ones(3)]
    bucket.adopt(*bucket.grown(variables, [Slot("momentum")]))
    bucket.device = torch.device(device)
    return Update(bucket, list(variables), list(variables), ("momentum",), momentum, Scalars(0.5, 0.5))


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Asserts that a kernel which fails its trial for a reason is refused by name and replaced once with a warning by `auto`."""
    original = verification._known_answer
    monkeypatch.setattr(verification, "_known_answer", lambda rule, key, *rest: original(rule, (torch.device("cpu"), *key[1:]), *rest))

    def fails(reason: str) -> None:
        original.cache_clear()
        execute.warn_fallback.cache_clear()
        with pytest.raises(
            RuntimeError, match=f"(?s)executor='triton' is not usable on cuda.*{reason}.*Use executor='auto' or 'reference'"
        ):
            verification.proven(update_on("cuda"), "triton", "triton")
        with pytest.warns(RuntimeWarning, match=f"(?s)falls back to the reference executor.*{reason}") as warned:
            assert [verification.proven(update_on("cuda"), "triton", "auto") for _ in range(2)] == ["reference"] * 2
        assert len(warned) == 1
        original.cache_clear()

    return fails


def test_D14_a_kernel_that_gives_the_right_answer_is_used(tried: Any) -> None:
    assert verification.proven(update_on("cuda"), "triton", "triton") == "triton"
    assert verification.proven(update_on("cuda"), "triton", "auto") == "triton"


@pytest.mark.parametrize("element", [0, 1023, 2304])
def test_D14_a_damaged_kernel_fails_its_known_answer(element: int, tried: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def flip(update: Update) -> None:
        update.variables[0].view(torch.int32)[element] ^= 1  # type: ignore[union-attr]

    after_each(monkeypatch, flip)
    tried(r"fails the known-answer test: triton: 1 of 2 tensors differ.*variable 0 variable: 1 ulp.*Clear the compiler's cache directory")


def test_D14_a_kernel_that_does_nothing_fails_its_known_answer(gpu: Driver, tried: Any) -> None:
    tried("fails the known-answer test: triton: 2 of 2 tensors differ")
    assert len(gpu.kernels) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Triton's half-made kernel fails in __del__ too
def test_D15_damaged_metadata_in_the_cache(gpu: Driver, tried: Any, tmp_path: Path) -> None:
    execute.run(update_on("cpu"), "triton")
    (metadata,) = (tmp_path / "cache").rglob("update_bucket.json")
    metadata.write_text(metadata.read_text()[:40])
    forget()
    tried("does not build or run: JSONDecodeError")


def test_D16_a_cache_directory_that_cannot_be_made(gpu: Driver, tried: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/dev/null/cache")
    tried("does not build or run: NotADirectoryError")


@pytest.mark.slow
def test_D17_processes_that_compile_into_one_cache_at_once(tmp_path: Path) -> None:
    code = "import test_reliability_d2 as t; t.compile_momentum()"
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: python(code, TRITON_CACHE_DIR=str(tmp_path / "cache")), range(8)))
    assert len(set(results)) == 1
    assert results[0].startswith("PTX")


def compile_momentum() -> None:
    code = offline.compile_rule(momentum, Scalars, 1, "sm_90", (torch.float32, torch.float32), False)
    print("PTX", hashlib.sha256(code.intermediate.encode()).hexdigest())


def test_D18_no_c_compiler(gpu: Driver, tried: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def launcher(*arguments: Any) -> Any:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(gpu, "launcher_cls", launcher)
    tried("does not build or run: RuntimeError.*Failed to find C compiler")


def test_D19_an_assembler_that_does_not_know_the_device(gpu: Driver, tried: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ptxas = tmp_path / "ptxas"
    ptxas.write_text("#!/bin/sh\n[ $1 = --version ] && echo 'release 12.8, V12.8.93' && exit\necho 'sm_90a is not defined' >&2\nexit 1\n")
    ptxas.chmod(ptxas.stat().st_mode | stat.S_IXUSR)
    for tool in ("PTXAS", "PTXAS_BLACKWELL"):
        monkeypatch.setenv(f"TRITON_{tool}_PATH", str(ptxas))
    tried("does not build or run: PTXASError.*sm_90a is not defined")


WITHOUT_TRITON = """
import sys
{block}
import pytest, torch, fused_kopt
optimizer, variable = fused_kopt.Adam(), torch.ones(3)
optimizer.apply_gradients([(torch.ones(3), variable)])
assert (variable < 1).all() and not any(m.startswith("triton.") for m in sys.modules)
with pytest.raises(RuntimeError, match="executor='triton' is not available: {reason}.*Use executor='auto' or 'reference'"):
    fused_kopt.Adam(executor="triton").apply_gradients([(torch.ones(3), variable)])
assert fused_kopt.stats() == (0, 0)
print("works")
"""


def test_D20_a_machine_without_triton() -> None:
    code = WITHOUT_TRITON.format(block="sys.modules['triton'] = None", reason="Triton is not installed; pip install")
    assert python(code) == "works\n"


def test_D20_a_triton_that_does_not_import(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise OSError('libcuda.so: wrong ELF class')")
    code = WITHOUT_TRITON.format(block=f"sys.path.insert(0, {str(tmp_path)!r})", reason="Triton does not import: OSError")
    assert python(code) == "works\n"


def test_D21_fusion_of_multiply_and_add_is_off_whatever_the_environment_says(
    gpu: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    codes = set()
    for setting in (None, "0", "1"):
        if setting is not None:
            monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", setting)
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / f"cache{setting}"))
        forget()
        step(build("adam", "triton"), [torch.ones(3)])
        (kernel,) = update_bucket.device_caches[DEVICE][0].values()
        codes.add(kernel.asm["ptx"])
    assert [k.enable_fp_fusion for k in gpu.kernels] == [False] * 3
    assert len(codes) == 1
    assert "fma" not in codes.pop()


@pytest.mark.parametrize("rule", SOME_RULES)
def test_D25_D26_nothing_compiles_after_the_first_step(rule: str, gpu: Driver) -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    variables = [torch.nn.Parameter(randn(n, dtype=d)) for d in dtypes for n in (1, 16, 1024, 3000)]
    optimizer = build(rule, "triton")
    with launches(3):
        step(optimizer, variables)
    compiled = fused_kopt.stats().compilations
    late = [torch.nn.Parameter(randn(n, dtype=d)) for d in dtypes for n in (16, 5)]
    for number in range(60):
        optimizer.learning_rate = (1, 0.0, 1.0, 16, 1e-3 * number)[number % 5]  # an int 1 or 16 would be a constexpr
        optimizer.set_weights(
            [2**31 + number, *optimizer.get_weights()[1:]] if False else [torch.tensor(2**24 + number), *optimizer.weights[1:]]
        )
        variables[number % 12].data = variables[number % 12].data.clone()
        with launches(3):
            step(optimizer, variables + (late if number > 30 else []), None if number % 3 else range(number % 4, 18, 4), number % 7)
    assert fused_kopt.stats().compilations == compiled
    assert len(update_bucket.device_caches[DEVICE][0]) == 3
    assert {(k.num_warps, k.enable_fp_fusion) for k in gpu.kernels} == {(8, False)}
    assert {grid[1:] for grid in gpu.grids} == {(1, 1)}
