"""The bench: workloads, providers, the loop, the rows, and that the documents show what the rows say."""

import itertools
import re
import subprocess
import time
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_kopt
from fused_kopt.commands.variants import VARIANTS as OUR_VARIANTS
from perf import __main__ as command
from perf import clocks, measure, plan, report, rows, run, tables
from perf.cases import CLIP, OPTIMIZERS, RATE, SLOTS, VARIANTS, Case, Runner, Tensors
from perf.clocks import CpuClock, CudaClock, Sample
from perf.providers import OURS, Borrowed, Cost, Provider
from perf.rows import Row
from perf.workloads import KERAS3, MODELS, REPLICAS, SWEEP, WORKLOADS, elements, sampled

# torch's compiler, and what the peers import, touch deprecated parts of themselves
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SHAPES = [(5, 3), (64,), ()]

# tensors, elements, largest tensor
TOTALS = {
    "W1": (161, 25_557_032, 2_359_296),
    "W2": (152, 86_567_656, 2_359_296),
    "W3": (199, 109_482_240, 23_440_896),
    "W4": (391, 335_141_888, 31_254_528),
    "W5": (148, 124_439_808, 38_597_376),
    "W6": (580, 1_557_611_200, 80_411_200),
    "W7": (9, 218_112_000, 58_720_256),
    "W8": (291, 1_003_782_656, 65_667_072),
    "W9": (291, 8_030_261_248, 525_336_576),
    "W10": (5_000, 5_433_000, 4_096),
    "W11": (10_000, 640_000, 64),
    "W12": (1, 2_148_532_224, 2_148_532_224),
    "W13": (5_291, 1_963_310_528, 26_214_400),
    "W14": (448, 41_943_040, 229_376),
    "W15": (1, 1_073_741_824, 1_073_741_824),
    "200x1M": (200, 200_000_000, 1_000_000),
    "10x16.8M": (10, 167_772_160, 16_777_216),
    "1000x1024": (1_000, 1_024_000, 1_024),
    "32x2048x2048": (32, 134_217_728, 4_194_304),
    "25x1M": (25, 25_000_000, 1_000_000),
    "1x25M": (1, 25_000_000, 25_000_000),
    "5000x64": (5_000, 320_000, 64),
    "200x640": (200, 128_000, 1_216),
    "1x64": (1, 64, 64),
    "10x64": (10, 640, 64),
    "100x64": (100, 6_400, 64),
    "1000x64": (1_000, 64_000, 64),
}
# seconds that 28 bytes per element should take at 92 % of 3.0 TB/s, and 5 us: computed by hand from the totals
PREDICTED = {"W1": 264e-6, "W2": 883e-6, "W3": 1.12e-3, "W4": 3.40e-3, "W5": 1.27e-3, "W6": 15.81e-3, "W7": 2.22e-3, "W8": 10.19e-3}
PREDICTED |= {"W9": 81.47e-3, "W10": 60e-6, "W11": 11.5e-6, "W12": 21.80e-3, "W13": 19.92e-3, "W14": 431e-6, "W15": 10.90e-3}


def case(optimizer: str = "adam", variant: str = "plain", dtype: torch.dtype = torch.float32, shapes: Any = None) -> Case:
    return Case(optimizer, "1x64", "all", SHAPES if shapes is None else shapes, dtype, variant, CPU)


class FakeProvider(Provider):
    """Sleeps for no time at all, and says that it took `seconds`."""

    name = "fake"

    def __init__(self, name: str, seconds: float = 1.0) -> None:
        super().__init__("", Cost(1.0, 1.0))
        self.name = name  # type: ignore[misc]
        self.seconds = seconds
        self.steps = 0

    def unsuitable(self, case: Case) -> str | None:
        return None

    def slot_bytes(self, case: Case) -> float:
        return 4

    def make(self, case: Case, tensors: Tensors) -> Runner:
        def step() -> float:
            self.steps += 1
            return self.seconds

        return tensors.runner(step)


class FakeClock:
    """Believes what a FakeProvider's step returns; every third repetition takes ten times as long."""

    def __init__(self) -> None:
        self.order: list[Any] = []
        self.rounds: dict[int, int] = {}

    def measure(self, runner: Runner, size: int) -> Sample:
        runner.prepare()
        seconds = float(runner.step())  # type: ignore[arg-type]
        self.order.append(seconds)
        self.rounds[id(runner)] = self.rounds.get(id(runner), 0) + 1
        factor = 10 if self.rounds[id(runner)] % 3 == 0 else 1
        return Sample(seconds * factor, seconds * factor / 2)

    def peak(self, runner: Runner) -> int:
        runner.step()
        return 77

    def bandwidth(self) -> float:
        return 100e9

    def free(self) -> int:
        return 2**33


