"""The compiled executor (Inductor's C++) against the reference, bit for bit, and when it compiles."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import support
import torch
import variants
from torch import Tensor

import fused_kopt
from fused_kopt import compiled, execute, verification
from fused_kopt.optimizer import Optimizer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler touches deprecated parts of itself

LARGE = compiled.PACKED + 17
SHAPES = [(), (0,), (7,), (3, 5), (LARGE,), (1,), (2, 0), (compiled.PACKED - 1,), (129, 131)]
EVERY = 4  # a kernel takes 5 to 20 s to build where it is not in Inductor's cache


def variables(dtype: torch.dtype) -> list[Tensor]:
    found = [support.randn(*shape, seed=i).to(dtype) for i, shape in enumerate(SHAPES)]
    found[8] = found[8].t().contiguous().t()  # dense, in another order
    return found


def gradients(step: int, dtype: torch.dtype) -> list[Tensor | None]:
    found: list[Tensor | None] = [support.randn(*shape, seed=100 * step + i).to(dtype) for i, shape in enumerate(SHAPES)]
    found[(3 * step) % len(SHAPES)] = None
    return found


def same(optimizer: Optimizer, dtype: torch.dtype, gradient_dtype: torch.dtype, executor: Any = "compiled") -> None:
    """Three free-running steps of two copies of an optimizer."""
    states = []
    for name in ("reference", executor):
        twin, mine = copy.deepcopy(optimizer), variables(dtype)
        twin.executor = name
        for step in range(3):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                twin.apply_gradients(zip(gradients(step, gradient_dtype), mine, strict=True))
        states.append(support.state(twin, mine))
    support.assert_same(*states, type(optimizer).__name__)


@pytest.mark.parametrize(
    ("dtype", "gradient"),
    [(torch.float32,) * 2, (torch.float64,) * 2, (torch.bfloat16,) * 2, (torch.float16, torch.float32)],
    ids=str,
)
def test_adam_in_every_dtype(dtype: torch.dtype, gradient: torch.dtype) -> None:
    same(fused_kopt.Adam(0.01), dtype, gradient)


@pytest.mark.slow(every=EVERY)
@pytest.mark.parametrize("optimizer", [v for v in variants.variants() if v.exact], ids=lambda o: o.rule().__name__)
def test_every_rule(optimizer: Optimizer) -> None:
    same(optimizer, torch.float32, torch.float32)


@pytest.mark.parametrize("options", [{"clipvalue": 0.5}, {"clipnorm": 0.7}, {"clipvalue": 0.9, "global_clipnorm": 2.0}], ids=str)
def test_clipping(options: dict[str, float]) -> None:
    same(fused_kopt.SGD(0.1, momentum=0.9, **options), torch.float32, torch.float32)


def test_a_wrong_rule_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = compiled.run

    def wrong(update: Any) -> None:
        honest(update)
        next(v for v in update.variables if v is not None and v.numel()).view(-1)[-1:].mul_(1 + 2**-22)

    monkeypatch.setattr(compiled, "run", wrong)
    verification._known_answer.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="known-answer test"):
            same(fused_kopt.SGD(0.1), torch.float32, torch.float32)
    finally:
        verification._known_answer.cache_clear()  # other tests shall not inherit the verdict


@pytest.fixture
def frozen() -> Iterator[None]:
    """Any compilation is an error."""
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    yield
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_warm_up() -> None:
    same(fused_kopt.SGD(0.1), torch.float32, torch.float32)


def test_nothing_compiles_again(frozen: None) -> None:
    """Other shapes, addresses, rates and counts run the kernel that the test before built."""
    optimizer = fused_kopt.SGD(0.5, executor="compiled")
    for step, size in enumerate((5, 1, 40_000, 100_003)):
        optimizer.learning_rate = 0.1 * (step + 1)
        variable = torch.zeros(size)
        optimizer.apply_gradients([(torch.ones(size), variable)])
        assert torch.equal(variable, torch.full((size,), -float(optimizer.learning_rate)))


def test_small_variables_share_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def record(*key: Any) -> Any:
        return lambda p, g, slots, row, factors: lengths.append(p.numel())

    monkeypatch.setattr(compiled, "kernel", record)
    optimizer = fused_kopt.Adam(executor="reference")
    many = [torch.ones(5) for _ in range(1000)]
    optimizer.build(many)
    (bucket,) = optimizer._state.buckets.values()
    update = execute.Update(bucket, list(many), [torch.ones(5) for _ in many], ("m", "v"), optimizer.rule(), (0.0,) * 7)
    compiled.run(update)
    assert lengths == [16 * 1000]
    update.variables[500] = update.gradients[500] = None  # an absent one splits the pack
    compiled.run(update)
    assert lengths[1:] == [16 * 500, 16 * 499]


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"executor='compiled' is not available: no C\+\+ compiler"):
        fused_kopt.SGD(executor="compiled").apply_gradients([(torch.ones(2), torch.ones(2))])
    execute.warn_fallback.cache_clear()
    with pytest.warns(RuntimeWarning, match="falls back to the reference"):
        assert execute.choose("auto", torch.device("cpu"), execute.WORTH_COMPILING) == "reference"


def test_auto_compiles_where_it_pays() -> None:
    cpu = torch.device("cpu")
    assert execute.choose("auto", cpu, execute.WORTH_COMPILING - 1) == "reference"
    assert execute.choose("auto", cpu, execute.WORTH_COMPILING) == "compiled"
    with pytest.raises(RuntimeError, match="not on cuda"):
        execute.choose("compiled", torch.device("cuda"))


@pytest.mark.slow
def test_the_next_process_reads_the_disk_cache(tmp_path: Any) -> None:
    code = """
import torch, fused_kopt
fused_kopt.SGD(executor="compiled").apply_gradients([(torch.ones(9), torch.ones(9))])
print(torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"])
"""
    hits = [int(support.python(code, TORCHINDUCTOR_CACHE_DIR=str(tmp_path)).split()[-1]) for _ in range(2)]
    assert hits == [0, 1]
