"""What ranks tell each other before they sum: every kind of disagreement is an error on every rank, and nothing has changed."""

import logging
import operator
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ranks
import support
import torch
from support import randn
from torch import Tensor

import fused_kopt
from fused_kopt import agreement, layout, stages
from fused_kopt.distributed import AllReduce, shard
from fused_kopt.errors import PeerError, RankMismatchError
from fused_kopt.mixed_precision import LossScaleOptimizer
from fused_kopt.optimizer import Optimizer

SHAPES = [(3, 5), (), (7,), (2, 8)]
RANKS = 3
ODD = 1  # the rank that does something else


def variables(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(SHAPES)]


def gradients(rank: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(*shape, seed=10 * rank + i, dtype=dtype) for i, shape in enumerate(SHAPES)]


class Case:
    """One step of which rank ODD does something else: an optimizer, its pairs, and how they are changed there."""

    def __init__(self, sharded: bool) -> None:
        self.sharded = sharded
        self.optimizer: Any = self.made()
        self.variables = variables()
        self.gradients: list[Any] = gradients()
        self.take: Callable[[], Any] = lambda: self.optimizer.apply_gradients(list(zip(self.gradients, self.variables, strict=True)))

    def made(self, cls: str = "Adam", **options: Any) -> Optimizer:
        made: Optimizer = getattr(fused_kopt, cls)(**options)
        return shard(made) if self.sharded else made


def order(case: Case) -> None:
    case.variables.reverse(), case.gradients.reverse()


def shape(case: Case) -> None:
    case.variables[0], case.gradients[0] = randn(5, 3, seed=0), randn(5, 3)


def same_shapes_swapped(case: Case) -> None:
    """Only the values tell."""
    case.variables[2], case.gradients[2] = randn(7, seed=77), randn(7)


def memory_order(case: Case) -> None:
    case.variables[0] = layout.clone(case.variables[0], (1, 3))


def variable_dtype(case: Case) -> None:
    case.variables[2], case.gradients[2] = randn(7, dtype=torch.float64), randn(7, dtype=torch.float64)


def gradient_dtype(case: Case) -> None:
    case.gradients[1] = case.gradients[1].double()


def count(case: Case) -> None:
    case.variables, case.gradients = case.variables[:-1], case.gradients[:-1]


def nothing(case: Case) -> None:
    case.variables, case.gradients = [], []


def rule(case: Case) -> None:
    case.optimizer = case.made("Adamax")


def fixed_option(case: Case) -> None:
    case.optimizer = case.made(amsgrad=True)


def epsilon(case: Case) -> None:
    case.optimizer = case.made(epsilon=1e-3)


def learning_rate(case: Case) -> None:
    case.optimizer.learning_rate = 0.01


def beta(case: Case) -> None:
    case.optimizer.beta_1 = 0.8


def schedule(case: Case) -> None:
    case.optimizer = case.made(learning_rate=fused_kopt.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9))


def clipping(case: Case) -> None:
    case.optimizer.global_clipnorm = 1.0


def grad_scale(case: Case) -> None:
    case.optimizer.grad_scale = 0.5


def precision(case: Case) -> None:
    case.optimizer = case.made(precision=fused_kopt.Precision(slots="bfloat16"))


def multiplier(case: Case) -> None:
    case.optimizer.scale_learning_rate([case.variables[0]], 0.1)


def own_precision(case: Case) -> None:
    case.optimizer.set_precision([case.variables[0]], fused_kopt.Precision(slots="float8_e4m3"))


def iterations(case: Case) -> None:
    case.optimizer.iterations = 5


def value(case: Case) -> None:
    with torch.no_grad():
        case.variables[3].view(torch.int32)[0, 0] ^= 1


def loss_scaling(case: Case) -> None:
    case.optimizer = LossScaleOptimizer(case.optimizer)
    case.optimizer.apply_gradients = case.optimizer.apply_scaled_gradients


