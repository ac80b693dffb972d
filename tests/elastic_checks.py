"""What processes over gloo check of elastic checkpoints, bit for bit. test_elastic.py runs this file.

One process imports torch and forks the ranks: 30 runs of up to 8 ranks take seconds.
"""

import functools
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hosts import OPTIONS, make
from support import RULES, build
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fused_kopt import checkpoint, precision
from fused_kopt.distributed import elastic, offload, shard
from fused_kopt.errors import CheckpointError, PeerError, TornStepError
from fused_kopt.mixed_precision import LossScaleOptimizer
from fused_kopt.optimizer import Optimizer

WORLDS = (1, 2, 3, 4, 8)
CHECKS: dict[str, Callable[[Path], None]] = {}
Named = dict[str, Tensor]


SLOW: set[str] = set()


def checks(*cases: Any, slow: Sequence[Any] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function of a folder once per case. slow: cases that take long, or are many."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        for case in dict.fromkeys([*cases, *slow]):
            name = f"{function.__name__}[{'-'.join(map(str, case))}]"
            CHECKS[name] = lambda folder, case=case: function(folder, *case)
            SLOW.update([name] * (case not in cases))
        return function

    return register


def on_ranks(ranks: int, work: Callable[[int], None]) -> None:
    """Runs `work` in processes of one group; without one for 0 ranks, in one process. Raises with what they raised."""
    folder = Path(tempfile.mkdtemp())
    for child in forked(ranks, work, folder):
        os.waitpid(child, 0)
    errors = [(folder / f"error-{rank}").read_text() for rank in range(max(ranks, 1))]
    assert not any(errors), "\n".join(errors)


def forked(ranks: int, work: Callable[[int], None], folder: Path | None = None) -> list[int]:
    """The processes of `on_ranks`."""
    folder = folder or Path(tempfile.mkdtemp())
    return [os.fork() or _rank(folder, rank, ranks, work) for rank in range(max(ranks, 1))]


def _rank(folder: Path, rank: int, ranks: int, work: Callable[[int], None]) -> int:
    text = ""
    try:
        if ranks:
            store = dist.FileStore(str(folder / "store"), ranks)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
            dist.barrier()  # a rank that is done at once would close the connection on one that still connects
        work(rank)
        if ranks:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        text = f"rank {rank}:\n{traceback.format_exc()}"
    finally:
        (folder / f"error-{rank}").write_text(text)
        os._exit(0)


def variables(dtype: torch.dtype, seed: int = 0) -> Named:
    """Of one element, of none, of no whole groups of 64, in another order than row-major."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"scalar": (), "none": (0, 3), "bias": (5,), "matrix": (40, 13), "long": (1000,)}
    made = {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}
    image = torch.randn(6, 5, 3, 3, generator=random).to(dtype).contiguous(memory_format=torch.channels_last)
    return {**made, "image": image, "idle": torch.randn(70, generator=random).to(dtype)}


def step(optimizer: Optimizer, named: Named, number: int) -> None:
    """A step on all but one, with gradients that depend on its number."""
    random = torch.Generator().manual_seed(100 + number)
    pairs = [(torch.randn(v.shape, generator=random).to(v.dtype), v) for name, v in named.items() if name != "idle"]
    apply = getattr(optimizer, "apply_scaled_gradients", optimizer.apply_gradients)
    apply(pairs, experimental_aggregate_gradients=False)


def content(optimizer: Optimizer, named: Named) -> dict[str, Any]:
    """All state by name, and the order of the weights. Sharded optimizers know nothing of slots without elements."""
    found = checkpoint.capture(optimizer, named, with_values=True)
    config = {key: value for key, value in found.config.items() if key != "name"}
    slots = {name: mine for name, mine in found.slots.items() if named[name].numel()}
    return {**vars(found), "config": config, "slots": slots, "weights": [w.clone() for w in optimizer.weights if w.numel()]}


def assert_same(found: Any, expected: Any, path: str = "") -> None:
    if isinstance(expected, Mapping):
        assert list(found) == list(expected), path
        for key in expected:
            assert_same(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{path}/{index}")
    elif isinstance(expected, Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), path
        assert torch.equal(found, expected), path
    else:
        assert found == expected, path


# Policies by name, with the dtype of variables for which they have a meaning.
POLICIES: dict[str, tuple[Any, torch.dtype]] = {
    **{name: (name, torch.bfloat16) for name in precision.NAMED},
    "float32 variables": ("float32", torch.float32),
    "float64 variables": ("float32", torch.float64),
    "float16 variables": ("float32", torch.float16),
    "float8": (precision.Precision(slots="float8_e4m3"), torch.float32),
}


def made(rule: str, policy: str, whole: bool = False) -> tuple[Any, torch.dtype]:
    """An optimizer, and the dtype of its variables. whole: with all else that can be saved."""
    how, dtype = POLICIES[policy]
    if whole:
        return LossScaleOptimizer(build(rule, precision=how, ema_momentum=0.9), initial_scale=8.0), dtype
    return build(rule, precision=how), dtype


# Save with some ranks, resume with others.


@functools.cache
def reference(rule: str, policy: str, steps: int) -> dict[str, Any]:
    """The content after so many steps of one process."""
    optimizer, dtype = made(rule, policy, whole=True)
    named = variables(dtype)
    optimizer.scale_learning_rate([named["bias"]], 0.5)
    for number in range(steps):
        step(optimizer, named, number)
    return content(optimizer, named)


def resumable(rule: str, policy: str, kind: str, seed: int = 0) -> tuple[Any, Named]:
    """A new optimizer, whole, sharded, offloaded or both, and its variables."""
    optimizer, dtype = made(rule, policy, whole=True)
    if "sharded" in kind:
        shard(optimizer, part_bytes=1200)  # several parts
    if "offloaded" in kind:
        offload(optimizer, part_bytes=1200)
    return optimizer, variables(dtype, seed)


@functools.cache
def saved(rule: str, policy: str, kind: str, ranks: int) -> str:
    """A folder with a checkpoint after 2 steps."""
    folder = tempfile.mkdtemp()

    def work(_: int) -> None:
        optimizer, named = resumable(rule, policy, kind)
        optimizer.scale_learning_rate([named["bias"]], 0.5)
        for number in range(2):
            step(optimizer, named, number)
        elastic.save(folder, optimizer, named, with_values=True)

    on_ranks(ranks, work)
    return folder


@checks(
    *(("adam", "bf16_8bit", "whole", *ranks, "whole") for ranks in ((0, 1), (2, 3), (4, 1))),
    *(("adam", "bf16_8bit", "sharded", *ranks, "sharded") for ranks in ((2, 3), (3, 0), (8, 3))),
    *(("nadam", "float32 variables", "sharded", *ranks, "sharded") for ranks in ((2, 3),)),
    *(("adam", "bf16_8bit", "sharded", 3, after, "whole") for after in (0,)),
    *(("adam", "bf16_8bit", "whole", before, 3, "sharded") for before in (2,)),
    ("adam", "bf16_8bit", "sharded offloaded", 3, 2, "offloaded"),
    ("adam", "bf16_8bit", "offloaded", 2, 3, "sharded offloaded"),
    slow=[
        (rule, policy, kind, before, after, kind)
        for rule, policy in (("adam", "bf16_8bit"), ("nadam", "float32 variables"), ("ftrl_power", "bf16_split"))
        for kind in ("whole", "sharded", "sharded offloaded")
        for before in (0, *WORLDS)
        for after in (0, *WORLDS)
    ],
)
def resumes(folder: Path, rule: str, policy: str, kind: str, before: int, after: int, kind_after: str) -> None:
    """Saved by some ranks, loaded by others: the state of one process, and two steps later still. 0 ranks: no process group."""
    source = saved(rule, policy, kind, before)

    def work(_: int) -> None:
        optimizer, named = resumable(rule, policy, kind_after, seed=1)
        elastic.load(source, optimizer, named, with_values=True)
        for steps in (2, 4):
            if kind_after == "whole":
                assert_same(content(optimizer, named), reference(rule, policy, steps))
            elastic.save(folder / str(steps), optimizer, named, with_values=True)
            for number in (steps, steps + 1):
                step(optimizer, named, number)
        elastic.load(source, optimizer, named, with_values=True)
        elastic.save(folder / "back", optimizer, named, with_values=True)

    reference(rule, policy, 4), reference(rule, policy, 2)
    on_ranks(after, work)
    for place, steps in (("2", 2), ("4", 4), ("back", 2)):
        optimizer, named = resumable(rule, policy, "whole", seed=1)
        elastic.load(folder / place, optimizer, named, with_values=True)
        assert_same(content(optimizer, named), reference(rule, policy, steps))


@functools.cache
def valid() -> dict[tuple[str, str], dict[str, Any]]:
    """The content after one step by rule and policy, where the two go together."""
    found = {}
    for rule in RULES:
        for policy in POLICIES:
            optimizer, dtype = made(rule, policy)
            named = variables(dtype)
            if "centered" in rule and any(word in policy for word in ("8", "kahan", "stochastic")):
                with pytest.raises(ValueError, match="centered"):
                    step(optimizer, named, 0)
            else:
                step(optimizer, named, 0)
                found[(rule, policy)] = content(optimizer, named)
    assert len(found) > 150
    return found


@checks((2, 3, False), slow=[(2, 3, True)])
def every_rule_and_policy(folder: Path, before: int, after: int, every: bool) -> None:
    """Each rule in 8 bits or, where it cannot be, in one of the others, and one rule with every policy; or all with all."""
    some = {rule: (rule, policy) for rule, policy in valid() if policy in ("bf16_split", "bf16_8bit")}
    expected = {case: found for case, found in valid().items() if every or case in some.values() or case[0] == "amsgrad"}

    def save(_: int) -> None:
        for rule, policy in expected:
            optimizer, dtype = made(rule, policy)
            named = variables(dtype)
            step(optimizer, named, 0)
            elastic.save(folder / rule / policy, optimizer, named, with_values=True)

    def load(_: int) -> None:
        for (rule, policy), content_before in expected.items():
            optimizer, dtype = made(rule, policy)
            named = variables(dtype, seed=1)
            elastic.load(folder / rule / policy, optimizer, named, with_values=True)
            assert_same(content(optimizer, named), content_before, f"{rule} {policy}")

    on_ranks(before, save)
    on_ranks(after, load)


# What is refused is refused on every rank, and nothing has changed.


def _unlike(named: Named) -> dict[str, tuple[Any, Named, str]]:
    """Optimizers and variables that do not fit a checkpoint of Adam with `named`, and words of the error."""
    adam = functools.partial(build, "adam", precision="bf16_8bit")
    image = named["image"].contiguous()
    return {
        "class": (build("nadam", precision="bf16_8bit"), named, "is of Adam, the optimizer is Nadam"),
        "setting": (adam(epsilon=0.5), named, "epsilon"),
        "precision": (build("adam"), named, "precision"),
        "name": (adam(), {("other" if name == "bias" else name): v for name, v in named.items()}, "other"),
        "missing": (adam(), {name: v for name, v in named.items() if name != "idle"}, "idle"),
        "shape": (adam(), named | {"bias": torch.zeros(6).bfloat16()}, r"bfloat16 \[6\]"),
        "dtype": (adam(), named | {"bias": torch.zeros(5)}, "float32"),
        "strides": (adam(), named | {"image": image}, "strides"),
        "values": (adam(), named, "with_values"),
    }


@checks((0,), (1,))
def unlike_on_one_rank(folder: Path, odd: int) -> None:
    def work(rank: int) -> None:
        for case in _unlike(variables(torch.bfloat16)):
            optimizer, named = build("adam", precision="bf16_8bit"), variables(torch.bfloat16)
            step(optimizer, named, 0)
            elastic.save(folder / case, optimizer, named, with_values=case != "values")
            target, given, words = _unlike(named)[case]
            if rank != odd and case != "values":
                target, given = build("adam", precision="bf16_8bit"), named
            before = {name: v.clone() for name, v in given.items()}
            with pytest.raises(CheckpointError, match=words):
                elastic.load(folder / case, target, given, with_values=True)
            assert target.weights == []
            assert_same(given, before)

    on_ranks(2, work)


@checks(*((case,) for case in ("torn", "name", "steps", "settings", "variables", "values", "sharded", "not JSON")))
def unlike_to_save(folder: Path, case: str) -> None:
    """On rank 1; what there was stays, and the next save takes no notice."""
    kinds = {"torn": (TornStepError, PeerError), "name": (ValueError, PeerError)}

    def work(rank: int) -> None:
        group = dist.new_group([1], timeout=timedelta(seconds=60))
        optimizer, named = build("adam"), variables(torch.float32)
        step(optimizer, named, 0)
        elastic.save(folder, optimizer, named)
        odd, given = build("adam", learning_rate=0.5 if case == "settings" else 0.001), dict(named)
        step(odd, named, 0)
        if case == "torn":
            odd._torn = True
        elif case == "steps":
            step(odd, named, 1)
        elif case == "name":
            del given["long"]
        elif case == "variables":
            given["long"] = given["long"][:999]
            odd = build("adam")
        elif case == "sharded" and rank:
            odd = shard(build("adam"), group)
            step(odd, given, 0)
        elif case == "not JSON":
            odd.get_config = lambda: {"learning_rate": {1}}  # type: ignore[method-assign]
        mine = (odd, given, None, case == "values") if rank else (optimizer, named)
        for save in (elastic.save, lambda *arguments: elastic.async_save(*arguments).wait()):
            with pytest.raises(kinds.get(case, (CheckpointError,) * 2)[1 - rank]):
                save(folder, *mine)
            dist.barrier()
            assert (folder / "latest").read_text() == "version-00000001"
        elastic.save(folder, optimizer, named)
        assert sorted(os.listdir(folder)) == ["latest", "version-00000001", "version-00000002"]

    on_ranks(2, work)


@checks(())
def damage(folder: Path) -> None:
    """Every file cut off, gone, or with one bit of another value; pointers to nothing."""

    def work(rank: int) -> None:
        optimizer, named = build("adam"), variables(torch.float32)
        elastic.save(folder, optimizer, named)
        step(optimizer, named, 0)
        elastic.save(folder, optimizer, named)
        version = folder / "version-00000002"
        random = torch.Generator().manual_seed(0)
        for file in sorted(version.iterdir()):
            whole = file.read_bytes()
            bits = torch.randint(8 * len(whole), (9,), generator=random).tolist()
            flipped = [bytearray(whole) for _ in bits]
            for content, bit in zip(flipped, bits, strict=True):
                content[bit // 8] ^= 1 << bit % 8
            for content in (None, b"", whole[:-1], whole[: len(whole) // 2], whole + b"x", *flipped):
                dist.barrier()
                if rank == 0:
                    file.unlink() if content is None else file.write_bytes(content)
                dist.barrier()
                with pytest.raises(CheckpointError, match="version-00000002"):
                    elastic.load(folder, build("adam"), named)
            dist.barrier()
            file.write_bytes(whole)
        for text in ("version-00000003", "../elsewhere", "", "\xff"):
            dist.barrier()
            (folder / "latest").write_text(text)
            dist.barrier()
            with pytest.raises(CheckpointError, match="version-00000001"):
                elastic.load(folder, build("adam"), named)
        dist.barrier()
        (folder / "latest").unlink(missing_ok=True)
        dist.barrier()
        with pytest.raises(CheckpointError, match="has no checkpoint"):
            elastic.load(folder, build("adam"), named)
        for older, steps in (("version-00000001", 0), ("version-00000002", 1)):
            target = build("adam")
            elastic.load(folder / older, target, named)
            assert int(target.iterations) == steps

    on_ranks(2, work)


# In the background.


@checks((0,), (2,))
def steps_go_on_while_a_save_is_under_way(folder: Path, ranks: int) -> None:
    def work(rank: int) -> None:
        optimizer, dtype = made("nadam", "bf16_split", whole=True)
        named = variables(dtype)
        for number in range(6):
            step(optimizer, named, number)
            before = content(optimizer, named)
            saving = elastic.async_save(folder, optimizer, named, with_values=True)
            step(optimizer, named, 100 + number)  # changes what was to be saved, were it not copied
            if ranks:
                dist.all_reduce(torch.ones(1000))  # on the group of training
            other, _ = made("nadam", "bf16_split", whole=True)
            if number % 2:
                saving.wait()
            elastic.load(folder, other, (target := variables(dtype, seed=1)), with_values=True)
            assert_same(content(other, target), before)

    on_ranks(ranks, work)


@checks(())
def one_save_at_a_time(folder: Path) -> None:
    def work(rank: int) -> None:
        optimizer, named = build("adam"), variables(torch.float32)
        savings = []
        for number in range(5):
            step(optimizer, named, number)
            savings.append(elastic.async_save(folder, optimizer, named))
            assert sum(saving._thread.is_alive() for saving in savings) <= 1
        for saving in savings:
            saving.wait()
        assert (folder / "latest").read_text() == "version-00000005"
        dist.barrier()
        if rank == 0:
            (folder / "latest").unlink()
            (folder / "latest").mkdir()  # what cannot be replaced
        with pytest.raises((OSError, PeerError)):
            elastic.async_save(folder, optimizer, named).wait()

    on_ranks(3, work)


@checks(())
def groups_come_and_go(folder: Path) -> None:
    """A second process group after the first was destroyed, and a part of the ranks."""

    def work(rank: int) -> None:
        optimizer, named = build("adam"), variables(torch.float32)
        elastic.async_save(folder, optimizer, named).wait()
        dist.barrier()
        dist.destroy_process_group()
        store = dist.FileStore(str(folder / "store"), 3)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=timedelta(seconds=60))
        dist.barrier()
        for _ in range(2):
            elastic.async_save(folder, optimizer, named).wait()
        some, beside = (dist.new_group([0, 2], timeout=timedelta(seconds=60)) for _ in range(2))
        if rank != 1:
            step(optimizer, named, 0)
            with pytest.raises(ValueError, match="`beside` must be given"):
                elastic.async_save(folder / "some", optimizer, named, some)
            elastic.async_save(folder / "some", optimizer, named, some, beside=beside).wait()
            other = build("adam")
            elastic.load(folder / "some", other, named, some)
            assert int(other.iterations) == 1
        elastic.load(folder, build("adam"), named)

    on_ranks(3, work)


@checks(())
def some_of_the_ranks_that_share_an_optimizer(folder: Path) -> None:
    def work(rank: int) -> None:
        optimizer, named = shard(build("adam")), variables(torch.float32)
        step(optimizer, named, 0)
        for members in ([0], [0, 1]):
            group = dist.new_group(members, timeout=timedelta(seconds=60))
            if rank in members:
                with pytest.raises(CheckpointError, match="`group`"):
                    elastic.save(folder, optimizer, named, group)
        assert not (folder / "latest").exists()

    on_ranks(3, work)


@checks(())
def torch_can_read_it(folder: Path) -> None:
    """The files are DCP's: its own `load` fills tensors, without this package."""

    def work(_: int) -> None:
        optimizer, named = build("adam"), variables(torch.bfloat16)
        step(optimizer, named, 0)
        elastic.save(folder, optimizer, named, with_values=True)
        found = {"slot/m/matrix": torch.zeros(520), "variable/long": torch.zeros(1000, dtype=torch.bfloat16)}
        dcp.load(found, checkpoint_id=folder / "version-00000001")
        assert torch.equal(found["slot/m/matrix"], optimizer.get_slot(named["matrix"], "m").view(-1))
        assert torch.equal(found["variable/long"], named["long"])

    on_ranks(3, work)


class Killed(NamedTuple):
    """What was seen after a process group was killed."""

    acknowledged: int
    """Steps of the last save that a rank had waited for."""
    found: int
    """Steps of what was loaded."""
    halves: int
    """Versions that were not complete."""


def killed(folder: Path, ranks: int, random: Random) -> Killed:
    """Lets ranks resume, step and save in the background until all are killed, perhaps one before the others; then loads."""

    def work(rank: int) -> None:
        optimizer, named = build("adam"), {"a": torch.zeros(300), "b": torch.zeros(4, 7)}
        if (folder / "latest").exists():
            elastic.load(folder, optimizer, named, with_values=True)
        for _ in range(1000):
            step(optimizer, named, int(optimizer.iterations))
            steps = int(optimizer.iterations)
            saving = elastic.async_save(folder, optimizer, named, with_values=True)
            step(optimizer, named, steps)
            saving.wait()
            (folder / f"acknowledged-{rank}").write_text(f"{steps:08d}")

    children = forked(ranks, work)
    time.sleep(random.uniform(0.1, 0.5))
    for child in random.sample(children, ranks):
        os.kill(child, signal.SIGKILL)
        time.sleep(random.choice([0, 0.02]))
    for child in children:
        os.waitpid(child, 0)
    texts = [file.read_text() for file in folder.glob("acknowledged-*")]
    acknowledged = max((int(text) for text in texts if text), default=0)
    halves = sum(not (version / "checkpoint.json").exists() for version in folder.glob("version-*"))
    if not (folder / "latest").exists():
        return Killed(acknowledged, 0, halves)
    optimizer, named = build("adam"), {"a": torch.ones(300), "b": torch.ones(4, 7)}
    elastic.load(folder, optimizer, named, with_values=True)
    assert_same(content(optimizer, named), after_steps(int(optimizer.iterations)))
    return Killed(acknowledged, int(optimizer.iterations), halves)


@functools.cache
def _known() -> tuple[Optimizer, Named, list[dict[str, Any]]]:
    return build("adam"), {"a": torch.zeros(300), "b": torch.zeros(4, 7)}, []


def after_steps(count: int) -> dict[str, Any]:
    """What `killed` must find after so many steps."""
    optimizer, named, contents = _known()
    while len(contents) < count:
        step(optimizer, named, len(contents))
        contents.append(content(optimizer, named))
    return contents[count - 1]


@checks((10,), slow=[(200,)])
def kills(folder: Path, trials: int) -> None:
    """SIGKILL at random points: the newest checkpoint is one that was saved, and none older than what a rank has waited for."""
    random = Random(0)
    seen = [killed(folder, ranks, random) for ranks in random.choices([1, 2, 3], k=trials)]
    assert all(found.found >= found.acknowledged for found in seen)
    print(f"{trials} kills, {sum(found.halves > 0 for found in seen)} of them amid writing; {seen[-1].found} steps")
    assert sum(found.halves for found in seen) > 0  # else nothing was tested


# FSDP2 with fused_kopt.torch_optim: torch's own functions of distributed state dicts.

EVEN = {"wide": (24, 64), "row": (1536,)}  # groups of 64 elements that no shard cuts
LAYERS = {"wide": (5, 7), "tall": (9, 2), "row": (1, 5), "vector": (3,)}  # over 2, 3, 4 and 8 ranks uneven, some shards empty
PRECISIONS = {
    "float32": torch.float32,
    **dict.fromkeys(("bf16_master", "bf16_split", "bf16_kahan", "bf16_stochastic", "bf16_8bit"), torch.bfloat16),
}


def network(policy: str, seed: int = 0) -> nn.Module:
    random, shapes = torch.Generator().manual_seed(seed), EVEN if policy == "bf16_8bit" else LAYERS
    made = {name: torch.randn(shape, generator=random).to(PRECISIONS[policy]) for name, shape in shapes.items()}
    return nn.ParameterDict({name: nn.Parameter(value) for name, value in made.items()})


def of_rank(whole: Tensor, mesh: Any) -> Tensor:
    """A rank's rows of a tensor; perhaps none."""
    chunks = whole.chunk(mesh.size(), 0)
    return chunks[mesh.get_local_rank()] if mesh.get_local_rank() < len(chunks) else whole[:0]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: Sequence[int]) -> None:
    """Steps with gradients that depend on their number; `row` has none at first."""
    for number in numbers:
        random = torch.Generator().manual_seed(number)
        for name, parameter in model.named_parameters():
            gradient: Any = torch.randn(parameter.shape, generator=random).to(parameter.dtype)
            if isinstance(parameter, DTensor):
                mine, mesh = of_rank(gradient, parameter.device_mesh), parameter.device_mesh
                gradient = DTensor.from_local(mine, mesh, parameter.placements, shape=gradient.shape, stride=gradient.stride())
            parameter.grad = gradient if number or name != "row" else None
        optimizer.step()


