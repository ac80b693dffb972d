"""Optimizers over ranks: ours and torch's, each on variables of its own in the same shapes, with the same gradients."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

import fused_kopt
from fused_kopt import torch_optim
from fused_kopt.distributed import shard
from perf.cases import RATE
from perf.workloads import Shape


def drawn(shapes: Sequence[Shape], device: torch.device, seed: int) -> list[Tensor]:
    """Normal numbers, the same on every rank."""
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(shape, generator=generator, device=device) for shape in shapes]


class Sharer(ABC):
    """One way to sum gradients over ranks and to update variables."""

    name: ClassVar[str]

    def __init__(self, shapes: Sequence[Shape], device: torch.device) -> None:
        self.variables = [nn.Parameter(v) for v in drawn(shapes, device, 0)]
        self.sources = drawn(shapes, device, 1)

    @abstractmethod
    def prepare(self) -> None:
        """What a backward pass leaves behind; not timed."""

    @abstractmethod
    def step(self) -> None:
        """Sum and update."""

    @abstractmethod
    def state(self) -> Iterable[Tensor]:
        """Slots on this rank."""

    def state_bytes(self) -> int:
        """Of slots on this rank, counters aside."""
        return sum(t.nbytes for t in self.state() if t.dim())


class Local(Sharer):
    """fused_kopt.Adam on every rank by itself: what a step takes without sums."""

    name = "fused_kopt alone"
    aggregated = False

    def __init__(self, shapes: Sequence[Shape], device: torch.device) -> None:
        super().__init__(shapes, device)
        self.optimizer: Any = fused_kopt.Adam(RATE)
        self.pairs = list(zip(self.sources, self.variables, strict=True))

    def prepare(self) -> None:
        pass

    def step(self) -> None:
        self.optimizer.apply_gradients(self.pairs, experimental_aggregate_gradients=self.aggregated)

    def state(self) -> Iterable[Tensor]:
        return (flat for bucket in self.optimizer._state.buckets.values() for flat in bucket.flat.values())


class AllReduced(Local):
    """fused_kopt.Adam, which sums all gradients on every rank."""

    name = "fused_kopt all-reduce"
    aggregated = True


class Sharded(AllReduced):
    """fused_kopt.Adam, of whose state every rank keeps a share."""

    name = "fused_kopt sharded"

    def __init__(self, shapes: Sequence[Shape], device: torch.device) -> None:
        super().__init__(shapes, device)
        shard(self.optimizer)


class Redundancy(Sharer):
    """torch's ZeroRedundancyOptimizer, which gives whole variables to ranks, on gradients that DDP would have summed in one bucket."""

    name = "ZeroRedundancyOptimizer"

    def __init__(self, shapes: Sequence[Shape], device: torch.device) -> None:
        super().__init__(shapes, device)
        self.whole = torch.cat([g.reshape(-1) for g in self.sources])
        self.flat = self.whole.clone()
        for variable, part in zip(self.variables, torch.split(self.flat, [v.numel() for v in self.variables]), strict=True):
            variable.grad = part.view(variable.shape)
        self.optimizer = ZeroRedundancyOptimizer(self.variables, torch.optim.Adam, None, True, lr=RATE, fused=True)

    def prepare(self) -> None:
        self.flat.copy_(self.whole)

    def step(self) -> None:
        self.flat.div_(dist.get_world_size())
        dist.all_reduce(self.flat)
        self.optimizer.step()

    def state(self) -> Iterable[Tensor]:
        return (t for state in self.optimizer.optim.state.values() for t in state.values())


class _Given(torch.autograd.Function):
    """A loss whose gradients are there already: what is timed of a backward pass is FSDP's own work."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *variables: Tensor) -> Tensor:
        ctx.gradients = gradients
        return variables[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        # detached: a tensor of its own, which autograd takes without a copy
        return (None, *(g.detach() for g in ctx.gradients))


class _Model(nn.Module):
    """Variables, and their gradients."""

    def __init__(self, variables: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        super().__init__()
        self.variables = nn.ParameterList(variables)
        self.gradients = gradients

    def forward(self) -> Tensor:
        loss: Tensor = _Given.apply(self.gradients, *self.variables)  # type: ignore[no-untyped-call]
        return loss


class FullySharded(Sharer):
    """FSDP2 around all variables as one group, so that it gathers and reduces once, and torch.optim.Adam."""

    name = "FSDP2, torch fused"

    def __init__(self, shapes: Sequence[Shape], device: torch.device) -> None:
        super().__init__(shapes, device)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        self.model = _Model(self.variables, self.sources)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = self.made(list(self.model.parameters()))

    def made(self, parameters: list[nn.Parameter]) -> Any:
        """The optimizer."""
        return torch.optim.Adam(parameters, lr=RATE, fused=True)

    def prepare(self) -> None:
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.model().backward()
        self.optimizer.step()

    def state(self) -> Iterable[Tensor]:
        values = (t for state in self.optimizer.state.values() for t in state.values())
        return (t.to_local() if isinstance(t, DTensor) else t for t in values)


class OursFullySharded(FullySharded):
    """The same with fused_kopt.torch_optim.Adam."""

    name = "FSDP2, fused_kopt"

    def made(self, parameters: list[nn.Parameter]) -> Any:
        return torch_optim.Adam(parameters, lr=RATE)


SHARERS: tuple[type[Sharer], ...] = (Local, AllReduced, Sharded, Redundancy, FullySharded, OursFullySharded)
