"""Steps on variables, gradients and slots that others own: equal bits on all executors, whatever moves in between."""

import gc
import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import variants
from support import assert_same, bits, randn
from torch import Tensor

from fused_kopt import execute, options
from fused_kopt.borrowed import NO_CLIPS, Borrowed, Borrower
from fused_kopt.clipping import Clips
from fused_kopt.optimizers.adam import Scalars, adam
from fused_kopt.optimizers.sgd import momentum, nesterov, sgd

FUSED = ("compiled", "triton")
SHAPES: Sequence[tuple[int, ...]] = ((), (0,), (1,), (1023,), (8192,), (8193,), (3, 5, 7), (20_011,))
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def numbers(kind: Any, seed: int = 0) -> Any:
    return kind(*(float(np.float32(0.3 + i / 64 + seed / 128)) for i in range(len(kind._fields))))


class World:
    """Variables, gradients and slots, each in memory of its own."""

    def __init__(self, slots: int, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (F32, F32, F32), shapes: Any = SHAPES) -> None:
        variable, gradient, slot = dtypes
        self.variables = [randn(*shape, seed=i, dtype=variable) for i, shape in enumerate(shapes)]
        self.gradients = [randn(*shape, seed=50 + i, dtype=gradient) for i, shape in enumerate(shapes)]
        self.slots = [[randn(*shape, seed=100 * k + i, dtype=slot).abs() for i, shape in enumerate(shapes)] for k in range(1, slots + 1)]

    def given(self, **more: Any) -> Borrowed:
        return Borrowed(self.variables, self.gradients, self.slots, **more)

    def state(self) -> list[Tensor]:
        return [*self.variables, *itertools.chain(*self.slots)]


def assert_equal(first: World, second: World) -> None:
    assert_same([bits(t) for t in first.state()], [bits(t) for t in second.state()])


def after(executor: str, rule: Any, kind: Any, world: World, clips: Clips = NO_CLIPS, steps: int = 4, **more: Any) -> World:
    borrower = Borrower(executor)  # type: ignore[arg-type]
    for step in range(steps):
        borrower.step(rule, world.given(**more), lambda _, step=step: [numbers(kind, step)], clips)  # type: ignore[misc]
    return world


@pytest.mark.parametrize("executor", FUSED)
@pytest.mark.parametrize(
    "dtypes", [(F32, F32, F32), (F64, F64, F64), (BF16, BF16, BF16), (BF16, F32, F32), (F16, F16, F16), (F32, BF16, BF16)]
)
@pytest.mark.parametrize("clips", [NO_CLIPS, Clips(0.5, 0.4, None, 1.0)], ids=["plain", "clipped"])
def test_executors_agree_with_the_reference(executor: str, dtypes: Any, clips: Clips) -> None:
    assert_equal(after(executor, adam, Scalars, World(2, dtypes), clips), after("reference", adam, Scalars, World(2, dtypes), clips))


@pytest.mark.parametrize("executor", FUSED)
@pytest.mark.parametrize("rule", variants.RULES.values(), ids=list(variants.RULES))
def test_every_rule(executor: str, rule: variants.Rule) -> None:
    first, second = (after(e, rule.function, rule.scalars, World(rule.slots, shapes=((70,), (2, 3)))) for e in (executor, "reference"))
    if "power" in rule.function.__name__:  # powers are exact to 2 ulp only, which differences of roots magnify
        torch.testing.assert_close(first.state(), second.state(), rtol=1e-4, atol=1e-6)
    else:
        assert_equal(first, second)


