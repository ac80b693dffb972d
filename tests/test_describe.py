"""`Optimizer.describe`: its launches are those that the executors count, its bytes those of the buffers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import launches
from torch import Tensor

import fused_kopt
from fused_kopt import description, execute
from fused_kopt.clipping import Clips

Pairs = list[tuple[Any, Tensor]]


def dense() -> Pairs:
    return [(torch.ones(5, 3), torch.zeros(5, 3)), (torch.ones(7), torch.zeros(7))]


def two_dtypes() -> Pairs:
    return [*dense(), (torch.ones(4), torch.zeros(4, dtype=torch.float64))]


def two_gradient_dtypes() -> Pairs:
    return [*dense(), (torch.ones(4, dtype=torch.bfloat16), torch.zeros(4))]


def sparse() -> Pairs:
    return [*dense(), *((torch.ones(4, 2).to_sparse(1), torch.zeros(4, 2)) for _ in range(2))]


def twice() -> Pairs:
    pairs = dense()
    return [*pairs, pairs[0], pairs[0]]


def absent() -> Pairs:
    return [*dense(), (None, torch.zeros(9))]


def odd_layouts() -> Pairs:
    return [(torch.ones(4, 3).t(), torch.zeros(3, 4)), (torch.ones(6), torch.zeros(12)[::2])]


CASES = (dense, two_dtypes, two_gradient_dtypes, sparse, twice, absent, odd_layouts)
# a bfloat16 variable's Adam by hand: variable in and out, two float32 slots in and out, gradient in
ADAM_16 = 2 * 2 + 2 * 2 * 4 + 2


@pytest.mark.parametrize("executor", ["triton", "compiled", "reference"])
@pytest.mark.parametrize("limit", [None, "clipnorm", "global_clipnorm"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_launches_are_those_of_a_step(case: Callable[[], Pairs], limit: str | None, executor: Any) -> None:
    pairs = case()
    opt = fused_kopt.Adam(executor=executor, **({limit: 1.0} if limit else {}))
    expected = opt.describe(pairs).launches
    opt.apply_gradients(pairs)  # with the known-answer tests
    with launches(expected):
        opt.apply_gradients(pairs)
    assert (expected > 0) == (executor != "reference")


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "ftrl", "rmsprop"])
def test_bytes_at_rest_are_those_of_the_buffers(optimizer: str) -> None:
    opt, pairs = fused_kopt.optimizers.get(optimizer), two_dtypes()
    before = opt.describe(pairs)
    opt.apply_gradients(pairs)
    buckets = opt._state.buckets.values()
    held = [sum(flat.numel() * flat.itemsize for flat in bucket.flat.values()) for bucket in buckets]
    assert [b.bytes_at_rest for b in before.buckets] == held
    assert [b.slots for b in before.buckets] == [tuple(bucket.flat) for bucket in buckets]
    assert opt.describe() == opt.describe([v for _, v in pairs])
    assert opt.describe().bytes_at_rest == before.bytes_at_rest == sum(held)


def test_a_variable_that_occurs_again_has_its_slots_once() -> None:
    once, again = (fused_kopt.Adam().describe(pairs).buckets[0] for pairs in (dense(), twice()))
    assert (again.variables, again.elements, again.bytes_at_rest) == (once.variables, once.elements, once.bytes_at_rest) == (2, 22, 1024)
    assert again.bytes_moved == once.bytes_moved + 2 * 15 * 28


def test_bytes_moved() -> None:
    variables = [torch.zeros(1000, dtype=torch.bfloat16), torch.zeros(24, dtype=torch.bfloat16)]
    opt = fused_kopt.Adam()
    assert opt.describe(variables).bytes_moved == 1024 * ADAM_16
    opt.global_clipnorm = 1.0
    assert opt.describe(variables).bytes_moved == 1024 * (ADAM_16 + 2)
    # copied: a float32 variable is read and written twice more, its gradient read and written once
    assert fused_kopt.SGD().describe(odd_layouts()).bytes_moved == 12 * (12 + 8) + 6 * (12 + 16)


def test_the_executor_and_why() -> None:
    small, large = torch.zeros(10), torch.zeros(execute.WORTH_COMPILING)
    asked: tuple[tuple[Any, Tensor], ...] = (("auto", small), ("auto", large), ("triton", small))
    reasons = [fused_kopt.SGD(executor=executor).describe([variable]).buckets[0] for executor, variable in asked]
    assert [(bucket.executor, bucket.why) for bucket in reasons] == [
        ("reference", "10 elements + 4,096 per variable are less than 65,536, from which C++ pays"),
        ("compiled", "65,536 elements + 4,096 per variable reach 65,536, from which C++ pays"),
        ("triton", "asked for"),
    ]


def test_a_missing_compiler_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "why_not_compiled", lambda device: "no C++ compiler here")
    execute.warn_fallback.cache_clear()
    with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler here"):
        (bucket,) = fused_kopt.SGD().describe([torch.zeros(1 << 17)]).buckets
    assert (bucket.executor, bucket.why) == ("reference", "no C++ compiler here")
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler here"):
        fused_kopt.SGD(executor="compiled").describe([torch.zeros(3)])


@pytest.mark.parametrize(
    ("case", "note"),
    [
        (two_dtypes, "devices, dtypes and precision policies, a bucket for each: 2"),
        (two_gradient_dtypes, "several dtypes"),
        (sparse, "sparse gradients, a launch for each on gathered rows, whose bytes are not counted: 2"),
        (twice, "launches of their own: 2"),
        (odd_layouts, "variables with gaps between their elements, copied and written back: 1"),
        (odd_layouts, "gradients laid out otherwise than their variables, copied: 1"),
    ],
)
def test_notes(case: Callable[[], Pairs], note: str) -> None:
    opt = fused_kopt.SGD(executor="compiled")
    assert opt.describe(dense()).notes == ()
    assert any(note in found for found in opt.describe(case()).notes)


def test_gradients_of_variables_count() -> None:
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    opt = fused_kopt.SGD(executor="compiled")
    assert not opt.describe(embedding.parameters()).notes
    embedding(torch.tensor([1, 3])).sum().backward()
    opt.minimize(embedding(torch.tensor([1, 3])).sum, embedding.weight)
    embedding(torch.tensor([1, 3])).sum().backward()
    assert "sparse gradients" in opt.describe().notes[0]


def test_flat_is_one_launch() -> None:
    model = torch.nn.Linear(20, 30)
    opt = fused_kopt.Adam(executor="compiled")
    with opt.flatten(model.parameters()) as flat:
        assert opt.describe(flat).launches == 1


def test_it_changes_nothing() -> None:
    opt, (gradient, variable) = fused_kopt.Nadam(), dense()[0]
    before = opt.get_config()
    with launches(0):
        opt.describe([(gradient, variable)])
    assert (opt.weights, variable.count_nonzero(), opt.get_config()) == ([], 0, before)


def test_text() -> None:
    opt = fused_kopt.Adam(executor="compiled", name="mine")
    first, second, third = str(opt.describe([torch.zeros(1000), torch.zeros(1)])).split("\n")
    assert first == "mine: 1 launch per step, 28.0 kB moved, 8.7 kB of slots"
    assert second == "  cpu float32: 2 variables, 1,001 elements, slots m, v (8.7 kB)"
    assert third == "    compiled (asked for): 1 launch, 28.0 kB moved"
    assert "1 variable, 3 elements, no slots" in str(fused_kopt.SGD().describe([torch.zeros(3)]))


def test_slots_of_their_own_are_not_padded() -> None:
    pairs = [(torch.zeros(3), torch.zeros(3))]
    found = description.describe("Adam", pairs, ("m", "v"), "auto", Clips(1.0, None, None, None), alignment=1)
    assert found.bytes_at_rest == 3 * 2 * 4


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "nothing yet": (None, ValueError, "describe\\(model.parameters\\(\\)\\)"),
    "a shape": ([(torch.zeros(2), torch.zeros(3))], ValueError, "gradient shape"),
    "a dtype": ([torch.zeros(3, dtype=torch.int64)], TypeError, "floating"),
    "shared memory": ([(torch.zeros(4), (base := torch.zeros(4))), (torch.zeros(2), base[:2])], ValueError, "share memory"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    given, error, text = BAD[case]
    with pytest.raises(error, match=text):
        fused_kopt.Adam().describe(given)
