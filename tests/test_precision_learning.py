"""What precision policies are for: small steps are not lost, a split master loses nothing, 8 bits train as well as 32."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from matplotlib import image
from rich.console import Console
from support import RULES, build
from terminal import Run
from torch import Tensor

import fused_kopt
from fused_kopt import Precision, precision
from fused_kopt.commands import experiment, tasks
from fused_kopt.commands import precision as command
from perf import precision as perf_precision

BF16 = torch.bfloat16
MASTERED = ("bf16_master", "bf16_split", "bf16_kahan", "bf16_8bit")

# Steps far below half a unit in the last place of a bfloat16.


def walked(policy: str | Precision, steps: int = 512, elements: int = 4096) -> Tensor:
    """How far SGD's steps of 2^-13 have moved variables from 1, where a bfloat16's neighbours are 2^-8 and 2^-7 away."""
    variable, gradient = torch.ones(elements, dtype=BF16), torch.full((elements,), 2.0**-13, dtype=BF16)
    optimizer = fused_kopt.SGD(1.0, precision=policy, executor="compiled")
    for _ in range(steps):
        optimizer.apply_gradients([(gradient, variable)])
    return 1 - optimizer.get_master(variable).double()


@pytest.mark.parametrize("policy", MASTERED)
def test_small_steps_add_up(policy: str) -> None:
    # 512 steps of 2^-13 are 2^-4. Kahan's compensation and int8's remainder keep these powers of two exactly.
    assert torch.equal(walked(policy), torch.full((4096,), 2.0**-4, dtype=torch.float64))


@pytest.mark.parametrize("policy", ["bf16_stochastic", Precision(rounding="stochastic", seed=3)], ids=str)
def test_small_steps_add_up_on_average(policy: Any) -> None:
    way = walked(policy)
    # Each of 512 steps rounds down with probability 2^-13 / 2^-8 = 1/32: the variance is at most 512 * 2^-16 / 32, over 4,096
    # elements, so 5 standard deviations of the mean are 5 * 2^-8 * 4 / 64 = 0.0012. Seeds are fixed.
    assert abs(float(way.mean()) - 2.0**-4) < 0.0012
    assert float(way.std()) < 2.0**-8 * 4 * 1.2


@pytest.mark.parametrize("policy", ["float32", experiment.POLICIES[experiment.CONTROL]], ids=str)
def test_without_them_nothing_moves(policy: Any) -> None:
    """The control, which shows that the two tests above can fail."""
    assert not walked(policy).any()


@pytest.mark.parametrize("policy", [*precision.NAMED, experiment.CONTROL])
def test_adam_reaches_its_goal_by_small_steps(policy: str) -> None:
    """From 1 to 1.25 by steps of 0.001, a quarter of what a bfloat16 between 1 and 2 needs to move at all."""
    variable, goal = torch.ones(1000, dtype=BF16), 1.25
    optimizer = fused_kopt.Adam(1e-3, precision=experiment.POLICIES[policy], executor="compiled")
    for _ in range(600):
        optimizer.apply_gradients([(variable - goal, variable)])
    reached = float(variable.double().mean())
    if policy in ("float32", experiment.CONTROL):  # bfloat16 variables without anything to help
        assert reached == 1.0
    else:
        assert abs(reached - goal) < 2.0**-7  # one bfloat16 there


# A split master is the float32.


@pytest.mark.slow(every=4)
@pytest.mark.parametrize("rule", RULES)
def test_a_split_master_is_float32_training(rule: str) -> None:
    """1,000 steps with the same bfloat16 gradients: the master and the slots have float32's bits."""
    generator = torch.Generator().manual_seed(5)
    first = torch.randn(777, generator=generator).bfloat16()
    split, whole = first.clone(), first.float()
    options = {} if rule == "lion" else {"decay": 1e-3}
    packed, plain = (build(rule, "compiled", precision=policy, **options) for policy in ("bf16_split", "float32"))
    for step in range(1000):
        gradient = (torch.randn(777, generator=generator) * 10.0 ** (step % 5 - 3)).bfloat16()
        packed.apply_gradients([(gradient, split)])
        plain.apply_gradients([(gradient, whole)])
    assert not torch.equal(whole, first.float())
    assert torch.equal(packed.get_master(split), whole)
    assert (split.float() - whole).abs().max() <= whole.abs().max() * 2.0**-8  # the variable is its master, rounded
    for name in plain.get_slot_names():
        assert torch.equal(packed.get_slot(split, name), plain.get_slot(whole, name)), name


# The experiment.


