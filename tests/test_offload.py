"""Offloaded optimizers: the bits of those without offload, whatever is copied when; without a GPU its streams are played by hand."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import support
import torch
from torch import Tensor, nn

import fused_kopt
from fused_kopt import StaleVariableError, TornStepError, checkpoint, precision, verification
from fused_kopt.distributed import hosting, offload, offload_stats, shard, transfers, variables_changed
from fused_kopt.mixed_precision import LossScaleOptimizer
from perf import offload as bench
from perf import rows

PART = 512  # bytes: several variables in a part, several parts of a dtype
SHAPES = [(300,), (7, 9), (), (0,), (4, 5, 6), (128,), (64, 2)]
DTYPES = (torch.float32, torch.bfloat16)
Pairs = list[tuple[Any, Tensor]]
Scenario = Callable[[Any, list[Tensor]], object]


def variables(*dtypes: torch.dtype) -> list[Tensor]:
    kinds = itertools.product(SHAPES, dtypes or DTYPES)
    return [support.randn(*shape, seed=i).to(dtype) for i, (shape, dtype) in enumerate(kinds)]


def gradients(like: Sequence[Tensor], step: int) -> list[Tensor]:
    return [support.randn(*v.shape, seed=100 * step + i).to(v.dtype) * (i + 1) for i, v in enumerate(like)]


def doubled(pairs: Pairs) -> Pairs:
    return [(g * 2, v) for g, v in pairs]


def steps(optimizer: Any, mine: Sequence[Tensor], count: int = 5, first: int = 0) -> None:
    for step in range(first, first + count):
        optimizer.apply_gradients(list(zip(gradients(mine, step), mine, strict=True)))


def same(scenario: Scenario, make: Callable[[], Any], mine: Callable[[], list[Tensor]] = variables) -> tuple[Any, list[Tensor]]:
    """A scenario ends in the same variables, slots and masters with and without offload. Returns the offloaded optimizer."""
    ends: list[tuple[Any, list[Tensor]]] = []
    for optimizer in (make(), offload(make(), PART)):
        found = mine()
        scenario(optimizer, found)
        ends.append((optimizer, found))
    support.assert_same(*(support.state(optimizer, found) for optimizer, found in ends))
    return ends[-1]


def adam(**options: Any) -> Any:
    return support.build("adam", "compiled", **options)


@pytest.mark.parametrize("rule", list(support.RULES))
def test_every_rule(rule: str) -> None:
    same(steps, lambda: support.build(rule))


@pytest.mark.parametrize("executor", ["reference", "compiled"])
@pytest.mark.parametrize("policy", list(precision.NAMED))
def test_every_precision(policy: str, executor: str) -> None:
    """The remainders and masters are among the weights; random bits depend on an element's number alone."""
    optimizer, mine = same(steps, lambda: support.build("adam", executor, precision=policy), lambda: variables(torch.bfloat16))
    moved = 2 * sum(v.numel() for v in mine)
    parts, *both = offload_stats(optimizer)[:3]
    assert parts > 1
    assert both == [moved, moved]


def test_clipping_verification_and_figures() -> None:
    for options in ({"clipnorm": 3.0}, {"global_clipnorm": 2.0, "clipvalue": 1.0}, {"verify_every": 2}, {"stats_every": 1}):
        optimizer, _ = same(steps, lambda options=options: adam(**options))
        if "stats_every" in options:
            alone = adam(**options)
            steps(alone, variables())
            assert optimizer.last_stats() == pytest.approx(alone.last_stats(), rel=1e-12)  # sums in another order


def test_functions_of_the_caller() -> None:
    same(steps, lambda: adam(gradient_transformers=[doubled, lambda pairs: pairs[1:]]))
    same(steps, lambda: adam(gradient_aggregator=doubled))


@pytest.mark.parametrize("rule", ["adam", "nadam"])
def test_loss_scaling(rule: str) -> None:
    def scenario(optimizer: Any, mine: list[Tensor]) -> None:
        for step in range(6):
            found = [g.clamp(-1, 1) * optimizer.loss_scale.to(g.dtype) for g in gradients(mine, step)]
            found[0][3] = math.inf if step == 2 else 1.0
            optimizer.apply_scaled_gradients(zip(found, mine, strict=True))

    make = lambda: LossScaleOptimizer(support.build(rule, "compiled", global_clipnorm=1.0), dynamic_growth_steps=2)  # noqa: E731
    ends: list[Any] = []
    for optimizer in (make(), offload(make(), PART)):
        found = variables()
        scenario(optimizer, found)
        ends.append([*support.state(optimizer, found), support.bits(optimizer.loss_scale), support.bits(optimizer.dynamic_counter)])
    support.assert_same(*ends)


