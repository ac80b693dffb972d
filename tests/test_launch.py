"""The Triton launcher, without a GPU: which configuration, which tables, which compiled kernel."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_kopt import execute
from fused_kopt.buffers import Bucket
from fused_kopt.execute import Update
from fused_kopt.kernels import launch, offline, tuning
from fused_kopt.kernels.tuning import Config
from fused_kopt.optimizers.sgd import Scalars, momentum
from fused_kopt.slots import Slot

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
CUDA = torch.device("cuda")


def update(dtype: torch.dtype, gradients: list[torch.dtype], size: int = 3000) -> Update:
    variables: list[Tensor | None] = [torch.ones(size, dtype=dtype) for _ in gradients]
    bucket = Bucket(torch.device("cpu"), dtype)
    bucket.adopt(*bucket.grown([v for v in variables if v is not None], [Slot("momentum")]))
    return Update(bucket, variables, [torch.ones(size, dtype=d) for d in gradients], ("momentum",), momentum, Scalars(0.5, 0.5))


@pytest.fixture
def fresh() -> Iterator[None]:
    launch.configuration.cache_clear()
    yield
    launch.configuration.cache_clear()


def test_the_tuned_configuration_is_used(fresh: None, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    target = SimpleNamespace(get_current_target=lambda: SimpleNamespace(warp_size=64))
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=target))
    tuning.store(offline.hash_of(momentum), "H100", (BF16, F32), Config(2048, 2))
    assert launch.configuration(momentum, CUDA, (BF16, F32)) == (2048, 2)
    assert launch.configuration(momentum, CUDA, (F32, F32)) == (1024, 4)
    assert launch.configuration(momentum, CUDA, (F64, F32)) == (512, 4)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is launched on a GPU: (grid, arguments, constants, warps). The block size is 512 for float32 gradients, else 1024."""
    found: list[Any] = []

    def configuration(rule: Any, device: Any, dtypes: tuple[torch.dtype, torch.dtype], planes: Any) -> Config:
        assert (rule, dtypes[0], planes) == (momentum, BF16, ((F32, 1),))
        return Config(512, 4) if dtypes[1] == F32 else Config(1024, 16)

    monkeypatch.setattr(launch, "interprets", lambda device: False)
    monkeypatch.setattr(launch, "configuration", configuration)
    monkeypatch.setattr(
        launch, "_run", lambda kernel, grid, arguments, constants, warps=0, known=None: found.append((grid, constants[-1], warps))
    )
    return found


def test_a_launch_per_gradient_dtype_each_in_its_configuration(launched: list[Any]) -> None:
    execute.bind(update(BF16, [F32, BF16]), "triton")(Scalars(0.5, 0.5), None)
    assert launched == [(12, 512, 4), (6, 1024, 16)]


def test_nothing_is_launched_for_empty_variables(launched: list[Any]) -> None:
    execute.bind(update(BF16, [F32], 0), "triton")(Scalars(0.5, 0.5), None)
    assert launched == []


def test_a_compiled_kernel_per_device_kinds_and_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_kernels", {})

    class Kernel:
        def warmup(self, *arguments: Any, **options: Any) -> object:
            made.append(options)
            return object()

    made: list[Any] = []
    kernel, x = Kernel(), torch.ones(1)
    first = launch._compiled(kernel, (x, (x, x), Scalars(0.5, 0.5)), (1, 2), 4)
    assert made == [{"grid": (1,), "num_warps": 4, "enable_fp_fusion": False}]
    assert launch._compiled(kernel, (x + 1, (x, x), Scalars(0.1, 0.1)), (1, 2), 4) is first
    others: list[tuple[Any, ...]] = [
        (Kernel(), (x, (x, x), Scalars(0.5, 0.5)), (1, 2), 4),
        (kernel, (x.to("meta"), (x, x), Scalars(0.5, 0.5)), (1, 2), 4),
        (kernel, (x, (x,), Scalars(0.5, 0.5)), (1, 2), 4),
        (kernel, (x, (x, x), (0.5, 0.5)), (1, 2), 4),
        (kernel, (x, (x, x), Scalars(0.5, 0.5)), (1, 3), 4),
    ]
    assert len({first, *(launch._compiled(*other) for other in others)}) == 6