def run(policies: Sequence[str] = (), task: str = "digits", steps: int = 12) -> list[experiment.Run]:
    work = experiment.Experiment(tasks.TASKS[task](), "adam", steps)
    return work.run(policies or tuple(experiment.POLICIES), 0)


@pytest.fixture(scope="module")
def runs() -> list[experiment.Run]:
    return run()


# By hand: variable, gradient, slots and what a master keeps; a step reads the gradient once and the rest twice.
BYTES = {
    "float64": (32, 56),
    "float32": (16, 28),
    "bf16_master": (16, 30),
    "bf16_split": (14, 26),
    "bf16_kahan": (10, 18),
    "bf16_stochastic": (8, 14),
    "bf16_8bit": (7.125, 12.25),
    "bf16_plain": (8, 14),
}


def test_bytes_of_the_table(runs: list[experiment.Run]) -> None:
    assert {run.policy: experiment.per_element(run.memory) for run in runs} == BYTES
    for run in runs:
        padding = run.memory.padding + run.memory.tables
        assert run.allocated == run.memory.at_rest - padding
        # scales of groups that no variable fills: at most one of 4 bytes for each of 6 variables and 2 slots
        assert 0 <= run.allocated / 3706 - BYTES[run.policy][0] <= 6 * 2 * 4 / 3706


def test_the_oracle_is_compared_with_itself(runs: list[experiment.Run]) -> None:
    assert [run.policy for run in runs] == list(BYTES)
    assert all(point[1:] == (0, 0) for point in runs[0].points)
    assert [point.step for point in runs[1].points] == list(range(1, 13))
    assert all(0 < point.error < 1e-3 for point in runs[1].points)  # float32 beside float64
    assert all(0 < run.points[-1].error < 1 for run in runs[2:])
    assert len({tuple(run.losses[:1]) for run in runs[2:]}) == 1  # all begin from the same weights and batch


def test_error_and_bias() -> None:
    first, oracle = torch.zeros(4, dtype=torch.float64), torch.tensor([1.0, -1.0, 2.0, 0.0], dtype=torch.float64)
    assert experiment.compare(oracle, oracle, first, 3) == (3, 0, 0)
    assert experiment.compare(first, oracle, first, 1) == (1, 1, -1)  # has not moved
    assert experiment.compare(0.75 * oracle, oracle, first, 1) == (1, 0.25, -0.25)  # lags behind by a quarter
    aside = oracle + torch.tensor([0.0, 0.0, 0.0, 6.0**0.5 / 2], dtype=torch.float64)
    assert experiment.compare(aside, oracle, first, 1) == pytest.approx((1, 0.5, 0))


def test_the_experiment_repeats_itself(runs: list[experiment.Run]) -> None:
    state = torch.get_rng_state()
    again = run(("bf16_8bit",))
    assert [(r.losses, r.points, r.loss) for r in again] == [(r.losses, r.points, r.loss) for r in (runs[0], runs[6])]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow(every=9)
@pytest.mark.parametrize("optimizer", experiment.OPTIMIZERS)
def test_every_optimizer_runs_under_every_policy(optimizer: str) -> None:
    for found in experiment.Experiment(tasks.digits(), optimizer, 5).run(tuple(experiment.POLICIES), 1):
        assert 0 < found.loss < 5
        assert len(found.losses) == len(found.points) == 5


def test_the_command(run: Run, tmp_path: Path) -> None:
    options = ("--steps", 6, "--seeds", 2, "--policies", "float32,bf16_8bit,bf16_plain")
    paths = [tmp_path / "new" / name for name in ("a.svg", "b.svg", "c.png")]
    results = [run("precision", *options, "--output", path, "--rows", tmp_path / "rows.csv") for path in paths]
    assert [result.code for result in results] == [0, 0, 0]
    assert [row[0] for row in results[0].rows] == ["float64", "float32", "bf16_8bit", "bf16_plain"]
    assert [row[1:4] for row in results[0].rows[2:]] == [["7.125", "7.132", "12.25"], ["8", "8", "14"]]
    assert results[0].out.replace(str(paths[0]), "") == results[1].out.replace(str(paths[1]), "")
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert image.imread(paths[2]).shape[2] == 4
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * 2 * 4
    assert lines[0].startswith("date,machine,python,torch,fused_kopt,task,optimizer,steps,policy,seed")


