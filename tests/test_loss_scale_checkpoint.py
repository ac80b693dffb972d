"""A loss scale in checkpoints."""

import math
from pathlib import Path
from typing import Any

import pytest
import support
import torch
from torch import Tensor

import fused_kopt
from fused_kopt import checkpoint
from fused_kopt.errors import CheckpointError
from fused_kopt.mixed_precision import LossScaleOptimizer


def trained(rule: str, values: Any = (1.0, math.inf, 2.0)) -> tuple[Any, dict[str, Tensor]]:
    optimizer: Any = LossScaleOptimizer(support.build(rule), dynamic_growth_steps=2)
    variables = {"a": torch.ones(3), "b": torch.ones(2, 2)}
    train(optimizer, variables, values)
    return optimizer, variables


def train(optimizer: Any, variables: dict[str, Tensor], values: Any) -> None:
    for value in values:
        optimizer.apply_scaled_gradients([(torch.full_like(v, value), v) for v in variables.values()])


@pytest.mark.parametrize("filed", [False, True], ids=["neutral", "file"])
@pytest.mark.parametrize("rule", ["adam", "nadam", "sgd"])
def test_a_run_goes_on(rule: str, filed: bool, tmp_path: Path) -> None:
    optimizer, variables = trained(rule)
    resumed, others = trained(rule, ())
    if filed:
        checkpoint.save(tmp_path / "run.safetensors", optimizer, variables, with_values=True)
        checkpoint.load(tmp_path / "run.safetensors", resumed, others, with_values=True)
    else:
        captured = checkpoint.capture(optimizer, variables, with_values=True)
        assert captured.class_name == support.RULES[rule][0]
        assert {"loss_scale", "dynamic_counter"} <= set(captured.extra)
        checkpoint.restore(captured, resumed, others, with_values=True)
    for each, mine in ((optimizer, variables), (resumed, others)):
        train(each, mine, (3.0, math.nan, 4.0))
    support.assert_same(support.state(optimizer, [*variables.values()]), support.state(resumed, [*others.values()]))
    assert float(resumed.loss_scale) == float(optimizer.loss_scale) == 2.0**14
    assert int(resumed.dynamic_counter) == int(optimizer.dynamic_counter) == 1


def test_into_a_run_with_a_scale_and_out_of_one() -> None:
    optimizer, variables = trained("adam")
    captured = checkpoint.capture(optimizer, variables)
    for other in (fused_kopt.Adam(), LossScaleOptimizer(fused_kopt.Adam(), dynamic=False, initial_scale=8)):
        with pytest.raises(CheckpointError, match="loss_scale"):
            checkpoint.restore(captured, other, variables)  # type: ignore[arg-type]
        assert other.weights == []
    plain = checkpoint.capture(optimizer.inner_optimizer, variables)
    resumed: Any = LossScaleOptimizer(fused_kopt.Adam(), initial_scale=4)
    checkpoint.restore(plain, resumed, variables)
    assert (float(resumed.loss_scale), int(resumed.iterations)) == (4.0, 3)


def test_other_formats_hold_the_inner_state_only() -> None:
    optimizer, variables = trained("adam")
    captured = checkpoint.capture(optimizer, variables)
    weights = checkpoint.to_weights(captured)
    assert len(weights) == len(optimizer.get_weights())
    assert checkpoint.from_weights(weights, optimizer, variables).class_name == "Adam"
    assert set(checkpoint.to_state_dict(captured)["state"]) == {0, 1}


@pytest.mark.parametrize(
    ("name", "value"), [("loss_scale", 0.0), ("loss_scale", math.inf), ("dynamic_counter", 0.5), ("dynamic_counter", None)]
)
def test_a_damaged_scale_is_refused(name: str, value: float | None) -> None:
    optimizer, variables = trained("adam")
    captured = checkpoint.capture(optimizer, variables)
    captured.extra.pop(name)
    if value is not None:
        captured.extra[name] = torch.tensor(value)
    resumed, others = trained("adam", ())
    with pytest.raises(CheckpointError, match="A loss scale must be a finite number"):
        checkpoint.restore(captured, resumed, others)
    assert resumed.weights == []