def states(model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Any = None) -> dict[str, Any]:
    """Values and optimizer state by name: a rank's part."""
    found = {name: {"value": p.detach(), **optimizer.state.get(p, {})} for name, p in model.named_parameters()}
    return {name: {key: _local(value, mesh) for key, value in mine.items()} for name, mine in found.items()}


def _local(value: Any, mesh: Any) -> Tensor:
    if isinstance(value, DTensor):
        return value.to_local().clone()
    return of_rank(value, mesh).clone() if mesh is not None and value.dim() else value.clone()


@functools.cache
def fsdp_saved(name: str, policy: str, ranks: int) -> Path:
    """A folder with a checkpoint after 2 steps."""
    folder = Path(tempfile.mkdtemp())

    def work(rank: int) -> None:
        model = fully_shard(network(policy), mesh=init_device_mesh("cpu", (ranks,)))
        optimizer = make(name, model.named_parameters(), precision=policy)
        train(model, optimizer, (0, 1))
        dcp.save({"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)
        torch.save(states(model, optimizer), folder / f"states-{rank}.pt")

    on_ranks(ranks, work)
    return folder


def fsdp_states(folder: Path, ranks: int, mesh: Any) -> dict[str, Any]:
    """What `fsdp_saved` had when it saved: a rank's part of a new mesh."""
    parts = [torch.load(folder / f"states-{rank}.pt", weights_only=True) for rank in range(ranks)]
    whole = {name: {key: [part[name][key] for part in parts] for key in found} for name, found in parts[0].items()}
    return {n: {key: _local(torch.cat(v) if v[0].dim() else v[0], mesh) for key, v in found.items()} for n, found in whole.items()}


@functools.cache
def alone(name: str, policy: str, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """After so many steps of one process."""
    model = network(policy)
    optimizer = make(name, model.named_parameters(), precision=policy)
    train(model, optimizer, range(steps))
    return model, optimizer


FSDP = [*((name, "float32") for name in OPTIONS), *(("AdamW", policy) for policy in PRECISIONS if policy != "float32")]


@checks(
    *(("AdamW", "bf16_kahan", *ranks) for ranks in ((2, 3), (2, 8))),
    ("Nadam", "float32", 2, 3),
    ("AdamW", "bf16_stochastic", 2, 3),
    ("AdamW", "bf16_8bit", 2, 3),
    slow=[(*case, before, after) for case in FSDP for before in WORLDS for after in WORLDS],
)
def fsdp2_resumes(_: Path, name: str, policy: str, before: int, after: int) -> None:
    importlib.import_module("torch._dynamo")  # fully_shard does, 0.9 s in every rank
    folder = fsdp_saved(name, policy, before)
    alone(name, policy, 4)

    def work(_: int) -> None:
        mesh = init_device_mesh("cpu", (after,))
        model = fully_shard(network(policy, seed=1), mesh=mesh)
        optimizer = make(name, model.named_parameters(), precision=policy)
        found = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(found, checkpoint_id=folder)
        set_model_state_dict(model, found["model"])
        set_optimizer_state_dict(model, optimizer, found["optimizer"])
        assert_same(states(model, optimizer), fsdp_states(folder, before, mesh))
        train(model, optimizer, (2, 3))
        assert_same(states(model, optimizer), states(*alone(name, policy, 4), mesh))

    on_ranks(after, work)


def main(report: str, *wanted: str) -> None:
    """Runs the checks, all or those named; writes {check: traceback or ""}."""
    torch.set_num_threads(1)
    found = {}
    for name in wanted or CHECKS:
        try:
            CHECKS[name](Path(tempfile.mkdtemp()))
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    Path(report).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
