"""What two ranks over gloo check, each against one process without shards, bit for bit. test_host_distributed.py runs this file.

All ranks see the same batches, unless a check says otherwise: the mean of two equal gradients is exact, whatever reduces it.
"""

import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hosts import OPTIONS, assert_equal, make, torch_optim
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

STEPS = 4
CHECKS: dict[str, Callable[[], None]] = {}


def checks(*cases: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function once per case."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        CHECKS.update({f"{function.__name__}[{case}]": lambda case=case: function(case) for case in cases})
        return function

    return register


def network() -> nn.Sequential:
    """Shards of 5 rows over 2 ranks are uneven; of 1 row, one is empty."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1))


def batches(rank: int | None = None) -> list[Tensor]:
    """A batch per step; with a rank one that other ranks do not see."""
    random = torch.Generator().manual_seed(7 if rank is None else rank)
    return [torch.randn(6, 7, generator=random) for _ in range(STEPS)]


def train(model: Any, optimizer: torch.optim.Optimizer, inputs: list[Tensor]) -> None:
    for x in inputs:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def alone(name: str, count: int = STEPS) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values and optimizer state by parameter name after `count` steps without distribution."""
    model = network()
    optimizer = make(name, model.named_parameters())
    train(model, optimizer, batches()[:count])
    return model.state_dict(), {key: optimizer.state[parameter] for key, parameter in model.named_parameters()}


def whole(tree: Any) -> Any:
    """DTensors in nested dicts as full tensors."""
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    return tree.full_tensor() if isinstance(tree, DTensor) else tree


def compare(name: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A model whose parameters are DTensors, and the state of its optimizer, against one process."""
    values, state = alone(name)
    assert_equal(whole(model.state_dict()), values)
    assert_equal(whole({key: optimizer.state[parameter] for key, parameter in model.named_parameters()}), state)


def shared_folder() -> str:
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    assert folder[0] is not None
    return folder[0]


@checks(*OPTIONS)
def ddp(name: str, **options: Any) -> None:
    """Each rank has batches of its own; one process averages the gradients as DDP does: halves, then their sum."""
    model = DistributedDataParallel(network(), **options)
    train(model, make(name, model.parameters()), batches(dist.get_rank()))
    single = network()
    optimizer = make(name, single.parameters())
    for pair in zip(batches(0), batches(1), strict=True):
        parts = [torch.autograd.grad(single(x).square().mean(), list(single.parameters())) for x in pair]
        for parameter, first, second in zip(single.parameters(), *parts, strict=True):
            parameter.grad = first / 2 + second / 2
        optimizer.step()
    assert_equal(model.module.state_dict(), single.state_dict())


@checks("gradient_as_bucket_view", "find_unused_parameters", "static_graph")
def ddp_options(option: str) -> None:
    ddp("AdamW", **{option: True})


@checks("AdamW")
def ddp_unused(name: str) -> None:
    """A parameter that no rank uses has no gradient, and rests; as without DDP."""
    model = network()
    model.register_parameter("spare", nn.Parameter(torch.ones(3)))
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = make(name, model.parameters())
    train(wrapped, optimizer, batches())
    assert torch.equal(model.spare, torch.ones(3))
    assert model.spare not in optimizer.state
    assert_equal({key: value for key, value in model.state_dict().items() if key != "spare"}, alone(name)[0])


@checks(*OPTIONS)
def fsdp1(name: str) -> None:
    model = FullyShardedDataParallel(network(), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = make(name, model.parameters())
    train(model, optimizer, batches())
    with FullyShardedDataParallel.summon_full_params(model):
        assert_equal(model.module.state_dict(), alone(name)[0])


def sharded() -> Any:
    model = network()
    fully_shard(model[0])
    fully_shard(model)
    return model


@checks(*OPTIONS)
def fsdp2(name: str) -> None:
    model = sharded()
    optimizer = make(name, model.named_parameters())
    train(model, optimizer, batches())
    assert {p.to_local().numel() for p in model[2].parameters()} == ({5, 1} if dist.get_rank() == 0 else {0})
    compare(name, model, optimizer)


@checks("AdamW")
def fsdp2_after_a_forward(name: str) -> None:
    model = sharded()
    with torch.no_grad():
        model(batches()[0])
    model.reshard()  # the root keeps whole parameters after a forward without backward
    optimizer = make(name, model.named_parameters())
    train(model, optimizer, batches())
    compare(name, model, optimizer)


def resumed(name: str, move: Callable[[nn.Module, torch.optim.Optimizer, nn.Module, torch.optim.Optimizer], None]) -> None:
    """Two steps, `move` into a new model and optimizer, two more steps: the same as four."""
    first, second = sharded(), sharded()
    nn.init.zeros_(second[0].weight)
    source, target = make(name, first.parameters()), make(name, second.parameters())
    train(first, source, batches()[:2])
    move(first, source, second, target)
    train(second, target, batches()[2:])
    compare(name, second, target)


@checks(*OPTIONS)
def dcp_files(name: str, options: StateDictOptions | None = None) -> None:
    folder = shared_folder()

    def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {"m": get_model_state_dict(model), "o": get_optimizer_state_dict(model, optimizer, options=options)}

    def move(model: nn.Module, optimizer: torch.optim.Optimizer, other: nn.Module, target: torch.optim.Optimizer) -> None:
        dcp.save(states(model, optimizer), checkpoint_id=folder)
        found = states(other, target)
        dcp.load(found, checkpoint_id=folder)
        set_model_state_dict(other, found["m"])
        set_optimizer_state_dict(other, target, found["o"], options=options)

    resumed(name, move)


@checks(*OPTIONS)
def dcp_flattened(name: str) -> None:
    dcp_files(name, StateDictOptions(flatten_optimizer_state_dict=True))


@checks(*OPTIONS)
def dcp_full_and_broadcast(name: str) -> None:
    """Rank 0 alone has the full state on the way back."""

    def move(model: nn.Module, optimizer: torch.optim.Optimizer, other: nn.Module, target: torch.optim.Optimizer) -> None:
        gather = StateDictOptions(full_state_dict=True, cpu_offload=True)
        values, state = get_model_state_dict(model, options=gather), get_optimizer_state_dict(model, optimizer, options=gather)
        if dist.get_rank() == 0:
            assert_equal(state["state"], {key: dict(found) for key, found in alone(name, 2)[1].items()})
        else:
            assert not values
            assert not state
        spread = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(other, values, options=spread)
        set_optimizer_state_dict(other, target, state, options=spread)

    resumed(name, move)


@checks(*OPTIONS)
def dcp_makes_state_without_a_step(name: str) -> None:
    """DCP calls `step` with lr 0 and gradients 0 to make the state that it saves."""
    model = sharded()
    optimizer = make(name, model.named_parameters())
    assert len(get_optimizer_state_dict(model, optimizer)["state"]) == 4
    train(model, optimizer, batches())
    compare(name, model, optimizer)


@checks("clipnorm", "global_clipnorm")
def norms_of_shards_are_refused(clip: str) -> None:
    model = sharded()
    optimizer = make("AdamW", model.parameters(), **{clip: 1.0})
    with pytest.raises(ValueError, match="clip_grad_norm_"):
        train(model, optimizer, batches()[:1])
    assert_equal(whole(model.state_dict()), network().state_dict())


@checks("AdamW")
def tensor_parallel(name: str) -> None:
    """Columns of one layer on each rank, the rest replicated, beside DTensors of another placement."""
    mesh = init_device_mesh("cpu", (2,))

    def place(_: str, module: nn.Module, mesh: Any) -> None:
        for key, parameter in list(module.named_parameters(recurse=False)):
            wide = parameter.dim() == 2 and parameter.shape[0] > 1
            module.register_parameter(key, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(1) if wide else Replicate()])))

    model = distribute_module(network(), mesh, place)
    optimizer = make(name, model.parameters())
    single = network()
    other = make(name, single.parameters())
    random = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        for parameter, reference in zip(model.parameters(), single.parameters(), strict=True):
            reference.grad = torch.randn(reference.shape, generator=random)
            parameter.grad = distribute_tensor(reference.grad, mesh, parameter.placements)
        optimizer.step()
        other.step()
    assert_equal(whole(model.state_dict()), single.state_dict())


@checks(*OPTIONS)
def zero_redundancy(name: str) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # its import warns, which pytest would raise

    model = DistributedDataParallel(network())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), getattr(torch_optim, name), **OPTIONS[name])
    train(model, optimizer, batches())
    values, state = alone(name)
    assert_equal(model.module.state_dict(), values)
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        assert_equal(list(optimizer.state_dict()["state"].values()), list(state.values()))


@checks(*OPTIONS)
def accelerate_ddp(name: str) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    model = network()
    model, optimizer = accelerator.prepare(model, make(name, model.parameters()))
    assert isinstance(model, DistributedDataParallel)
    for x in batches():
        optimizer.zero_grad()
        accelerator.backward(model(x).square().mean())
        optimizer.step()
    assert_equal(accelerator.unwrap_model(model).state_dict(), alone(name)[0])


@checks(*OPTIONS)
def accelerate_fsdp2_switch(name: str) -> None:
    """What `Accelerator.prepare` does with FSDP2, which it refuses on CPU: parameters become empty stand-ins, then DTensors."""
    from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names, fsdp2_switch_optimizer_parameters

    model = network()
    optimizer = make(name, model.parameters())
    old = fsdp2_canonicalize_names({key: p.data_ptr() for key, p in model.named_parameters()})
    for group in optimizer.param_groups:
        for position, parameter in enumerate(group["params"]):
            stand_in: Any = torch.empty(1, dtype=parameter.dtype)
            stand_in.data_ptr = parameter.data_ptr()
            group["params"][position] = stand_in
    fully_shard(model)
    new = dict(model.named_parameters())
    fsdp2_switch_optimizer_parameters(optimizer, {address: new[key] for key, address in old.items()})
    train(model, optimizer, batches())
    compare(name, model, optimizer)
    get_optimizer_state_dict(model, optimizer)


def main(rank: int, store: str, report: str) -> None:
    """Runs all checks until one fails, since a rank that raised may leave the other waiting; writes {check: traceback}."""
    timeout = timedelta(seconds=30)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=timeout)
    found: dict[str, str] = {}
    for name, check in CHECKS.items():
        try:
            check()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
            break
        finally:
            Path(report).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
