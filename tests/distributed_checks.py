"""What two or four ranks over gloo check, each against one process without shards, bit for bit. test_host_distributed.py runs this file.

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
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

STEPS = 4
CHECKS: dict[int, dict[str, Callable[[], None]]] = {2: {}, 4: {}}


def checks(*cases: Any, ranks: int = 2) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function once per case, for so many ranks."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        CHECKS[ranks].update({f"{function.__name__}[{case}]": lambda case=case: function(case) for case in cases})
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
        model(x.to(next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()


def alone(name: str, count: int = STEPS, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values and optimizer state by parameter name after `count` steps without distribution."""
    model = network().to(dtype)
    optimizer = make(name, model.named_parameters(), **options)
    train(model, optimizer, batches()[:count])
    return model.state_dict(), {key: optimizer.state[parameter] for key, parameter in model.named_parameters()}


def whole(tree: Any) -> Any:
    """DTensors in nested dicts as full tensors."""
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [whole(value) for value in tree]
    if isinstance(tree, DTensor) and tree.dtype == torch.int16:  # which gloo does not gather
        return tree.to(torch.int32).full_tensor().to(torch.int16)
    return tree.full_tensor() if isinstance(tree, DTensor) else tree


def compare(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
    """A model whose parameters are DTensors, and the state of its optimizer, against one process."""
    values, state = alone(name, **options)
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


@checks("clipnorm", "global_clipnorm")
def fsdp1_norms_are_refused(clip: str) -> None:
    """Its parameters are plain tensors with some elements of the whole ones."""
    for original in (True, False):
        model = FullyShardedDataParallel(network(), use_orig_params=original, device_id=torch.device("cpu"))
        optimizer = make("AdamW", model.parameters(), **{clip: 1.0})
        with pytest.raises(ValueError, match=r"what FSDP1 made of others.*Use its clip_grad_norm_"):
            train(model, optimizer, batches()[:1])


def sharded(dtype: torch.dtype = torch.float32) -> Any:
    model = network().to(dtype)
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


# Far below the norms here, so that every step is clipped. Sums of squares are float64, and the few that are added in another order
# than in one process differ by 1e-16: it takes some 10^8 norms to find one that float32 rounds otherwise.
LIMITS = {"clipnorm": 0.01, "global_clipnorm": 0.02}


@checks(*LIMITS)
def norms(clip: str) -> None:
    model, options = sharded(), {clip: LIMITS[clip]}
    optimizer = make("SGD", model.named_parameters(), **options)
    train(model, optimizer, batches())
    compare("SGD", model, optimizer, **options)
    with pytest.raises(AssertionError):
        compare("SGD", model, optimizer)


@checks("bf16_stochastic")
def fsdp2_stochastic(policy: str) -> None:
    """The second rank's first shard begins at the fourth of 5 rows of 7 elements: at position 21."""
    model, options = sharded(torch.bfloat16), {"precision": policy}
    optimizer = make("AdamW", model.named_parameters(), **options)
    train(model, optimizer, batches())
    compare("AdamW", model, optimizer, dtype=torch.bfloat16, **options)


Layout = tuple[list[int], torch.dtype, Any, list[Placement]]


def placed(layouts: list[Layout], **options: Any) -> None:
    """Three steps of parameters of these shapes and dtypes, on these meshes (None: plain tensors), against whole ones."""
    random = torch.Generator().manual_seed(3)

    def spread(value: Tensor, mesh: Any, placements: list[Placement]) -> Tensor:
        return value.clone() if mesh is None else distribute_tensor(value, mesh, placements)

    whole_ones = [nn.Parameter(torch.randn(shape, generator=random).to(dtype)) for shape, dtype, *_ in layouts]
    params = [nn.Parameter(spread(p.detach(), *where)) for p, (_, _, *where) in zip(whole_ones, layouts, strict=True)]
    optimizer, other = make("AdamW", params, **options), make("AdamW", whole_ones, **options)
    for step in range(3):
        for p, w, (_, _, *where) in zip(params, whole_ones, layouts, strict=True):
            w.grad = torch.randn(w.shape, generator=random).to(w.dtype)
            p.grad = spread(w.grad, *where)
        if step == 1:  # all ranks lack it
            params[1].grad = whole_ones[1].grad = None
        optimizer.step()
        other.step()
    assert_equal(whole(dict(enumerate(params))), dict(enumerate(whole_ones)))
    assert_equal(*(whole(dict(enumerate(o.state.values()))) for o in (optimizer, other)))


F32, BF16 = torch.float32, torch.bfloat16


@checks(*LIMITS)
def norms_of_a_mixture(clip: str) -> None:
    """Uneven and empty shards, columns, replicas, plain tensors, two dtypes; replicas of shards."""
    mesh, rows, replicas = (init_device_mesh("cpu", sizes) for sizes in ((2,), (1, 2), (2, 1)))
    layouts: list[Layout] = [
        ([5, 7], F32, mesh, [Shard(0)]),
        ([3, 4], BF16, mesh, [Shard(1)]),
        ([6], F32, mesh, [Replicate()]),
        ([1, 9], BF16, mesh, [Shard(0)]),
        ([2, 2], F32, None, []),
        ([5, 2], F32, replicas, [Replicate(), Shard(0)]),
        ([5, 3], F32, rows, [Shard(0), Shard(0)]),
        ([4, 3], F32, mesh, [Shard(1)]),
    ]
    placed(layouts, **{clip: LIMITS[clip]})


def grid() -> tuple[Any, list[Layout]]:
    """Parameters on a mesh of 2 x 2 ranks, on its dimensions, and on all four in a row; of the last two the fourth rank has nothing."""
    mesh, line = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")), init_device_mesh("cpu", (4,))
    return mesh, [
        ([5, 7], F32, mesh, [Replicate(), Shard(0)]),
        ([9, 3], F32, mesh, [Shard(0), Shard(0)]),
        ([8, 5], F32, mesh, [_StridedShard(0, split_factor=2), Shard(0)]),
        ([6], F32, mesh["a"], [Shard(0)]),
        ([3, 5], F32, line, [Shard(0)]),
        ([3], F32, line, [Shard(0)]),
    ]


@checks(*LIMITS, ranks=4)
def norms_on_a_grid(clip: str) -> None:
    """Every element counts once: rows over replicas, over two dimensions, columns beside rows, columns of rows."""
    mesh, layouts = grid()
    layouts += [
        ([4, 6], BF16, mesh, [Shard(0), Shard(1)]),
        ([2, 2], F32, None, []),
        ([7], F32, mesh, [Replicate(), Replicate()]),
        ([3, 7], F32, mesh["b"], [Shard(1)]),
    ]
    placed(layouts, **{clip: LIMITS[clip]})


@checks("global_clipnorm", ranks=4)
def a_rank_without_elements(clip: str) -> None:
    placed(grid()[1][-2:], **{clip: LIMITS[clip]})


@checks("bf16_stochastic", ranks=4)
def random_bits_on_a_grid(policy: str) -> None:
    """Whole elements get the bits of their places in the whole parameter where a shard is a range of it."""
    placed([(shape, BF16, *where) for shape, _, *where in grid()[1]], precision=policy)


@checks("global_clipnorm", ranks=4)
def hsdp(clip: str) -> None:
    """Two replicas of two shards."""
    model = network()
    for part in (model[0], model):
        fully_shard(part, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    optimizer = make("SGD", model.named_parameters(), **{clip: LIMITS[clip]})
    train(model, optimizer, batches())
    compare("SGD", model, optimizer, **{clip: LIMITS[clip]})


@checks("clipnorm", "global_clipnorm")
def partial_gradients(clip: str) -> None:
    """Each rank has a part of the sum that is the gradient; not in every step."""
    mesh = init_device_mesh("cpu", (2,))
    param, single = (nn.Parameter(p) for p in (distribute_tensor(torch.ones(5, 3), mesh, [Shard(0)]), torch.ones(5, 3)))
    optimizer, other = (make("SGD", [p], **{clip: 0.5}) for p in (param, single))
    for step in range(3):
        parts = [torch.randn(5, 3, generator=torch.Generator().manual_seed(10 * step + rank)) for rank in range(2)]
        single.grad = parts[0] + parts[1]
        partial = DTensor.from_local(parts[dist.get_rank()], mesh, [Partial()])
        param.grad = distribute_tensor(single.grad, mesh, [Shard(0)]) if step == 1 else partial
        optimizer.step()
        other.step()
    assert_equal(whole({0: param}), {0: single})


@checks("global_clipnorm")
def scaled_losses(clip: str) -> None:
    """amp="fused": the scale leaves before the norm is taken; what is infinite on one rank is skipped by both."""
    model, options = sharded(), {clip: LIMITS[clip]}
    optimizer, scaler = make("SGD", model.named_parameters(), amp="fused", **options), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, x in enumerate(["infinite", *batches()]):
        optimizer.zero_grad()
        scaler.scale(model(batches()[0] if isinstance(x, str) else x).square().mean()).backward()
        if step == 0 and dist.get_rank() == 0:
            model[2].bias.grad.to_local().fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 512.0
    compare("SGD", model, optimizer, **options)


@checks("AdamW")
def first_steps_at_rate_zero_count_everywhere(name: str) -> None:
    """A rank without elements has no gradient that is not 0, as in the step with which DCP makes states."""
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(distribute_tensor(torch.ones(1, 3), mesh, [Shard(0)]))
    optimizer = make(name, [param])
    optimizer.param_groups[0]["lr"] = 0.0
    param.grad = distribute_tensor(torch.ones(1, 3), mesh, [Shard(0)])
    optimizer.step()
    assert float(optimizer.state[param]["step"]) == 1


@checks(*LIMITS)
def gradients_of_one_rank(clip: str) -> None:
    """The other rank has none for the second parameter: it sums nothing, and nobody waits for it."""
    mesh = init_device_mesh("cpu", (2,))
    params = [nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)])) for _ in range(3)]
    optimizer = make("SGD", params, **{clip: 0.5})
    for param in params[:: 1 + dist.get_rank()]:
        param.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)], src_data_rank=None)
    optimizer.step()
    assert [p in optimizer.state for p in params] == [True, dist.get_rank() == 0, True]


