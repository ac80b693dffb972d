"""State dicts of torch.optim in, and out again: equal, and torch goes on from them bit for bit."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_kopt
from fused_kopt import checkpoint
from fused_kopt.checkpoint import Hints
from fused_kopt.errors import CheckpointError

EIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.3}),
    "momentum": ("SGD", {"lr": 0.07, "momentum": 0.9, "nesterov": True}),
    "rmsprop": ("RMSprop", {"lr": 0.013, "alpha": 0.8, "momentum": 0.7, "centered": True}),
    "adam": ("Adam", {"lr": 0.01, "betas": (0.8, 0.99)}),
    "amsgrad": ("Adam", {"amsgrad": True}),
    "adamw": ("AdamW", {"weight_decay": 0.1}),
    "adadelta": ("Adadelta", {"lr": 0.7, "rho": 0.8}),
    "adagrad": ("Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.2, "eps": 1e-7}),
    "adamax": ("Adamax", {"lr": 0.02}),
    "nadam": ("NAdam", {"lr": 0.02, "momentum_decay": 0.01}),
}
Named = list[tuple[str, Tensor]]


class Run:
    """A torch optimizer, its parameters and the gradients of its run."""

    def __init__(self, which: str, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        cls, given = EIGHT[which]
        self.random = torch.Generator().manual_seed(3)
        self.named: Named = [(name, self._draw(shape).to(dtype)) for name, shape in (("a", (3, 4)), ("b", (5,)), ("c", ()))]
        self.optimizer = getattr(torch.optim, cls)([{"params": self.named[:2]}, {"params": self.named[2:]}], **{**given, **options})

    def _draw(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def gradients(self) -> list[Tensor]:
        return [self._draw(tuple(v.shape)).to(v.dtype) for _, v in self.named]

    def step(self, gradients: list[Tensor]) -> None:
        for (_, variable), gradient in zip(self.named, gradients, strict=True):
            variable.grad = gradient
        self.optimizer.step()

    def train(self, count: int) -> None:
        for _ in range(count):
            self.step(self.gradients())


def same(first: Any, second: Any) -> bool:
    """Equal containers of equal tensors of equal dtypes."""
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", EIGHT)
def test_in_and_out_again(which: str, dtype: torch.dtype, tmp_path: Path) -> None:
    run = Run(which, dtype)
    run.optimizer.param_groups[1]["lr"] *= 0.3  # a group of its own
    run.train(5)
    state = run.optimizer.state_dict()
    checkpoint.write(tmp_path / "moved.safetensors", checkpoint.from_state_dict(state))
    moved = checkpoint.read(tmp_path / "moved.safetensors")
    assert same(checkpoint.to_state_dict(moved, run.named), state)
    checkpoint.write(tmp_path / "back.pt", moved)
    again, direct = Run(which, dtype), Run(which, dtype)
    again.optimizer.load_state_dict(torch.load(tmp_path / "back.pt", weights_only=True))
    direct.optimizer.load_state_dict(state)  # torch itself rounds NAdam's product to bfloat16
    assert same(again.optimizer.state_dict(), direct.optimizer.state_dict())


@pytest.mark.parametrize("which", [name for name in EIGHT if name != "adamw"])
@pytest.mark.filterwarnings("ignore:.*goes on with OptimizerV2's rule")  # told apart below
def test_fused_kopt_goes_on(which: str) -> None:
    run = Run(which, **({"eps": 1e-7} if which in ("rmsprop", "adam", "amsgrad", "adamax", "adadelta", "nadam") else {}))
    run.train(40)
    moved = checkpoint.from_state_dict(run.optimizer.state_dict())
    named = [(name, v.detach().clone()) for name, v in run.named]
    optimizer = checkpoint.new_optimizer(moved)
    checkpoint.restore(moved, optimizer, named)
    for _ in range(5):
        gradients = run.gradients()
        run.step(gradients)
        optimizer.apply_gradients(list(zip(gradients, (v for _, v in named), strict=True)))
    # rounding of scalars (float64 in torch, float32 in Keras), and epsilon's place: far below a step of 1e-3
    for (_, found), (_, expected) in zip(named, run.named, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_run_of_ours_goes_on_in_torch() -> None:
    """SGD with a schedule: the momentum is divided by the next step's learning rate."""
    schedule = fused_kopt.optimizers.schedules.ExponentialDecay(0.1, 4, 0.5)
    optimizer = fused_kopt.SGD(schedule, momentum=0.9)
    variable, gradient = torch.ones(4, dtype=torch.float64), torch.arange(4, dtype=torch.float64)
    for _ in range(3):
        optimizer.apply_gradients([(gradient, variable)])
    taken = checkpoint.capture(optimizer, [("w", variable)])
    with pytest.warns(UserWarning, match="keeps schedules apart"):
        state = checkpoint.to_state_dict(taken, [("w", variable)])
    twin = variable.clone()
    theirs = torch.optim.SGD([("w", twin)], lr=1.0)
    theirs.load_state_dict(state)
    twin.grad = gradient
    theirs.step()
    optimizer.apply_gradients([(gradient, variable)])
    torch.testing.assert_close(twin, variable, rtol=1e-7, atol=0)  # hyperparameters are float32 in Keras


