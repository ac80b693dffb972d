"""torch_optim under what drives optimizers: schedulers, GradScaler, hooks, the profiler, torch.compile, averaging, in-backward, ZeRO."""

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same, bits, randn
from torch.optim import lr_scheduler
from torch_classes import CASES, ONE_EACH, build, closure_of, give, mlp, parameters, snapshot, steps

from fused_kopt import torch_optim

# torch.distributed.optim scripts its functions when it is imported
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")

each_class = pytest.mark.parametrize("case", ONE_EACH.values(), ids=list(ONE_EACH))

SCHEDULES: dict[str, Any] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: min(1.0, (epoch + 1) / 3)),
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "sequential": lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.ConstantLR(o), lr_scheduler.PolynomialLR(o)], [3]),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, 0.5, 3),
}


@pytest.mark.slow(every=4)
@pytest.mark.parametrize("schedule", SCHEDULES)
@each_class
def test_schedulers(case: str, schedule: str) -> None:
    """Every step takes the rate that the scheduler left: the bits of setting it by hand, as with torch.optim's own."""
    params, others = parameters(), parameters()
    optimizer, by_hand = build(case, params, lr=0.5), build(case, others, lr=0.5)
    torchs = torch.optim.SGD(parameters(), lr=0.5)
    mine, its = SCHEDULES[schedule](optimizer), SCHEDULES[schedule](torchs)
    for step in range(6):
        give(torchs.param_groups[0]["params"], step)
        torchs.step()
        by_hand.param_groups[0]["lr"] = torchs.param_groups[0]["lr"]
        steps(optimizer, params, [step])
        steps(by_hand, others, [step])
        for scheduler in (mine, its):
            scheduler.step(*[1.0] * (schedule == "plateau"))
    assert optimizer.param_groups[0]["lr"] == torchs.param_groups[0]["lr"]
    assert_same(snapshot(optimizer, params), snapshot(by_hand, others))


@pytest.mark.parametrize("schedule", [lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR])
@pytest.mark.parametrize("case", ["momentum", "rmsprop_all", "adam", "adamax", "nadam", "lion"])
def test_schedulers_that_cycle_momentum(case: str, schedule: Any) -> None:
    params = parameters()
    optimizer = build(case, params)
    keywords = {"total_steps": 10} if schedule is lr_scheduler.OneCycleLR else {"step_size_up": 3, "base_lr": 0.01}
    scheduler = schedule(optimizer, max_lr=0.1, **keywords)
    seen = set()
    for step in range(6):
        steps(optimizer, params, [step])
        scheduler.step()
        group = optimizer.param_groups[0]
        seen.add(group["momentum"] if "momentum" in group else group["betas"][0])
    assert len(seen) > 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_learning_rate_in_a_tensor(dtype: torch.dtype) -> None:
    rate = torch.tensor(0.5, dtype=dtype)
    params, others = parameters(), parameters()
    optimizer, reference = torch_optim.Adam(params, lr=rate), torch_optim.Adam(others, lr=0.5)
    scheduler, its = (lr_scheduler.ExponentialLR(o, 0.5) for o in (optimizer, reference))
    for step in range(4):
        steps(optimizer, params, [step])
        steps(reference, others, [step])
        scheduler.step()
        its.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert_same(snapshot(optimizer, params), snapshot(reference, others))


class Scaled:
    """A model in training under a GradScaler; some steps overflow."""

    def __init__(self, case: str, amp: Any) -> None:
        self.model = mlp()
        self.optimizer = build(case, self.model.parameters(), amp=amp)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        self.scales: list[float] = []

    def run(self, count: int, unscale: bool = False) -> list[Any]:
        for step in range(count):
            self.optimizer.zero_grad()
            loss = self.model(randn(6, 4, seed=step)).square().mean()
            self.scaler.scale(loss).backward()
            if step in (1, 4):
                self.model[0].bias.grad[2] = float("inf" if step == 1 else "nan")
            if unscale:
                self.scaler.unscale_(self.optimizer)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scales.append(self.scaler.get_scale())
        return snapshot(self.optimizer, list(self.model.parameters()))


@pytest.mark.parametrize("unscale", [False, True])
@each_class
def test_grad_scaler(case: str, unscale: bool) -> None:
    """Unscaled in the launch or before it: the same bits, and steps with infinite gradients change and count nothing."""
    plain, fused = Scaled(case, None), Scaled(case, "fused")
    assert_same(fused.run(7, unscale), plain.run(7, unscale))
    assert fused.scales == plain.scales
    assert float(fused.optimizer.state[fused.model[0].weight]["step"]) == 5
    assert not hasattr(fused.optimizer, "found_inf")


def test_the_flag_of_grad_scalers_is_off_unless_asked_for() -> None:
    assert not torch_optim.Adam(parameters())._step_supports_amp_scaling
    optimizer = torch_optim.Adam(parameters(), amp="fused")
    assert copy.deepcopy(optimizer)._step_supports_amp_scaling