def eight_bits(shard: bool, rest: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Each of 2 ranks has 448 and 64 elements of the first layer's parameters, which the groups of 64 that share scales divide."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(7, 128), nn.Tanh(), nn.Linear(128, 1)).to(BF16)
    if shard:
        fully_shard(model)
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "precision": rest}]
    return model, torch_optim.AdamW(groups, lr=0.01, precision="bf16_8bit")


@checks(("sharded", "bf16_split"), ("full", "bf16_kahan"))
def scales_of_groups(case: tuple[str, str]) -> None:
    """Two steps, a checkpoint, two more: as in one process; scales are DTensors, which the checkpoint has whole."""
    way, rest = case
    options = StateDictOptions(full_state_dict=way == "full")
    (first, source), (second, target), (single, other) = (eight_bits(shard, rest) for shard in (True, True, False))
    train(first, source, batches()[:2])
    train(single, other, batches()[:2])
    assert_equal(*(whole([list(o.state[p].values()) for p in m.parameters()]) for m, o in ((first, source), (single, other))))
    saved = {"m": get_model_state_dict(first, options=options), "o": get_optimizer_state_dict(first, source, options=options)}
    if way == "sharded":
        folder = shared_folder()
        dcp.save(saved, checkpoint_id=folder)
        saved = {"m": get_model_state_dict(second), "o": get_optimizer_state_dict(second, target)}
        dcp.load(saved, checkpoint_id=folder)
    set_model_state_dict(second, saved["m"], options=options)
    set_optimizer_state_dict(second, target, saved["o"], options=options)
    train(second, target, batches()[2:])
    train(single, other, batches()[2:])
    assert_equal(whole(second.state_dict()), single.state_dict())
    assert_equal(*(whole([list(o.state[p].values()) for p in m.parameters()]) for m, o in ((second, target), (single, other))))
    packed = make("AdamW", second.parameters(), precision="bf16_8bit")
    with pytest.raises(ValueError, match=r"\(1, 128\) is placed as \(Shard\(dim=0\),\) on \(2,\) ranks.*shards of equal rows"):
        train(second, packed, batches()[:1])
    assert not packed.state


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


def main(rank: int, ranks: int, store: str, report: str) -> None:
    """Runs all checks until one fails, since a rank that raised may leave the others waiting; writes {check: traceback}."""
    timeout = timedelta(seconds=30)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=timeout)
    found: dict[str, str] = {}
    for name, check in CHECKS[ranks].items():
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
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