def test_multipliers_become_groups() -> None:
    optimizer, pair = fused_kopt.Adam(0.5), [("a", torch.ones(2)), ("b", torch.ones(3))]
    optimizer.scale_learning_rate([pair[1][1]], 0.25)
    optimizer.apply_gradients([(torch.ones_like(v), v) for _, v in pair])
    groups = checkpoint.to_state_dict(checkpoint.capture(optimizer, pair))["param_groups"]
    assert [(group["lr"], group["param_names"], group["params"]) for group in groups] == [(0.5, ["a"], [0]), (0.125, ["b"], [1])]


def test_positions_need_names_and_shapes_are_checked(tmp_path: Path) -> None:
    variables = [torch.ones(2), torch.ones(3)]
    optimizer = torch.optim.Adam(variables)
    for variable in variables:
        variable.grad = variable.clone()
    optimizer.step()
    path = tmp_path / "run.ckpt"
    torch.save({"epoch": 3, "optimizer_states": [optimizer.state_dict()]}, path)  # as Lightning does
    with pytest.raises(CheckpointError, match="positions only"):
        checkpoint.read(path)
    with pytest.raises(CheckpointError, match="shapes are not those"):
        checkpoint.read(path, Hints(list(zip("ba", reversed(variables), strict=True))))
    with pytest.raises(CheckpointError, match="2 parameters, but 3"):
        checkpoint.read(path, Hints(["a", "b", "c"]))
    assert checkpoint.read(path, Hints(["a", "b"])).iterations == 1


@pytest.mark.parametrize(
    ("which", "told"), [("adam", r"sqrt\(v / \(1 - beta_2\^t\)\)"), ("adamax", "norm contains epsilon"), ("rmsprop", "epsilon")]
)
def test_other_update_rules_are_told(which: str, told: str) -> None:
    run = Run(which)
    run.train(1)
    moved = checkpoint.from_state_dict(run.optimizer.state_dict())
    with pytest.warns(UserWarning, match=told):
        checkpoint.restore(moved, checkpoint.new_optimizer(moved), run.named)


def changed(which: str, change: Callable[[dict[str, Any]], object], **options: Any) -> Callable[[], Any]:
    def call() -> Any:
        run = Run(which, **options)
        run.train(2)
        state = copy.deepcopy(run.optimizer.state_dict())
        change(state)
        return checkpoint.from_state_dict(state)

    return call


def left(state: Any) -> None:
    pass


def ours(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: checkpoint.to_state_dict(checkpoint.capture(getattr(fused_kopt, name)(**options), [("a", torch.ones(1))]))


ROWS: dict[str, tuple[Callable[[], Any], str]] = {
    "an L2 penalty": (changed("adam", left, weight_decay=0.1), "weight_decay"),
    "maximize": (changed("adam", left, maximize=True), "maximize"),
    "dampening": (changed("momentum", left, nesterov=False, dampening=0.1), "dampening"),
    "epsilon 0": (changed("adam", left, eps=0), "epsilon cannot be 0"),
    "another class": (lambda: checkpoint.from_state_dict(torch.optim.RAdam([("a", torch.ones(1))]).state_dict()), "belongs to none"),
    "two classes": (changed("adam", lambda s: s["param_groups"][1].update(dampening=0)), "different classes"),
    "steps that differ": (changed("adam", lambda s: s["state"][1]["step"].fill_(7)), "`step` differs"),
    "products that differ": (changed("nadam", lambda s: s["state"][1]["mu_product"].fill_(0.5)), "`mu_product` differs"),
    "unknown entries": (changed("adam", lambda s: s["state"][0].update(other=torch.ones(1))), "no known meaning"),
    "no state_dict": (lambda: checkpoint.from_state_dict({"weight": torch.ones(1)}), "Not a state_dict"),
    "a state without parameter": (changed("adam", lambda s: s["state"].update({9: {}})), "do not fit"),
    "a class torch lacks": (ours("Ftrl"), "torch.optim has no Ftrl"),
    "a setting torch lacks": (ours("Adam", clipvalue=0.5), "clipvalue"),
    "a decay torch lacks": (ours("Adam", decay=0.5), "decay"),
}


@pytest.mark.parametrize("row", ROWS)
def test_refusals(row: str) -> None:
    call, message = ROWS[row]
    with pytest.raises(CheckpointError, match=message):
        call()


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    torch.save({"state": {}, "param_groups": [{"params": [0], "hook": Path("x")}]}, path)
    with pytest.raises(CheckpointError, match="weights_only=True"):
        checkpoint.read(path)
    path.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="weights_only=True"):
        checkpoint.read(path)
    torch.save({"state": {}, "param_groups": [{"params": [0], "param_names": ["a"], "rho": 0.9}]}, path)
    with pytest.raises(CheckpointError, match="lacks 'lr'"):
        checkpoint.read(path)
    torch.save({"model": {}}, path)
    with pytest.raises(CheckpointError, match="contains 0 optimizer state_dicts"):
        checkpoint.read(path)