def test_the_language_model(run: Run, tmp_path: Path) -> None:
    options = ("--task", "language", "--optimizer", "lion", "--steps", 3, "--seeds", 1, "--policies", "bf16_split")
    result = run("precision", *options, "--output", tmp_path / "a.png")
    assert [row[0] for row in result.rows] == ["float64", "bf16_split"]
    assert "language, Lion, 3 steps, seeds: 1, elements: 68,167" in result.out
    assert result.rows[1][7] == ""  # no float32 to be compared with


def test_the_language_task_is_real_text_and_causal() -> None:
    task = tasks.language()
    assert len(task.inputs) > 10_000
    assert torch.equal(task.inputs[:, 1:], task.labels[:, :-1])
    model, weights = task.initial(0)
    inputs = task.inputs[:2].clone()
    with torch.no_grad():
        before = model(inputs)
        inputs[:, 20:] = 0
        after = model(inputs)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])
    assert float(task.loss(model, weights, torch.arange(8))) == pytest.approx(math.log(103), rel=0.1)  # knows nothing yet


def test_the_pages_tables_are_of_the_rows(tmp_path: Path) -> None:
    made = command.Row(
        "2026-01-02", "m", "3.11", "2.13", "0.1", "digits", "adam", 9, "float32", 0, 5, 16.0, 28.0, 16.0, 0.0, 0.01, 0.5, 0.9
    )
    command.append(tmp_path / "digits.csv", [replace(made, date="2025-01-01", loss=7.0)])
    found = [
        replace(made, policy=policy, seed=s, loss=x) for policy, s, x in (("float32", 0, 0.5), ("float32", 1, 0.7), ("bf16_8bit", 1, 0.8))
    ]
    command.append(tmp_path / "digits.csv", found)
    built = perf_precision.build(tmp_path)
    assert built["precision-language"] == "No rows yet."
    assert "| float32 | 16 | 16 | 28 | +0.00 ± 0.00 | 1 ± 0 | 0.6000 ± 0.1414 |  | 90.0 ± 0.0 |" in built["precision-digits"]
    assert "| bf16_8bit | 16 | 16 | 28 | +0.00 | 1 | 0.8000 | +0.1000 | 90.0 |" in built["precision-digits"]
    assert "7.0" not in built["precision-digits"]
    (tmp_path / "language.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="other columns"):
        perf_precision.build(tmp_path)


def test_the_rows_that_are_kept_hold_the_claim() -> None:
    """Five seeds on both tasks; `--slow` measures them anew."""
    for task in tasks.TASKS:
        kept = command.by_policy(perf_precision.read(perf_precision.FOLDER / f"{task}.csv"))
        noise, losses = _noise({policy: [row.loss for row in rows] for policy, rows in kept.items()})
        assert len(kept["float32"]) == 5
        assert all(abs(losses[policy]) < noise for policy in ("bf16_master", "bf16_split", "bf16_kahan", "bf16_stochastic", "bf16_8bit"))
        assert losses[experiment.CONTROL] > noise
        assert all(kept[policy][0].rest_bytes == BYTES[policy][0] for policy in BYTES)


REFUSED: dict[str, tuple[str, str]] = {
    "a suffix": ("precision --output a.jpg", "--output: must end in .png or .svg. Received: a.jpg."),
    "a policy": ("precision --policies bf16", "unknown: 'bf16'. Choose from float32,bf16_master"),
    "a task": ("precision --task mnist", "invalid choice: 'mnist'"),
    "a folder": (f"precision --output {__file__}/a.png", "--out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, run: Run) -> None:
    arguments, text = REFUSED[case]
    result = run(*arguments.split())
    assert result.code == 2
    assert text in result.err


# The claim: five seeds, paired. A policy's loss is float32's within noise if the mean difference is below the spread of float32's own
# losses over the seeds, their standard deviation: what another seed changes. The control's is not.


def _noise(losses: dict[str, list[float]]) -> tuple[float, dict[str, float]]:
    """The standard deviation of float32's losses, and each policy's mean difference from them."""
    pairs = {policy: zip(mine, losses["float32"], strict=True) for policy, mine in losses.items()}
    return stdev(losses["float32"]), {policy: fmean(a - b for a, b in both) for policy, both in pairs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("task", tasks.TASKS)
def test_eight_bits_train_as_well_as_float32(task: str) -> None:
    settings = command.Settings(task=task, policies=("float32", "bf16_8bit", experiment.CONTROL), seeds=5)
    losses: dict[str, list[float]] = {}
    for found in command.measure(settings, Console(quiet=True)):
        losses.setdefault(found.policy, []).append(found.loss)
    noise, differences = _noise(losses)
    assert abs(differences["bf16_8bit"]) < noise
    assert differences[experiment.CONTROL] > noise