def test_absent_gradients_and_variables_that_come_later(caplog: pytest.LogCaptureFixture) -> None:
    def scenario(optimizer: Any, mine: list[Tensor]) -> None:
        for step in range(8):
            pairs = [(None if (i + step) % 3 == 0 else g, v) for i, (g, v) in enumerate(zip(gradients(mine, step), mine, strict=True))]
            optimizer.apply_gradients(pairs if step > 2 else pairs[: 4 * step + 3])

    same(scenario, lambda: adam(precision="bf16_stochastic"), lambda: variables(torch.bfloat16))
    assert "Gradients do not exist" in caplog.text


def test_what_else_pairs_may_be() -> None:
    """Iterators, arrays, gradients of another dtype or layout, negated, expanded or of a graph; variables with gaps."""

    def scenario(optimizer: Any, mine: list[Tensor]) -> None:
        gaps = support.randn(6, 12, seed=5)
        mine += [support.randn(6, 4, seed=4).t(), gaps[:, ::2]]
        for step in range(4):
            found: list[Any] = gradients(mine, step)
            found[0] = found[0].numpy()
            found[2] = found[2].double()
            found[3] = torch._neg_view(found[3])
            found[4] = found[4].requires_grad_()
            found[-2] = found[-2].contiguous()
            found[-1] = torch.ones(()).expand(6, 6)
            optimizer.apply_gradients(zip(found, mine, strict=True))
        mine.append(gaps)

    same(scenario, adam, lambda: variables(torch.float32))


def test_what_the_caller_writes_counts() -> None:
    def scenario(optimizer: Any, mine: list[Tensor]) -> None:
        module = nn.ParameterList(map(nn.Parameter, mine))
        steps(optimizer, list(module), 2)
        module.load_state_dict({name: value / 2 for name, value in module.state_dict().items()})
        steps(optimizer, list(module), 2, 2)
        for v in module:
            v.data = v.data * 3  # to other memory
        steps(optimizer, list(module), 2, 4)
        for v in module:
            v.data.clamp_(-1, 1)
        if isinstance(optimizer._stages[0] if optimizer._stages else None, hosting.Hosting):
            variables_changed(optimizer)
        steps(optimizer, list(module)[2:], 1, 6)
        steps(optimizer, list(module), 1, 7)
        mine[:] = [v.detach() for v in module]

    same(scenario, lambda: adam(precision="bf16_split"), lambda: variables(torch.bfloat16))


def test_a_variable_is_fetched_only_where_it_was_written() -> None:
    optimizer, mine = offload(adam(), PART), variables(torch.float32)
    moved = 4 * sum(v.numel() for v in mine)
    for expected in (2 * moved, moved, moved + 4 * mine[0].numel(), moved):
        steps(optimizer, mine, 1)
        assert offload_stats(optimizer).bytes_down == expected
        if expected == moved:
            mine[0].mul_(2)