MISMATCHES = {
    function.__name__: (function, text)
    for function, text in [
        (order, "variable 0"),
        (shape, "variable 0"),
        (same_shapes_swapped, "values of variable 2"),
        (memory_order, "strides (1, 3)"),
        (variable_dtype, "variable 2"),
        (gradient_dtype, "dtype of gradient 1"),
        (count, "how many pairs"),
        (nothing, "how many pairs"),
        (rule, "class: Adam on rank 0, 2, Adamax on rank 1"),
        (fixed_option, "amsgrad: False on rank 0, 2, True on rank 1"),
        (epsilon, "epsilon"),
        (learning_rate, "learning_rate"),
        (beta, "beta_1"),
        (schedule, "learning_rate"),
        (clipping, "global_clipnorm: None on rank 0, 2, 1.0 on rank 1"),
        (grad_scale, "grad_scale"),
        (precision, "precision"),
        (multiplier, "variable 0"),
        (own_precision, "variable 0"),
        (iterations, "iterations: 0 on rank 0, 2, 5 on rank 1"),
        (value, "values of variable 3"),
        (loss_scaling, "loss scaling"),
    ]
}


def sparse(case: Case) -> None:
    case.gradients[0] = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1, 5), (3, 5), check_invariants=True)


def wrong_shape(case: Case) -> None:
    case.gradients[2] = torch.ones(8)


def interrupted(case: Case) -> None:
    case.optimizer._torn = True


def user_error(case: Case) -> None:
    def pairs() -> Iterator[Any]:
        yield case.gradients[0], case.variables[0]
        raise KeyError("a data loader's")

    case.take = lambda: case.optimizer.apply_gradients(pairs())


FAILURES = {
    function.__name__: (function, own, told)
    for function, own, told in [
        (sparse, RuntimeError, "rank 1: RuntimeError: Gradient 0 is sparse"),
        (wrong_shape, ValueError, r"rank 1: ValueError: gradient of variable 2 \(7,\): gradient shape"),
        (interrupted, fused_kopt.TornStepError, "rank 1: TornStepError"),
        (user_error, KeyError, "rank 1: KeyError"),
    ]
}


@contextmanager
def unchanged(case: Case) -> Iterator[None]:
    """Variables keep their values, and no slots are made."""
    before = [v.clone() for v in case.variables]
    yield
    support.assert_same(list(map(support.bits, case.variables)), list(map(support.bits, before)))
    assert not case.optimizer._state.buckets


def disagree(rank: int, sharded: bool) -> dict[str, Any]:
    """What each mismatch said on this rank, and how long it took; the group goes on after it."""
    found: dict[str, Any] = {}
    for key, (change, _) in MISMATCHES.items():
        case = Case(sharded)
        if rank == ODD:
            change(case)
        start = time.perf_counter()
        with unchanged(case), pytest.raises(RankMismatchError) as caught:
            case.take()
        found[key] = str(caught.value), time.perf_counter() - start
    for key, (change, own, told) in FAILURES.items():
        case = Case(sharded)
        if rank == ODD:
            change(case)
        with unchanged(case), pytest.raises(own if rank == ODD else PeerError, match=None if rank == ODD else told):
            case.take()
        found[key] = "", 0.0
    case = Case(sharded)
    case.take()
    found["state"] = [v.clone() for v in case.variables]
    return found


@pytest.mark.parametrize("sharded", [False, True])
def test_F1_F3_F4_F8_F15_every_disagreement_is_an_error_on_every_rank(tmp_path: Path, sharded: bool) -> None:
    results = ranks.run(disagree, RANKS, tmp_path, sharded)
    for key, (_, text) in MISMATCHES.items():
        said = {result[key][0] for result in results}
        assert len(said) == 1, key
        assert text in said.pop(), key
        assert max(result[key][1] for result in results) < 5
    assert len(MISMATCHES) > 20
    for result in results[1:]:
        support.assert_same(list(map(support.bits, result["state"])), list(map(support.bits, results[0]["state"])))


def drift(rank: int) -> list[Any]:
    """One bit of a variable, then of a slot, changes on one rank before a step: found at the next check, every third step."""
    found = []
    for where, when in (("variable", 4), ("slot", 6)):
        optimizer, mine = fused_kopt.Adam(gradient_aggregator=AllReduce(check_every=3)), variables()
        steps = 0
        try:
            for step in range(7):
                if step == when and rank == ODD:
                    hit = mine[3] if where == "variable" else optimizer.get_slot(mine[0], "v")
                    hit.view(torch.int32).view(-1)[-1] ^= 1 << 22
                optimizer.apply_gradients(list(zip(gradients(rank), mine, strict=True)))
                steps += 1
        except RankMismatchError as error:
            found.append((steps, str(error)))
    return found