def test_options_around_a_rule() -> None:
    """Decay, penalty and average computed by hand, in the rule's order, on every executor."""
    rule = options.around(options.averaged, options.around(options.decayed, options.around(options.penalised, sgd)))
    kind = options.extended(variants.RULES["sgd"].scalars, "decay", "penalty", "average", "one_minus_average")
    s = numbers(kind)
    expected = World(1)
    for v, g, a in zip(expected.variables, expected.gradients, expected.slots[0], strict=True):
        decayed = v * s.decay
        v.copy_(decayed - (g + decayed * s.penalty) * s.learning_rate)
        a.copy_(a * s.average + v * s.one_minus_average)
    for executor in ("reference", *FUSED):
        assert_equal(after(executor, rule, kind, World(1), steps=1), expected)
    assert options.around(options.decayed, sgd) is options.around(options.decayed, sgd)


@pytest.mark.parametrize("executor", ["reference", *FUSED])
def test_scalars_of_groups_and_of_each_variable(executor: str) -> None:
    rows = [numbers(Scalars, i) for i in range(3)]
    which = np.array([0, 1, 2, 0, 1, 2, 1, 0])

    def mixed() -> World:
        world = World(2)
        world.variables[::2] = [v.bfloat16() for v in world.variables[::2]]  # two buckets
        return world

    expected = mixed()
    for position, choice in enumerate(which):
        one = [[column[position]] for column in expected.slots]
        for _ in range(3):
            given = Borrowed([expected.variables[position]], [expected.gradients[position]], one)
            Borrower("reference").step(adam, given, lambda _, row=rows[choice]: [row])  # type: ignore[misc]
    grouped, listed = mixed(), mixed()
    borrowers = Borrower(executor), Borrower(executor)  # type: ignore[arg-type]
    for _ in range(3):
        borrowers[0].step(adam, grouped.given(which=which), lambda _: rows)
        borrowers[1].step(adam, listed.given(), lambda _: [rows[i] for i in which])
    assert_equal(grouped, expected)
    assert_equal(listed, expected)


@pytest.mark.parametrize("executor", FUSED)
def test_rows_come_and_go(executor: str) -> None:
    first, second = World(2), World(2)
    borrower, reference = Borrower(executor), Borrower("reference")  # type: ignore[arg-type]
    for count in (1, 1, 8, 8, 1, 8):
        rows = [numbers(Scalars, i) for i in range(count)]
        borrower.step(adam, first.given(), lambda _, rows=rows: rows)  # type: ignore[misc]
        reference.step(adam, second.given(), lambda _, rows=rows: rows)  # type: ignore[misc]
    assert_equal(first, second)


@pytest.mark.parametrize("executor", FUSED)
def test_slots_of_several_dtypes(executor: str) -> None:
    worlds = World(1), World(1)
    for world, chosen in zip(worlds, (executor, "reference"), strict=True):
        world.slots[0][::3] = [slot.bfloat16() for slot in world.slots[0][::3]]
        after(chosen, momentum, variants.RULES["momentum"].scalars, world)
    assert_equal(*worlds)


@pytest.mark.parametrize("executor", FUSED)
def test_another_rule_on_the_same_tensors(executor: str) -> None:
    first, second = World(1), World(1)
    for world, chosen in ((first, executor), (second, "reference")):
        borrower = Borrower(chosen)  # type: ignore[arg-type]
        for rule in (momentum, momentum, nesterov, nesterov, momentum):
            borrower.step(rule, world.given(), lambda _: [numbers(variants.RULES["momentum"].scalars)])
    assert_equal(first, second)


def replaced(column: list[Tensor], i: int) -> None:
    column[i] = column[i].clone()


def moved(column: list[Tensor], i: int) -> None:
    column[i].data = column[i].clone()


def transposed(column: list[Tensor], i: int) -> None:
    column[i] = column[i].transpose(0, 2).contiguous().transpose(0, 2)


@pytest.mark.parametrize("executor", FUSED)
@pytest.mark.parametrize("what", ["variables", "gradients", "slots"])
@pytest.mark.parametrize("change", [replaced, moved, transposed])
def test_what_moves_between_steps_is_found(executor: str, what: str, change: Any) -> None:
    first, second = World(2), World(2)
    for world, chosen in ((first, executor), (second, "reference")):
        borrower = Borrower(chosen)  # type: ignore[arg-type]
        for step in range(6):
            borrower.step(adam, world.given(), lambda _, step=step: [numbers(Scalars, step)])  # type: ignore[misc]
            column = world.slots[1] if what == "slots" else getattr(world, what)
            change(column, 6)
    assert_equal(first, second)


