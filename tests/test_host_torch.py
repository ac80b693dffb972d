"""What torch itself builds around an optimizer: schedulers, averages, compiled models, steps inside backward, other processes."""

import pickle
from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest
import torch
from hosts import OPTIONS, assert_equal, make, torch_optim
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 6
BATCHES = [torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(STEPS)]

each = pytest.mark.parametrize("name", OPTIONS)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def train(model: Any, optimizer: Any, inputs: list[Tensor] = BATCHES, then: Callable[[], object] = lambda: None) -> None:
    for x in inputs:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        then()


def straight(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A run that nothing happens to."""
    model = network()
    optimizer = make(name, model.parameters())
    train(model, optimizer)
    return model, optimizer


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    return model.state_dict(), optimizer.state_dict()


def pickled(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


def saved(pair: Any) -> Any:
    file = BytesIO()
    torch.save(pair, file)
    return torch.load(BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("way", [pickled, saved])
@each
def test_model_and_optimizer_move_together(name: str, way: Callable[[Any], Any]) -> None:
    model = network()
    optimizer = make(name, model.parameters())
    train(model, optimizer, BATCHES[:3])
    moved, resumed = way((model, optimizer))
    train(moved, resumed, BATCHES[3:])
    assert_equal(states(moved, resumed), states(*straight(name)))


def swapped_data(model: nn.Module, optimizer: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def through_a_vector(model: nn.Module, optimizer: Any) -> None:
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()).detach(), model.parameters())


def shared(model: nn.Module, optimizer: Any) -> None:
    model.share_memory()


def loaded_into_itself(model: nn.Module, optimizer: Any) -> None:
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})
    optimizer.load_state_dict(optimizer.state_dict())


def described(model: nn.Module, optimizer: Any) -> None:
    repr(optimizer), optimizer.state_dict(), optimizer.describe()


@pytest.mark.parametrize("event", [swapped_data, through_a_vector, shared, loaded_into_itself, described])
@each
def test_what_changes_nothing(name: str, event: Callable[[nn.Module, Any], None]) -> None:
    model = network()
    optimizer = make(name, model.parameters())
    train(model, optimizer, BATCHES[:3])
    event(model, optimizer)
    train(model, optimizer, BATCHES[3:])
    assert all(parameter.is_shared() is (event is shared) for parameter in model.parameters())
    assert_equal(states(model, optimizer), states(*straight(name)))


@each
def test_compiled_models_and_steps(name: str) -> None:
    model = network()
    optimizer = make(name, model.parameters())
    compiled: Any = torch.compile(model, backend="eager")
    step: Any = torch.compile(lambda: optimizer.step(), backend="eager")  # one clean graph break
    for x in BATCHES:
        optimizer.zero_grad()
        compiled(x).square().mean().backward()
        step()
    assert_equal(states(model, optimizer), states(*straight(name)))


@each
def test_an_optimizer_per_parameter_steps_inside_backward(name: str) -> None:
    model = network()
    owners = {parameter: make(name, [parameter]) for parameter in model.parameters()}

    def release(parameter: Tensor) -> None:
        owners[parameter].step()
        owners[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(release)
    for x in BATCHES:
        model(x).square().mean().backward()
    assert_equal(model.state_dict(), straight(name)[0].state_dict())


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS),
    "cyclic": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.001, 0.1, step_size_up=2),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2),
    "chained": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer, total_iters=2), lr_scheduler.ExponentialLR(optimizer, 0.5)], [2]
    ),
    "averaging": lambda optimizer: SWALR(optimizer, 0.001, anneal_epochs=2),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # SequentialLR's own
@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_schedulers_set_what_the_next_step_uses(name: str, schedule: str) -> None:
    """Also momentum and betas, which cycle the other way: as if the groups were set by hand."""
    model, by_hand = network(), network()
    optimizer, other = make(name, model.parameters()), make(name, by_hand.parameters())
    stepper = SCHEDULERS[schedule](optimizer)
    rates = set()
    for x in BATCHES:
        group = optimizer.param_groups[0]
        rates.add(group["lr"])
        other.param_groups[0].update({key: group[key] for key in ("lr", "betas", "momentum") if key in group})
        train(by_hand, other, [x])
        train(model, optimizer, [x], stepper.step)
    assert len(rates) > 1
    assert_equal(model.state_dict(), by_hand.state_dict())


def test_reduce_on_plateau() -> None:
    model = network()
    optimizer = make("AdamW", model.parameters())
    stepper = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
    train(model, optimizer, then=lambda: stepper.step(1.0))
    assert optimizer.param_groups[0]["lr"] == OPTIONS["AdamW"]["lr"] * 0.5**2


@each
def test_averaged_models(name: str) -> None:
    model = network()
    optimizer = make(name, model.parameters())
    averaged, seen = AveragedModel(model), []

    def average() -> None:
        averaged.update_parameters(model)
        seen.append(model[0].weight.detach().clone())

    train(model, optimizer, then=average)
    torch.testing.assert_close(averaged.module[0].weight, torch.stack(seen).mean(0))  # summed in another order
    assert_equal(model.state_dict(), straight(name)[0].state_dict())


@each
def test_hooks_and_the_profiler(name: str) -> None:
    model = network()
    optimizer: Any = make(name, model.parameters())
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    with torch.profiler.profile() as profile:
        train(model, optimizer, BATCHES[:1])
    assert seen == ["before", "after"]
    assert f"Optimizer.step#{name}.step" in {event.key for event in profile.key_averages()}


def test_tied_and_parametrized_weights() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), first, second)
    optimizer = make("AdamW", model.parameters())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train(model, optimizer)
    assert first.weight is second.weight
    assert len(optimizer.state) == len(before) == 6
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@each
def test_groups_of_generators(name: str) -> None:
    model = network()
    pairs = [(key, value) for key, value in model.named_parameters() if key[0] == "0"]
    optimizer = make(name, [{"params": model[2].named_parameters(), "lr": 0.3}, {"params": (pair for pair in pairs)}])
    assert [group["param_names"] for group in optimizer.param_groups] == [["weight", "bias"], ["0.weight", "0.bias"]]
    train(model, optimizer)
    assert len(optimizer.state) == 4
    made: Any = getattr(torch_optim, name)
    assert len(made([{"params": model.parameters()}]).param_groups[0]["params"]) == 4