def test_F17_digests_find_one_bit_at_the_next_check(tmp_path: Path) -> None:
    for result in ranks.run(drift, 2, tmp_path):
        (first, variable), (second, slot) = result
        assert first == second == 6
        assert "values of variable 3" in variable
        assert "v of the torch.float32 variables" in slot


def test_a_look_holds_for_the_same_variables_and_takes_the_gradients_of_now() -> None:
    mine, others = variables(), variables()
    seen = stages.look(None, zip(gradients(0), mine, strict=True), None)
    again = gradients(1)
    assert stages.look(None, list(zip(again, mine, strict=True)), seen) is seen
    assert all(map(operator.is_, seen.gradients, again))
    new = stages.look(None, list(zip(again, others, strict=True)), seen)
    assert new is not seen
    assert all(map(operator.is_, new.variables, others))
    for changed in ([None, *again[1:]], [again[0].double(), *again[1:]], [again[0].t().contiguous().t(), *again[1:]]):
        assert stages.look(None, list(zip(changed, mine, strict=True)), seen) is not seen
    assert stages.look(None, list(zip(again[:2], mine[:2], strict=True)), seen) is not seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 63, 1000])
def test_a_digest_sees_every_bit_and_every_place(dtype: torch.dtype, size: int) -> None:
    tensor = randn(size, dtype=dtype)
    seen = {int(agreement.digest(tensor))}
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    for bit in range(8 * tensor.element_size()):
        changed = tensor.clone()
        changed.view(integers)[-1] ^= 1 << bit if bit < 8 * tensor.element_size() - 1 else -(1 << bit)
        seen.add(int(agreement.digest(changed)))
    assert len(seen) == 1 + 8 * tensor.element_size()
    if size > 1:
        assert int(agreement.digest(tensor.flip(0))) != int(agreement.digest(tensor))


def test_a_digest_is_one_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places count in and across chunks."""
    monkeypatch.setattr(agreement, "CHUNK", 8)
    tensor = randn(20)
    swapped = tensor[[*range(8, 16), *range(8), *range(16, 20)]]
    assert int(agreement.digest(tensor)) != int(agreement.digest(swapped))
    assert int(agreement.digest(torch.zeros(0))) == 0


def patterns(rank: int, seed: int, steps: int, sharded: bool) -> tuple[list[int], list[Tensor]]:
    """Random subsets in random order, with random gradients absent, by one optimizer; the digest of everything after each step."""
    logging.disable(logging.WARNING)
    random = torch.Generator().manual_seed(seed)  # the same on all ranks
    own = torch.Generator().manual_seed(seed + 1 + rank)
    sizes = torch.randint(0, 90, (12,), generator=random).tolist()
    mine = [randn(size, seed=i) for i, size in enumerate(sizes)]
    optimizer = fused_kopt.Adam(0.01, executor="compiled")
    if sharded:
        shard(optimizer, part_bytes=256)
    digests = []
    for _ in range(steps):
        count = int(torch.randint(1, 13, (), generator=random))
        chosen = torch.randperm(12, generator=random)[:count].tolist()
        density = float(torch.rand((), generator=random))
        here = [bool(torch.rand((), generator=own) < density) for _ in chosen]
        here[0] = here[0] or rank == 0  # some rank has some gradient
        given = [
            (torch.randint(-8, 8, (sizes[i],), generator=own) / 8.0 if there else None, mine[i])
            for i, there in zip(chosen, here, strict=True)
        ]
        optimizer.apply_gradients(given)
        digests.append(sum(int(agreement.digest(v)) * (2 * i + 1) for i, v in enumerate(mine)))
    return digests, mine


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("world", "steps"),
    [
        (3, 60),
        pytest.param(2, 4000, marks=pytest.mark.slow),
        pytest.param(4, 1500, marks=pytest.mark.slow),
        pytest.param(8, 300, marks=pytest.mark.slow),
    ],
)
def test_F2_random_absences_orders_and_sizes_never_divide_the_ranks(tmp_path: Path, world: int, steps: int, sharded: bool) -> None:
    """0 divergences; 11,720 steps in all with --slow."""
    (digests, values), *others = ranks.run(patterns, world, tmp_path, world, steps, sharded)
    assert len(set(digests)) == steps
    assert all(other[0] == digests for other in others)
    assert all(value.isfinite().all() for value in values)
