"""What happens to models and optimizers half-way: pickled, moved, shared, loaded, tied. test_torch_optim_hosts.py has torch's helpers."""

import pickle
from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest
import torch
from hosts import OPTIONS, assert_equal, make, torch_optim
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 6
BATCHES = [torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(STEPS)]

each = pytest.mark.parametrize("name", OPTIONS)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def train(model: Any, optimizer: Any, inputs: list[Tensor] = BATCHES) -> None:
    for x in inputs:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


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