def test_backward_knows_that_variables_have_changed() -> None:
    optimizer, variable = offload(fused_kopt.SGD(), PART), nn.Parameter(torch.ones(3))
    loss = (variable * variable).sum()
    optimizer.apply_gradients([(torch.ones(3), variable)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("policy", ["float32", "bf16_split"])
def test_averages(policy: str) -> None:
    """They start from a variable's value, which must be on the host by then, and end in the variable."""

    def scenario(optimizer: Any, mine: list[Tensor]) -> None:
        if policy == "float32":
            optimizer.build(mine[:3])
        steps(optimizer, mine[:5])
        steps(optimizer, mine, 3)
        mine[0].mul_(2)  # not among those that are finalized
        optimizer.finalize_variable_values(mine[1:])
        steps(optimizer, mine, 1, 9)

    same(scenario, lambda: adam(precision=policy, ema_momentum=0.75), lambda: variables(torch.bfloat16))


def test_what_is_said_of_variables() -> None:
    def scenario(optimizer: Any, mine: list[Tensor]) -> None:
        optimizer.set_precision(mine[1:4], "bf16_split")
        optimizer.scale_learning_rate(mine[:2], 0.5)
        steps(optimizer, mine, 2)
        optimizer.scale_learning_rate(mine[1:6], 0.25)
        steps(optimizer, mine, 2, 2)
        with pytest.raises(ValueError, match="has slots already"):
            optimizer.set_precision(mine[:1], "bf16_split")

    optimizer, mine = same(scenario, adam, lambda: variables(torch.bfloat16))
    assert optimizer.get_slot(mine[0], "m").any()
    assert torch.equal(optimizer.get_master(mine[1]).bfloat16(), mine[1])
    assert optimizer.add_slot(mine[0], "own") is optimizer.get_slot(mine[0], "own")


def test_a_policy_that_is_mended() -> None:
    optimizer, mine = offload(adam(precision="bf16_split"), PART), variables()
    before = [v.clone() for v in mine]
    with pytest.raises(ValueError, match="needs a bfloat16 variable"):
        steps(optimizer, mine, 1)
    assert all(map(torch.equal, mine, before))
    optimizer.set_precision(mine[::2], "float32")
    steps(optimizer, mine, 2)
    alone = adam(precision="bf16_split")
    alone.set_precision(before[::2], "float32")
    steps(alone, before, 2)
    support.assert_same(support.state(optimizer, mine), support.state(alone, before))


def test_built_saved_and_loaded(tmp_path: Path) -> None:
    first, mine = offload(adam(precision="bf16_split"), PART), variables(torch.bfloat16)
    first.build(mine)
    steps(first, mine, 2)
    named = [(str(i), v) for i, v in enumerate(mine)]
    checkpoint.save(tmp_path / "state.safetensors", first, named)
    for second in (adam(precision="bf16_split"), offload(adam(precision="bf16_split"), 10**6)):
        copies = [v.clone() for v in mine]
        checkpoint.load(tmp_path / "state.safetensors", second, [(str(i), v) for i, v in enumerate(copies)])
        steps(second, copies, 2, 2)
        expected = [v.clone() for v in mine]
        alone = adam(precision="bf16_split")
        alone.build(expected)
        alone.set_weights(first.get_weights())
        steps(alone, expected, 2, 2)
        support.assert_same(support.state(second, copies), support.state(alone, expected))


# The steady state.


def test_a_step_like_an_earlier_one_is_looked_at_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    honest = hosting.Hosting._look
    monkeypatch.setattr(hosting.Hosting, "_look", lambda *arguments: (looks.append(1), honest(*arguments))[1])
    optimizer, mine = offload(adam(), PART), variables()
    steps(optimizer, mine, 1)
    with support.launches(3 * offload_stats(optimizer).parts):
        steps(optimizer, mine, 3, 1)
    assert len(looks) == len(optimizer._repeats._kept) == 1
    steps(optimizer, mine[1:], 2)
    steps(optimizer, mine, 2)
    assert len(looks) == len(optimizer._repeats._kept) == 2


def test_what_lies_side_by_side_is_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a Flat: all gradients of a part; variables without padding between them, since what lies there may be somebody's."""
    copied: list[int] = []
    honest = transfers.copy
    monkeypatch.setattr(transfers, "copy", lambda t, s: (copied.append(len(t)), honest(t, s))[1])
    optimizer, mine = offload(adam(), 10**6), [torch.ones(n) for n in (64, 128, 5, 64, 3)]
    flat = optimizer.flatten([nn.Parameter(v) for v in mine])
    for step in range(3):
        copied.clear()
        for g, grad in zip(flat.gradients, gradients(mine, step), strict=True):
            g.copy_(grad)
        optimizer.apply_gradients(flat)
    assert copied == [1, 2]
    alone = adam()
    steps(alone, mine, 3)
    assert all(map(torch.equal, flat.variables, mine))


def test_gradients_of_one_memory_in_another_order() -> None:
    """Two that follow each other there, but not as their places do; then too far apart; then as they do."""
    optimizer, mine, whole = offload(adam(), 10**6), [torch.ones(64), torch.ones(64)], support.randn(192)
    alone, copies = adam(), [v.clone() for v in mine]
    for first, second in ((64, 0), (0, 128), (0, 64)):
        found = [whole[first : first + 64], whole[second : second + 64]]
        optimizer.apply_gradients(list(zip(found, mine, strict=True)))
        alone.apply_gradients(list(zip(found, copies, strict=True)))
        assert all(map(torch.equal, mine, copies))


def test_what_lies_between_variables_stays() -> None:
    whole = torch.full((192,), 7.0)
    optimizer, mine = offload(adam(), 10**6), [whole[:60], whole[64:128], whole[128:190]]
    steps(optimizer, mine, 2)
    assert (whole[[60, 61, 62, 63, 190, 191]] == 7).all()


# What is refused, and what is left behind.


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    used = adam()
    steps(used, variables(), 1)
    for bad, text in ((used, "has slots"), (offload(adam()), "is offloaded"), (support.build("adam", "triton"), "does not run in host")):
        with pytest.raises(ValueError, match=text):
            offload(bad)
    with pytest.raises(ValueError, match="`part_bytes` must be"):
        offload(adam(), 0)
    for function in (offload, offload_stats, variables_changed):
        with pytest.raises(TypeError, match=r"Received: SGD|This SGD is not offloaded"):
            function(torch.optim.SGD([torch.ones(1)]))
    with pytest.raises(ValueError, match="Received: meta"):
        transfers.link(torch.device("meta"))
    optimizer, mine = offload(adam(), PART), variables(torch.float32)
    steps(optimizer, mine, 2)
    before = support.state(optimizer, mine)
    good = list(zip(gradients(mine, 3), mine, strict=True))
    freed = torch.ones(300)
    freed.untyped_storage().resize_(0)
    bad_pairs: list[tuple[Pairs, type[Exception], str]] = [
        ([*good, good[0]], ValueError, "given twice"),
        ([*good[:-1], (good[-1][0].to_sparse(1), mine[-1])], RuntimeError, "sparse"),
        ([(freed, mine[0]), *good[1:]], ValueError, "outgrows its storage"),
        ([(None, v) for v in mine], ValueError, "No gradients provided"),
        ([*good, (torch.ones(2), mine[0][:2])], ValueError, "share memory"),
    ]
    for pairs, error, text in bad_pairs:
        with pytest.raises(error, match=text):
            optimizer.apply_gradients(pairs)
    monkeypatch.setattr(hosting, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        optimizer.apply_gradients(good)
    monkeypatch.undo()
    support.assert_same(support.state(optimizer, mine), before)
    assert optimizer.apply_gradients([]) is None
    mine[1].data = mine[1].double()
    with pytest.raises(StaleVariableError, match=r"was shape \(7, 9\), torch.float32 when it was offloaded"):
        optimizer.apply_gradients([(torch.ones(7, 9, dtype=torch.float64), mine[1])])


def test_an_interrupted_step_leaves_twins_that_are_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch of the second part fails: its twins are ahead of the variables, which the next step goes on from."""
    optimizer, mine = offload(adam(), PART), variables(torch.float32)
    steps(optimizer, mine, 2)
    weights, honest = optimizer.get_weights(), hosting.Hosting.after
    calls: list[int] = []

    def after(stage: Any, bucket: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        honest(stage, bucket)

    monkeypatch.setattr(hosting.Hosting, "after", after)
    with pytest.raises(KeyboardInterrupt):
        steps(optimizer, mine, 1, 2)
    monkeypatch.undo()
    with pytest.raises(TornStepError):
        steps(optimizer, mine, 1, 3)
    alone, copies = adam(), [v.clone() for v in mine]
    alone.build(copies)
    for one in (optimizer, alone):
        one.set_weights(weights)
    steps(optimizer, mine, 2, 4)
    steps(alone, copies, 2, 4)
    support.assert_same(support.state(optimizer, mine), support.state(alone, copies))


# A GPU's order of things.


class Stream:
    """Work in order; an eager stream's is done when it is given, any other's when somebody waits for it."""

    def __init__(self, eager: bool = False) -> None:
        self.eager = eager
        self.work: list[Callable[[], object]] = []
        self.done = 0

    def give(self, work: Callable[[], object]) -> None:
        self.work.append(work)
        if self.eager:
            self.run()

    def run(self, until: int | None = None) -> None:
        end = len(self.work) if until is None else until
        while self.done < end:
            self.done += 1
            self.work[self.done - 1]()

    def record_event(self) -> Any:
        event, until = type("Event", (), {})(), len(self.work)
        event.synchronize = lambda: self.run(until)
        return event

    def synchronize(self) -> None:
        self.run()

    def wait_stream(self, other: Any) -> None:
        self.give(other.record_event().synchronize)


class Gpu:
    """Stands for torch.cuda. `now` is the stream of the caller's own work; `eager` says which of the others (0: down, 1: up) hurry."""

    def __init__(self, eager: Sequence[int]) -> None:
        self.now = Stream()
        self.streams: list[Stream] = []
        self.eager = eager
        self._current: list[Stream] = []

    def Stream(self, device: torch.device) -> Stream:
        self.streams.append(Stream(len(self.streams) in self.eager))
        return self.streams[-1]

    def current_stream(self, device: torch.device) -> Stream:
        return self.now

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._current.append(stream)
        yield
        self._current.pop()

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        self._current[-1].give(lambda: torch._foreach_copy_(list(targets), list(sources)))


@pytest.fixture(params=[(), (0,), (1,), (0, 1)], ids=["late", "down first", "up first", "early"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    found = Gpu(request.param)
    monkeypatch.setattr(transfers, "cuda", found)
    monkeypatch.setattr(transfers, "copy", found.copy)
    monkeypatch.setattr(transfers, "link", lambda device: transfers.Streams(device))
    monkeypatch.setattr(transfers.Streams, "pinned", False)
    return found


def on_gpu(optimizer: Any, mine: list[Tensor], gpu: Gpu | None, write: bool = False) -> None:
    """Steps whose gradients are made on the GPU, from the variables and in memory that is used again."""
    found = [torch.zeros_like(v) for v in mine]
    found[-1] = mine[1].view_as(mine[-1])  # a variable as another's gradient
    scaled = isinstance(optimizer, LossScaleOptimizer)

    def backward(step: int) -> None:
        for g, v, noise in zip(found[:-1], mine, gradients(mine, step), strict=False):
            g.copy_(v * 0.5 + noise * (math.inf if scaled and step == 2 else 1))

    def rewrite() -> None:
        mine[0].mul_(2)

    for step in range(5):
        work = [lambda step=step: backward(step), *([rewrite] if write and step == 3 else [])]
        for each in work:
            gpu.now.give(each) if gpu else each()
        if write and step == 3:
            torch.autograd.graph.increment_version([mine[0]])  # as the call that starts a kernel does
        apply = optimizer.apply_scaled_gradients if scaled else optimizer.apply_gradients
        apply(list(zip(found, mine, strict=True)))
    if gpu:
        gpu.now.run()


def streamed() -> list[Tensor]:
    return [support.randn(120, seed=i).to(d) for i, d in enumerate(DTYPES * 4)] + [support.randn(120, seed=9).bfloat16()]


@pytest.mark.parametrize("options", [{}, {"clipnorm": 2.0}, {"verify_every": 2}, {"gradient_transformers": [doubled]}])
def test_every_copy_waits_for_what_it_must(options: dict[str, Any], gpu: Gpu) -> None:
    ends = []
    for where in (None, gpu):
        optimizer, mine = adam(**options), streamed()
        if where:
            offload(optimizer, PART)
        on_gpu(optimizer, mine, where, write=True)
        ends.append(support.state(optimizer, mine))
    support.assert_same(*ends)


def test_averages_start_and_end_in_order(gpu: Gpu) -> None:
    ends = []
    for where in (None, gpu):
        optimizer, mine = adam(ema_momentum=0.75), streamed()
        seen: list[Tensor] = []
        look = lambda: seen.extend(v.clone() for v in mine)  # noqa: B023, E731
        if where:
            offload(optimizer, PART)
        on_gpu(optimizer, mine[:-1], where)
        optimizer.build(mine)
        steps(optimizer, mine[:-1], 1)
        where.now.give(look) if where else look()  # between the step and the next line
        optimizer.finalize_variable_values(mine)
        if where:
            where.now.run()
        ends.append([*support.state(optimizer, mine), *map(support.bits, seen)])
    support.assert_same(*ends)


def test_a_loss_scale_waits_for_all_gradients(gpu: Gpu) -> None:
    ends = []
    for where in (None, gpu):
        optimizer, mine = LossScaleOptimizer(adam()), streamed()
        if where:
            offload(optimizer, PART)
        on_gpu(optimizer, mine, where)
        ends.append([*support.state(optimizer, mine), support.bits(optimizer.loss_scale)])
    support.assert_same(*ends)


def test_an_update_waits_for_its_own_gradients_only(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, mine = offload(adam(), PART), [support.randn(200, seed=i) for i in range(4)]  # of 800 bytes: a part each
    steps(optimizer, mine, 1)
    down, up = gpu.streams
    if down.eager or up.eager:
        return
    seen: list[tuple[int, int]] = []
    base = len(down.work), len(up.work)
    support.after_each(monkeypatch, lambda update: seen.append((down.done - base[0], len(up.work) - base[1])))
    optimizer._repeats._kept[0].bind()
    steps(optimizer, mine, 1, 1)
    # one wait for the caller's stream comes before the copies of each direction
    assert seen == [(2, 1), (3, 2), (4, 3), (5, 4)]


def test_verification_looks_at_gradients_that_are_there(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(verification, "check", lambda *arguments: left.append(len(gpu.streams[0].work) - gpu.streams[0].done))
    steps(offload(adam(verify_every=1), PART), streamed(), 1)
    assert left == [0]


def test_a_failed_step_leaves_nothing_in_flight_that_matters(gpu: Gpu) -> None:
    """The step raises after copies were started; the next one goes on as if it had not been."""
    ends = []
    for where in (None, gpu):
        optimizer, mine = adam(), streamed()
        if where:
            offload(optimizer, PART)
        on_gpu(optimizer, mine, where)
        optimizer.clipvalue = "no number"
        with pytest.raises((TypeError, ValueError)):
            steps(optimizer, mine, 1)
        optimizer.clipvalue = None
        steps(optimizer, mine, 1, 7)
        if where:
            where.now.run()
        ends.append(support.state(optimizer, mine))
    support.assert_same(*ends)


# Ranks.


def on_ranks(rank: int) -> dict[str, Any]:
    """What the caller writes between steps counts, what the ranks send each other is no such thing."""

    def trained(optimizer: Any) -> list[Any]:
        found = [nn.Parameter(support.randn(*shape, seed=i).bfloat16()) for i, shape in enumerate([(300,), (7, 9), (128,), (64, 2)])]
        for step in range(5):
            optimizer.apply_gradients([(g + rank, v) for g, v in zip(gradients(found, step), found, strict=True)])
            if step in (1, 2):
                found[step].data = found[step] * 2
                with torch.no_grad():
                    found[0].mul_(2)
        state = support.state(optimizer, found)
        optimizer.finalize_variable_values(found)
        return [*state, *map(support.bits, found)]

    def make() -> Any:
        return support.build("adam", "compiled", precision="bf16_split", global_clipnorm=1.0, ema_momentum=0.75)

    offloaded = {"summed": offload(make(), 400), "sharded": offload(shard(make(), part_bytes=400))}
    alone = {"summed": make(), "sharded": shard(make(), part_bytes=400)}
    result = {name: (trained(optimizer), trained(alone[name])) for name, optimizer in offloaded.items()}
    moved = [stats.bytes_down - stats.bytes_up for stats in map(offload_stats, offloaded.values())]
    return {**result, "fetched": (list(map(np.array, moved)), [np.array(0)] * 2)}


def test_behind_sums_and_shards(tmp_path: Path) -> None:
    for result in ranks.run(on_ranks, 2, tmp_path / "ranks"):
        for name, (alone, offloaded) in result.items():
            support.assert_same(alone, offloaded, name)


def test_the_bench(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        found = bench.measure(dtype, 3, 100, 2, rows.provenance(cpu, "commit", 1e9), cpu)
        rows.append(tmp_path / "rows", found)
        assert [row.bytes_up for row in found] == [0, 300 * size, 300 * size]
        assert [row.parts for row in found] == [0, 1, 0]
        assert all(row.copies_alone > 0 and 0 < row.seconds_p10 <= row.seconds <= row.seconds_p90 for row in found)
    (file,) = (tmp_path / "rows").iterdir()
    assert len(file.read_text().splitlines()) == 1 + 2 * 3


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["float32", "bf16_split"])
def test_on_a_gpu(policy: str) -> None:
    """The bits of an optimizer that has everything on the CPU, nothing left on the device, and copies beside the updates."""
    optimizer, alone = offload(adam(precision=policy), 1 << 20), adam(precision=policy)
    dtype = torch.bfloat16 if policy == "bf16_split" else torch.float32
    mine = [support.randn(1 << 18, seed=i).to(dtype) for i in range(8)]
    there = [v.cuda() for v in mine]
    resident = torch.cuda.memory_allocated()
    for step in range(5):
        found = gradients(mine, step)
        alone.apply_gradients(list(zip(found, mine, strict=True)))
        optimizer.apply_gradients([(g.cuda(), v) for g, v in zip(found, there, strict=True)])
    assert all(torch.equal(a, b.cpu()) for a, b in zip(mine, there, strict=True))
    assert torch.cuda.memory_allocated() == resident
    assert all(not weight.is_cuda for weight in optimizer.weights)
    assert offload_stats(optimizer).parts > 1