PROVENANCE = rows.Provenance("2026-01-02T03:04:05+00:00", "abc", "Some CPU, 2 cores", 2, "2.13", "3.9", "3.11", "0.1", "3.15", 100.0)


def made(provider: str, seconds: float, **changes: Any) -> Row:
    """A row as a run would write it."""
    name, _, executor = provider.rpartition("-")
    fake = FakeProvider(name, seconds)
    fake.executor = executor
    result = measure.Result(fake, [Sample(seconds, seconds)] * 5, 0)
    return replace(rows.row(case(shapes=[(1_000_000,)]), result, PROVENANCE), **changes)


# Workloads.


def test_totals() -> None:
    found = {name: (len(w.shapes), elements(w.shapes), max(prod(s) for s in w.shapes)) for name, w in WORKLOADS.items()}
    assert found == TOTALS
    assert set(MODELS + REPLICAS + SWEEP) == set(WORKLOADS)
    assert sum(elements([shape]) % 16 != 0 for shape in WORKLOADS["W1"].shapes) == 1
    assert sum(shape == (1_600,) for shape in WORKLOADS["W6"].shapes) == 290


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("factor", [1, 2, 16, 1024])
def test_samples_shrink_by_their_factor(name: str, factor: int) -> None:
    shapes = WORKLOADS[name].shapes
    part = sampled(shapes, factor)
    divisors = {what: int(number) for what, _, number in (text.partition("/") for text in part.sample.split() if text != "all")}
    tensors, lines = divisors.get("tensors", 1), divisors.get("rows", 1)
    assert tensors * lines == factor
    assert part.shapes == [(max(1, shape[0] // lines), *shape[1:]) for shape in shapes[::tensors]]
    assert len(part.shapes) >= 8 or tensors == 1
    assert lines == 1 or len(shapes) < 8 * 2 * tensors  # tensors go first
    with pytest.raises(ValueError, match="Received: factor=3"):
        sampled(shapes, 3)


# Providers.


def test_the_providers_that_the_bench_promises() -> None:
    keys = {provider.key for provider in plan.PROVIDERS}
    ours = {f"fused_kopt-{executor}" for executor in ("reference", "triton", "compiled", "flat-triton", "flat-compiled", "keras-auto")}
    peers = {
        "torch-foreach",
        "torch-fused",
        "torch-compile",
        "torch-graph",
        "keras-torch",
        "keras-subclass",
        "optimi-loop",
        "optimi-triton",
        "flashoptim-triton",
    }
    assert keys == ours | peers


def test_slots_are_those_of_our_optimizers() -> None:
    assert {name: sum(map(len, make("auto", None).slot_groups())) for name, make in OURS.items()} == SLOTS
    classes = {type(make()).__name__ for make in OUR_VARIANTS.values()}
    assert {type(make("auto", None)).__name__ for make in OURS.values()} == classes


def test_bytes() -> None:
    def per_element(key: str, optimizer: str, dtype: torch.dtype, variant: str = "plain") -> float:
        some = case(optimizer, variant, dtype, [(1000, 1000)])
        (provider,) = plan.select([key])
        return some.bytes(provider.slot_bytes(some)) / some.elements

    assert [per_element("fused_kopt-compiled", name, torch.float32) for name in ("sgd", "momentum", "adam")] == [12, 20, 28]
    assert per_element("fused_kopt-compiled", "adam", torch.bfloat16) == 22
    assert per_element("torch-fused", "adam", torch.bfloat16) == 14
    assert per_element("flashoptim-triton", "adam", torch.bfloat16) == 12.25
    assert per_element("fused_kopt-compiled", "adam", torch.float32, "clip") == 32
    assert per_element("fused_kopt-keras-auto", "adam", torch.float32, "average") == 40


@pytest.mark.parametrize("provider", plan.PROVIDERS, ids=lambda provider: provider.key)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_step_is_one_sgd_step(provider: Provider, variant: str) -> None:
    some = case("sgd", variant)
    if reason := provider.why_not(some):
        pytest.skip(reason)
    tensors = Tensors(some)
    runner = provider.make(some, tensors)
    expected = [variable.detach().clone() for variable in runner.variables]
    for _ in range(3):
        runner.prepare()
        gradients = [variable.grad.clone() for variable in runner.variables]  # type: ignore[union-attr]
        runner.step()
        norm = torch.stack([g.norm() for g in gradients]).norm()
        factor = min(1.0, CLIP / float(norm)) if variant in ("clip", "average") else 1.0
        expected = [v - RATE * factor * g for v, g in zip(expected, gradients, strict=True)]
    for variable, value in zip(runner.variables, expected, strict=True):
        torch.testing.assert_close(variable.detach(), value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("key", [p.key for p in plan.PROVIDERS if p.key != "torch-compile"])  # which builds for seconds each
def test_every_optimizer_of_every_provider_steps(key: str) -> None:
    (provider,) = plan.select([key])
    reasons = []
    for optimizer in OPTIMIZERS:
        some = case(optimizer)
        reasons.append(provider.why_not(some))
        if reasons[-1]:
            continue
        tensors = Tensors(some)
        runner = provider.make(some, tensors)
        given = [variable.grad.clone() for variable in tensors.variables]  # type: ignore[union-attr]
        before = [variable.detach().clone() for variable in runner.variables]
        runner.step()
        for variable, old in zip(runner.variables, before, strict=True):
            assert (variable != old).all(), optimizer
            assert variable.isfinite().all(), optimizer
        assert all(torch.equal(v.grad, g) for v, g in zip(tensors.variables, given, strict=True)), "shared gradients were changed"
    if all(reasons):
        pytest.skip(str(reasons[0]))


def test_fresh_gradients_change_address_in_every_step() -> None:
    for variant, distinct in (("plain", 1), ("fresh", 2)):
        tensors = Tensors(case(variant=variant))
        seen = []
        for _ in range(4):
            tensors.prepare()
            seen.append(tensors.variables[0].grad.data_ptr())  # type: ignore[union-attr]
        assert len(set(seen)) == distinct
        assert all((one != two) == (variant == "fresh") for one, two in itertools.pairwise(seen))


def test_an_unavailable_executor_says_why() -> None:
    assert "no C++" not in str(Borrowed("compiled", Cost(1, 1)).why_not(case()))
    with pytest.raises(ValueError, match="executor"):
        Borrowed("warp", Cost(1, 1)).why_not(case())
    large = case(shapes=[(1_000_000,)])
    assert "interpreter" in str(Borrowed("triton", Cost(1, 1)).why_not(large))


# The loop.


def test_turns_are_interleaved_and_share_the_time() -> None:
    providers = [FakeProvider("a", 1.0), FakeProvider("b", 0.1), FakeProvider("c", 1e-9)]
    clock = FakeClock()
    outcome = measure.measure(case(), providers, clock, 30.0, print)
    counts = {result.provider.name: len(result.samples) for result in outcome.results}
    assert counts == {"a": 5, "b": 27, "c": measure.MOST}  # on average 4 s and 0.4 s, each has 10 s; c ends at the limit
    assert {p.name: p.steps for p in providers} == {name: count + measure.WARM + 1 for name, count in counts.items()}
    first = [clock.order[i : i + 3] for i in range(0, 15, 3)]
    assert all(sorted(turn) == [1e-9, 0.1, 1.0] for turn in first)
    assert len({tuple(turn) for turn in first}) == 3  # each round starts with another


def test_medians_and_ratios() -> None:
    outcome = measure.measure(
        case(shapes=[(10, 100)]), [FakeProvider("fused_kopt", 0.5), FakeProvider("torch", 2.0)], FakeClock(), 0, print
    )
    ours, peer = (rows.row(case(shapes=[(10, 100)]), result, PROVENANCE) for result in outcome.results)
    assert (ours.seconds, ours.seconds_p10, ours.seconds_p90, ours.host_seconds) == (0.5, 0.5, 5.0, 0.25)
    assert (ours.repetitions, ours.peak_bytes, ours.bytes) == (5, 77, 28_000)
    assert ours.gb_per_s == 28_000 / 0.5 / 1e9
    assert ours.share_of_copy == ours.gb_per_s / 100
    assert "4.00x" in run.summary([ours, peer])[0]
    found = tables.newest([ours, peer])
    assert tables.compared(next(iter(found.values())))[-2:] == ["4.00x", ""]


def test_a_provider_that_raises_does_not_end_the_run() -> None:
    class Broken(FakeProvider):
        def make(self, case: Case, tensors: Tensors) -> Runner:
            raise RuntimeError("no such luck")

    said: list[str] = []
    outcome = measure.measure(case(), [Broken("fused_kopt"), FakeProvider("torch")], FakeClock(), 0, said.append)
    assert [result.provider.name for result in outcome.results] == ["torch"]
    assert outcome.failed == ["fused_kopt-"]
    assert "no such luck" in said[0]


def test_the_cpu_clock() -> None:
    def step() -> None:
        torch.ones(1_000_000).add(torch.ones(1_000_000))
        time.sleep(0.01)

    runner = Runner(step, [], lambda: None)
    assert 0.01 <= clocks.CpuClock().measure(runner, 0).seconds < 1
    assert 12_000_000 <= CpuClock().peak(runner) < 12_100_000
    assert CpuClock().peak(Runner(lambda: None, [], lambda: None)) < 1000


@pytest.fixture
def small_triad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "TRIAD_BYTES", 2**16)


def test_the_triad_counts_three_arrays(monkeypatch: pytest.MonkeyPatch, small_triad: None) -> None:
    def half_a_second(run: Any) -> float:
        assert 0 < run() < 1
        return 0.5

    monkeypatch.setattr(clocks, "best", half_a_second)
    assert CpuClock().bandwidth() == 3 * 2**16 / 0.5


@pytest.mark.gpu
def test_the_cuda_clock() -> None:
    clock = CudaClock()
    a, b = (torch.ones(2**26, device="cuda") for _ in range(2))
    runner = Runner(lambda: a.add_(b), [], lambda: None)
    sample = clock.measure(runner, 2**30)
    fastest = 3 * 2**28 / clock.bandwidth()
    assert fastest * 0.5 < sample.seconds < fastest * 5
    assert sample.host_seconds < 0.01
    assert clock.peak(Runner(lambda: a + b, [], lambda: None)) == 2**28


# Plans and sampling.


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_default_plan_covers_everything_once(device: str) -> None:
    entries = plan.default_plan(torch.device(device))
    assert len({entry[:4] for entry in entries}) == len(entries)
    assert {entry.workload for entry in entries} == set(WORKLOADS)
    assert {entry.optimizer for entry in entries if entry.workload == plan.HEADLINE[device]} == set(OPTIMIZERS)
    assert {entry.variant for entry in entries} == set(VARIANTS)
    assert {entry.dtype for entry in entries} == {torch.float32, torch.bfloat16, torch.float16}
    reached = {provider.key for entry in entries for provider in plan.select(entry.patterns)}
    assert reached == {provider.key for provider in plan.PROVIDERS}
    assert entries[0][:4] == ("adam", plan.HEADLINE[device], torch.float32, "plain")
    assert set(plan.EVERY) <= set(entries[0].patterns)
    assert {entry.optimizer for entry in entries if set(plan.KERAS) <= set(entry.patterns)} == set(OPTIMIZERS)


@pytest.mark.parametrize("name", WORKLOADS)
def test_samples_fit_time_and_memory(name: str) -> None:
    providers = [FakeProvider("a"), FakeProvider("b")]
    whole = replace(case(), workload=name, shapes=[])
    for free, seconds in ((2**33, 10.0), (2**28, 1e9), (2**50, 0.1), (2**50, 1e9)):
        fitted = plan.fit(whole, lambda _: providers, free, seconds, None)
        patient = name == plan.HEADLINE["cpu"] or TOTALS[name][1] <= 1_000_000  # reduced for memory only
        limit = 1e9 if patient else seconds
        assert fits(fitted, providers, free, limit)
        factor = prod(int(number) for number in re.findall(r"\d+", fitted.sample))
        assert fitted.shapes == sampled(WORKLOADS[name].shapes, factor).shapes
        if factor > 1:
            larger = replace(fitted, shapes=sampled(WORKLOADS[name].shapes, factor // 2).shapes)
            assert not fits(larger, providers, free, limit)
    assert fitted.sample == "all"
    asked = plan.fit(whole, lambda _: providers, 2**50, 0.0, 4)
    assert asked.shapes == sampled(WORKLOADS[name].shapes, 4).shapes


def fits(case: Case, providers: list[FakeProvider], free: float, seconds: float) -> bool:
    return plan.needed_bytes(case, providers) <= plan.MEMORY_SHARE * free and plan.needed_seconds(case, providers) <= seconds


def test_a_run_ends_with_its_time(tmp_path: Path) -> None:
    said: list[str] = []
    started = run.Run(FakeClock(), CPU, PROVENANCE, tmp_path, None, time.monotonic() - 1, said.append)
    started.execute(plan.default_plan(CPU), plan.PROVIDERS)
    assert said == [f"{len(plan.default_plan(CPU))} cases not run: the time is spent"]
    assert list(tmp_path.iterdir()) == []


# Rows.


def test_rows_survive_the_file(tmp_path: Path) -> None:
    written = [made("fused_kopt-compiled", 0.123456), made("torch-fused", 2.5e-7), made("torch-fused", 1.0, device='A, "B" GPU')]
    rows.append(tmp_path, written[:1])
    rows.append(tmp_path, written[1:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-b-gpu.csv", "some-cpu-2-cores.csv"]
    assert rows.read_all(tmp_path) == [written[2], *written[:2]]
    assert rows.read(tmp_path / "some-cpu-2-cores.csv")[0].seconds == 0.1235


def test_a_file_with_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "some-cpu-2-cores.csv"
    path.write_text("date,time\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        rows.append(tmp_path, [made("torch-fused", 1.0)])
    with pytest.raises(ValueError, match="Received: \\['date', 'time'\\]"):
        rows.read(path)
    assert path.read_text() == "date,time\n1,2\n"


def test_provenance(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"rev-parse": "0123456789", "status": ""}
    monkeypatch.setattr(rows, "_git", lambda *arguments: answers[arguments[0]])
    found = rows.provenance(CPU, None, 12.34567e9)
    assert (found.commit, found.copy_gb_per_s, found.torch, found.fused_kopt) == (
        "0123456789",
        12.35,
        torch.__version__,
        fused_kopt.__version__,
    )
    assert rows.on_cpu(found.device)
    answers["status"] = " M perf/run.py"
    assert rows.git_commit() == "0123456789-dirty"
    assert rows.provenance(CPU, "given", 1.0).commit == "given"


# The report.


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_the_documents_show_what_the_rows_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert report.MARKED.search(text)
    assert report.filled(text, report.build(rows.read_all(rows.RESULTS))) == text


def test_every_table_is_shown_somewhere() -> None:
    shown = {name for page in report.PAGES for _, name, _ in report.MARKED.findall(page.read_text(encoding="utf-8"))}
    assert shown == set(report.build([]))


def test_tables_follow_the_newest_complete_run() -> None:
    old = [made("fused_kopt-compiled", 2.0, workload="1x25M"), made("torch-fused", 4.0, workload="1x25M")]
    new = [replace(row, date="2026-02-02T00:00:00+00:00", seconds=row.seconds * 3, host_seconds=row.seconds * 3) for row in old]
    alone = replace(old[0], date="2026-03-03T00:00:00+00:00", seconds=9.0)
    for found, expected in ((old, "| 2 s |"), (old + new, "| 6 s |"), ([*new, *old, alone], "| 6 s |")):
        assert expected in report.build(found)["optimizers"]
    assert report.build([alone])["optimizers"] == "No rows yet."
    classes = [made(key, 1.0, workload=KERAS3[0]) for key in ("fused_kopt-keras-auto", "keras-torch", "keras-subclass")]
    classes[1:] = [replace(row, seconds=row.seconds * n, host_seconds=row.seconds * n) for n, row in zip((5, 15), classes[1:], strict=True)]
    assert report.build([*old, *classes])["optimizers"] == report.build(old)["optimizers"]
    assert "| 200x640 adam plain | 1 s | 5 s | 5.0x | 15 s | 15.0x |" in report.build([*old, *classes])["keras3"]
    text = "<!-- perf:optimizers -->\nstale\n<!-- /perf -->"
    assert "stale" not in report.filled(text, report.build(old))
    with pytest.raises(ValueError, match="Received: perf:nothing"):
        report.filled("<!-- perf:nothing -->\n<!-- /perf -->", report.build(old))


def test_a_sample_is_said_in_every_table() -> None:
    keys = ("fused_kopt-compiled", "torch-fused")
    found = [
        made(key, 1.0, workload="1x25M", sample="rows/8", dtype=dtype, peak_bytes=3 * 2**20)
        for key in keys
        for dtype in ("float32", "float16")
    ]
    built = report.build([*found, *(replace(row, workload="5000x64") for row in found)])
    assert all("rows/8" in built[name] for name in ("optimizers", "small", "workloads", "variants", "providers"))
    assert "| fused_kopt-compiled | 1 s, +3 MiB | 1 s, +3 MiB |" in built["providers"]


def test_predictions_are_bytes_over_bandwidth() -> None:
    for name, expected in PREDICTED.items():
        assert tables.predicted(28 * TOTALS[name][1], tables.ASSUMED_COPY) == pytest.approx(expected, rel=0.01)
    assumed = report.build([])["predictions"]
    assert all(tables.seconds(tables.predicted(28 * TOTALS[name][1], 3e12)) in assumed for name in MODELS)
    gpu = [made(key, 1e-3, device="Some GPU", workload="W1", copy_gb_per_s=1000.0) for key in ("fused_kopt-triton", "torch-fused")]
    measured = report.build(gpu)["predictions"]
    assert "Some GPU, copy measured at 1 TB/s" in measured
    assert re.search(r"\| W1 \|.*\| 1 ms \|", measured)


@pytest.mark.parametrize(
    ("value", "text"), [(1.2345e-6, "1.23 us"), (99.96e-6, "100 us"), (0.9999e-3, "1 ms"), (0.0234, "23.4 ms"), (2.5, "2.5 s")]
)
def test_times_have_three_digits(value: float, text: str) -> None:
    assert tables.seconds(value) == text


def test_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from perf import figures

    keys = ("fused_kopt-compiled", "torch-fused", "keras-torch")
    found = [made(key, 0.01, workload="1x25M", optimizer=name) for key in keys for name in OPTIMIZERS]
    found += [made(key, 1e-5 * (i + 1), workload=name) for key in keys[:2] for i, name in enumerate(SWEEP)]
    cases = tables.newest(found)
    drawn = figures.draw(cases, tmp_path)
    assert [path.name for path in drawn] == ["roofline-some-cpu-2-cores.svg", "host-time-some-cpu-2-cores.svg"]
    first = [path.read_bytes() for path in drawn]
    assert b"Keras 3 on torch" in first[0]
    assert b"microseconds" in first[1]
    assert [path.read_bytes() for path in figures.draw(cases, tmp_path)] == first


# The command line.


@pytest.mark.usefixtures("small_triad")
def test_the_command_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--providers", "fused_kopt-reference,torch-foreach", "--workloads", "1x64,10x64", "--variants", "plain,clip"]
    assert command.main([*options, "--device", "cpu", "--budget-seconds", "60", "--out", str(tmp_path), "--commit", "abc"]) == 0
    found = rows.read_all(tmp_path)
    assert {(row.provider, row.workload, row.variant) for row in found} == {
        *itertools.product(("fused_kopt", "torch"), ("1x64", "10x64"), ("plain", "clip"))
    }
    assert {row.commit for row in found} == {"abc"}
    assert all(row.seconds == row.host_seconds > 0 and row.repetitions >= measure.LEAST for row in found)
    assert "of the stream" in capsys.readouterr().out


@pytest.mark.usefixtures("small_triad")
def test_the_command_fails_with_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: Any) -> Runner:
        raise RuntimeError("broken")

    monkeypatch.setattr(Borrowed, "make", broken)
    options = ["--providers", "fused_kopt-reference,torch-foreach", "--workloads", "1x64", "--device", "cpu"]
    assert command.main([*options, "--out", str(tmp_path)]) == 1
    assert {row.provider for row in rows.read_all(tmp_path)} == {"torch"}
    assert "FAILED: fused_kopt-reference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workloads", "W99"], "Unknown workload. Received: W99. Allowed: W1"),
        (["--optimizers", "adam,sgdd"], "Unknown optimizer. Received: sgdd. Allowed: sgd"),
        (["--dtype", "float8"], "Unknown dtype. Received: float8. Allowed: float32"),
        (["--variants", "none"], "Unknown variant. Received: none. Allowed: plain"),
        (["--providers", "jax-*"], "No provider matches. Received: 'jax-*'. Providers: fused_kopt-reference"),
        (["--sample", "0"], "--sample must be a power of two. Received: 0."),
    ],
)
def test_wrong_requests(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        command.main(options)
    assert raised.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_gpu_script() -> None:
    script = ROOT / "perf/gpu.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    text = script.read_text()
    seconds = {name: int(value) for name, value in re.findall(r"^(\w+)_seconds=(\d+)$", text, re.MULTILINE)}
    assert seconds["install"] + seconds["test"] + seconds["bench"] <= 9 * 60
    assert seconds["budget"] < seconds["bench"]
    assert script.stat().st_mode & 0o111
    (arguments,) = re.findall(r"^arguments=\((.*)\)$", text, re.MULTILINE)
    numbers = arguments.replace('"$budget_seconds"', "1").replace('"$out"', ".").split()
    assert command.parser().parse_args(numbers).budget_seconds == 1