def test_steps_are_repeated_without_looking_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    world, borrower = World(1), Borrower("compiled")
    long_ways = []
    anew = Borrower._anew
    monkeypatch.setattr(Borrower, "_anew", lambda *a: (long_ways.append(1), anew(*a))[1])
    before = execute.stats().launches
    for _ in range(5):
        world.gradients = [g.clone() for g in world.gradients]
        borrower.step(momentum, world.given(), lambda _: [numbers(variants.RULES["momentum"].scalars)])
    assert len(long_ways) == 1
    assert execute.stats().launches - before <= 5 + 2  # 2: the known-answer test of a new kernel


def test_slots_are_not_kept_alive() -> None:
    world, borrower = World(1), Borrower("compiled")
    memory = np.zeros(world.slots[0][-1].shape, dtype=np.float32)  # freed with the last tensor on it
    world.slots[0][-1], kept = torch.from_numpy(memory), weakref.ref(memory)
    del memory
    for _ in range(3):
        borrower.step(momentum, world.given(), lambda _: [numbers(variants.RULES["momentum"].scalars)])
    assert kept() is not None
    world.slots = []
    gc.collect()
    assert kept() is None


def test_the_next_backward_of_a_stale_graph_raises() -> None:
    v = torch.ones(3, requires_grad=True)
    loss = (v * v).sum()
    Borrower("compiled").step(sgd, Borrowed([v], [torch.ones(3)], []), lambda _: [numbers(variants.RULES["sgd"].scalars)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def bad(world: World, what: str) -> None:
    column = world.slots[1]
    if what == "shape":
        column[4] = torch.zeros(3)
    elif what == "dtype":
        column[4] = column[4].double()
    elif what == "other dtype":
        column[4] = column[4].bfloat16()
    elif what == "count":
        column.pop()
    elif what == "shared":
        column[4] = world.slots[0][4]
    elif what == "variable":
        column[4] = world.variables[4]
    elif what == "meta":
        column[4] = column[4].to("meta")
    elif what == "gradient":
        world.gradients[4] = torch.zeros(2)
    elif what == "sparse":
        world.gradients[4] = world.gradients[4].to_sparse()
    elif what == "twice":
        world.variables[4] = world.variables[3]
        world.gradients[4] = world.gradients[3]
        for slots in world.slots:
            slots[4] = slots[3].clone()


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("shape", ValueError, r"body\.4 .*has a slot of shape \(3,\)"),
        ("dtype", TypeError, r"body\.4 .*has a slot of torch.float64"),
        ("other dtype", TypeError, r"body\.4 .*others of torch.float32"),
        ("count", ValueError, "7 slots of a kind for 8 variables"),
        ("shared", ValueError, r"body\.4 .*share memory"),
        ("variable", ValueError, r"body\.4 .*share memory"),
        ("meta", TypeError, r"slot of body\.4 .*meta"),
        ("gradient", ValueError, r"gradient of body\.4: gradient shape \(2,\)"),
        ("sparse", TypeError, r"gradient of body\.4 is sparse"),
        ("twice", ValueError, r"body\.3 and body\.3 share memory|body\.3 .*body\.4"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(what: str, error: type[Exception], message: str) -> None:
    world = World(2)
    bad(world, what)
    before = [t.clone() if not t.is_meta else t for t in world.state()]
    with pytest.raises(error, match=message):
        Borrower("compiled").step(adam, world.given(names=[f"body.{i}" for i in range(8)]), lambda _: [numbers(Scalars)])
    for a, b in zip(before, world.state(), strict=True):
        assert a.is_meta or torch.equal(a, b)