@each_class
def test_hooks_and_profiler(case: str) -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    params, order = parameters(), []
    optimizer = build(case, params)
    give(params, 0)
    optimizer.register_step_pre_hook(lambda *_: order.append("before"))
    optimizer.register_step_post_hook(lambda *_: order.append("after"))
    handle = register_optimizer_step_post_hook(lambda *_: order.append("global"))
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
    handle.remove()
    assert order == ["before", "after", "global"]
    assert f"Optimizer.step#{type(optimizer).__name__}.step" in {event.key for event in profile.key_averages()}


@pytest.mark.slow(every=10)
@each_class
def test_torch_compile_breaks_the_graph_once(case: str) -> None:
    model, other = mlp(), mlp()
    optimizer, reference = build(case, model.parameters()), build(case, other.parameters())

    def train(step: int) -> None:
        optimizer.zero_grad()
        model(randn(6, 4, seed=step)).square().mean().backward()
        optimizer.step()

    compiled = torch.compile(train, backend="eager")
    for step in range(3):
        compiled(step)
        closure_of(other, reference, step)()
        reference.step()
    torch._dynamo.reset()
    assert_same(snapshot(optimizer, list(model.parameters())), snapshot(reference, list(other.parameters())))


def test_averaged_model() -> None:
    model = mlp()
    optimizer = torch_optim.Adam(model.parameters())
    average = torch.optim.swa_utils.AveragedModel(model)
    seen = []
    for step in range(3):
        optimizer.step(closure_of(model, optimizer, step))
        average.update_parameters(model)
        seen.append(model[0].weight.detach().clone())
    torch.testing.assert_close(average.module[0].weight, torch.stack(seen).mean(0))


@each_class
def test_one_optimizer_per_parameter_in_backward(case: str) -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    model, other = mlp(), mlp()
    config = CASES[case]
    _apply_optimizer_in_backward(getattr(torch_optim, config.cls), model.parameters(), dict(config.keywords))
    reference = build(case, other.parameters())
    for step in range(3):
        model(randn(6, 4, seed=step)).square().mean().backward()
        closure_of(other, reference, step)()
        reference.step()
    assert_same([bits(p) for p in model.parameters()], [bits(p) for p in other.parameters()])
    assert all(p.grad is None for p in model.parameters())


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@each_class
def test_zero_redundancy_optimizer(case: str, one_rank: None) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, other = mlp(), mlp()
    config = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about TorchScript
        optimizer = ZeroRedundancyOptimizer(model.parameters(), getattr(torch_optim, config.cls), **config.keywords)
    reference = build(case, other.parameters())
    for step in range(3):
        closure_of(model, optimizer, step)()
        optimizer.step()
        closure_of(other, reference, step)()
        reference.step()
    assert_same([bits(p) for p in model.parameters()], [bits(p) for p in other.parameters()])
    optimizer.consolidate_state_dict()
    assert set(optimizer.state_dict()["state"]) == {0, 1, 2, 3}


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
@each_class
def test_sharded_parameters_on_one_rank(case: str, first: torch.dtype, one_rank: None) -> None:
    """DTensors: the step works on the local memory, states are DTensors like their parameters, checkpoints come back."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model, other = mlp().to(first), mlp().to(first)
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    optimizer, reference = build(case, model.parameters(), executor="compiled"), build(case, other.parameters())
    for step in range(4):
        for one, owner in ((model, optimizer), (other, reference)):
            owner.zero_grad()
            one(randn(6, 4, seed=step, dtype=first)).square().mean().backward()
            owner.step()
        optimizer.load_state_dict(optimizer.state_dict())
    whole = {name: p.full_tensor() for name, p in model.named_parameters()}
    assert_same([bits(p) for p in whole.values()], [bits(p) for p in other.parameters()])
    slots = [slot for p in model.parameters() for slot in optimizer.state[p].values() if slot.dim()]
    assert all(isinstance(slot, DTensor) for slot in slots)
    optimizer.clipnorm = reference.clipnorm = 1e-4  # type: ignore[attr-defined]
    for owner in (optimizer, reference):
        owner.step()
    assert_same([bits(p.full_tensor()) for p in model.parameters()], [bits(p) for p in other.parameters()])  # type: ignore[attr-defined]


def test_subclasses_as_fabric_makes_them() -> None:
    """`type(name, (wrapper, class))` around an instance's dictionary."""

    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.__dict__ = dict(optimizer.__dict__)

    params = parameters()
    optimizer = torch_optim.Adam(params)
    wrapped = type("FabricAdam", (Wrapper, torch_optim.Adam), {})(optimizer)
    give(params, 0)
    wrapped.step()
    assert float(optimizer.state[params[0]]["step"]) == 1
