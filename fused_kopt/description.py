"""What a step does and what it costs, worked out from shapes: nothing is launched, allocated or changed."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.filesize import decimal
from torch import Tensor

from fused_kopt import clipping, execute, layout, planes, precision
from fused_kopt.clipping import Clips, Pairs
from fused_kopt.execute import Chosen, Executor
from fused_kopt.planes import Kept, Plane

# Launches that add up the squares of a group's gradients; the reference makes none.
NORM_LAUNCHES = {"triton": 2, "compiled": 1, "reference": 0}


@dataclass(frozen=True)
class BucketDescription:
    """The variables of one device, dtype and precision policy."""

    device: torch.device
    """Variables without memory ("meta") count as being on torch's default device."""
    dtype: torch.dtype
    """Of the variables."""
    precision: str
    """The policy by which their state is stored: its name, or what it consists of."""
    variables: int
    elements: int
    slots: tuple[str, ...]
    planes: tuple[Plane, ...]
    """Where the slots, and a master if there is one, are kept."""
    executor: Chosen
    """What runs the rule. A kernel that fails its known-answer test at its first use is replaced by the reference, with a warning."""
    why: str
    """Why this executor."""
    launches: int
    """Per step; 0 on the reference, which runs torch operations variable by variable. Those of norms are not among them."""
    bytes_moved: int
    """What a step must read and write: variables and planes once in and once out, gradients once in, and copies (see `notes`)."""

    @property
    def bytes_at_rest(self) -> int:
        """What the planes take, padding included."""
        return sum(plane.bytes for plane in self.planes)

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.") + ("" if self.precision == "float32" else f" under {self.precision}")
        sizes = f"{_many(self.variables, 'variable')}, {_many(self.elements, 'element')}"
        names = [*self.slots, *(plane.name for plane in self.planes if plane.name in precision.KEPT)]
        state = f"slots {', '.join(names)} ({decimal(self.bytes_at_rest)})" if names else "no slots"
        step = f"{self.executor} ({self.why}): {_many(self.launches, 'launch')}, {decimal(self.bytes_moved)} moved"
        return f"{self.device} {kind}: {sizes}, {state}\n    {step}"


@dataclass(frozen=True)
class Description:
    """What `Optimizer.describe` found; `print()` it."""

    optimizer: str
    buckets: tuple[BucketDescription, ...]
    norm_launches: int
    """Launches that add up squares for `clipnorm` and `global_clipnorm`."""
    norm_bytes: int
    """What these read."""
    notes: tuple[str, ...]
    """What keeps a step from being one launch, and what makes it copy."""

    @property
    def launches(self) -> int:
        """Launches per step."""
        return self.norm_launches + sum(bucket.launches for bucket in self.buckets)

    @property
    def bytes_moved(self) -> int:
        """Bytes that a step must read and write."""
        return self.norm_bytes + sum(bucket.bytes_moved for bucket in self.buckets)

    @property
    def bytes_at_rest(self) -> int:
        """Bytes that the slots take."""
        return sum(bucket.bytes_at_rest for bucket in self.buckets)

    def __str__(self) -> str:
        total = f"{_many(self.launches, 'launch')} per step, {decimal(self.bytes_moved)} moved, {decimal(self.bytes_at_rest)} of slots"
        lines = [f"{self.optimizer}: {total}", *map(str, self.buckets), *(f"note: {note}" for note in self.notes)]
        return "\n  ".join(lines)


def _many(count: int, word: str) -> str:
    """A count and its noun."""
    plural = "es" if word.endswith("ch") else "s"
    return f"{count:,} {word}{'' if count == 1 else plural}"


def describe(
    optimizer: str,
    pairs: Pairs,
    slots: tuple[str, ...] | Callable[[Tensor], Kept],
    executor: Executor,
    clips: Clips,
    alignment: int = layout.ALIGNMENT,
) -> Description:
    """Describe the step of checked (gradient, variable) pairs.

    Args:
        optimizer: what to call it.
        pairs: what the step gets; gradients may be stand-ins of the right shape, dtype and layout.
        slots: the names of a variable's slots, where these are in the compute dtype; else what `planes.owned` gives.
        executor: what was asked for.
        clips: what happens to gradients before the rule.
        alignment: elements that a variable's part of a flat buffer is rounded up to; 1 where slots are tensors of their own.

    Raises RuntimeError where an executor was asked for by name and is unavailable.
    """
    how = planes.borrowed(slots) if isinstance(slots, tuple) else slots
    chosen = {device: _choose(executor, device, pairs) for device in dict.fromkeys(v.device for _, v in pairs)}
    members = planes.members(pairs, how)
    buckets = [_bucket(kept, mine, chosen[mine[0][1].device], alignment) for kept, mine in members]
    groups = clipping.groups(pairs) if clips.by_norm else []
    norm_bytes = sum(clipping.values(g).numel() * g.dtype.itemsize for g, _ in pairs) if clips.by_norm else 0
    norm_launches = sum(NORM_LAUNCHES[chosen[group.device][0]] for group in groups)
    return Description(
        optimizer, tuple(buckets), norm_launches, norm_bytes, tuple(_notes(pairs, clips, buckets, [mine for _, mine in members]))
    )


def _bucket(how: Kept, pairs: Pairs, chosen: tuple[Chosen, str], alignment: int) -> BucketDescription:
    each = planes.distinct(pairs)
    kept = planes.of(how, each, alignment)
    launches = 0 if chosen[0] == "reference" else _count(pairs)
    moved = sum(_moved(g, v, kept) for g, v in pairs)
    sizes = len(each), sum(v.numel() for v in each)
    return BucketDescription(each[0].device, each[0].dtype, how.precision, *sizes, how.slots, kept, *chosen, launches, moved)


def joined(parts: Sequence[Description]) -> Description:
    """One description of a step that consists of several; ValueError for none."""
    if not parts:
        raise ValueError("There is nothing to describe: no parameter is trainable.")
    buckets = tuple(bucket for part in parts for bucket in part.buckets)
    notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
    if len(parts) > 1:
        notes += (f"rules or precision policies that differ between groups, launches for each: {len(parts)}",)
    norms = sum(part.norm_launches for part in parts), sum(part.norm_bytes for part in parts)
    return Description(parts[0].optimizer, buckets, *norms, notes)


def _choose(executor: Executor, device: torch.device, pairs: Pairs) -> tuple[Chosen, str]:
    """The executor on a device, and why."""
    counts = [v.numel() for v in {id(v): v for _, v in pairs if v.device == device}.values()]
    device = torch.get_default_device() if device.type == "meta" else device
    chosen = execute.choose(executor, device, sum(counts), len(counts))
    if executor != "auto":
        return chosen, "asked for"
    if chosen == "triton":
        return chosen, f"auto takes it on {device.type}"
    work = sum(counts) + execute.PER_TENSOR * len(counts)
    size = f"{sum(counts):,} elements + {execute.PER_TENSOR:,} per variable"
    if device.type == "cpu" and work < execute.WORTH_COMPILING:
        return chosen, f"{size} are less than {execute.WORTH_COMPILING:,}, from which C++ pays"
    if chosen == "compiled":
        return chosen, f"{size} reach {execute.WORTH_COMPILING:,}, from which C++ pays"
    return chosen, (execute.why_not_triton() if device.type != "cpu" else execute.why_not_compiled(device)) or "nothing faster is available"


def _occurrences(pairs: Pairs) -> Iterator[tuple[int, Tensor]]:
    """Each gradient, with how often its variable came before."""
    seen: Counter[int] = Counter()
    for gradient, variable in pairs:
        yield seen[id(variable)], gradient
        seen[id(variable)] += 1


def _count(pairs: Pairs) -> int:
    """Launches of a bucket: one per round and gradient dtype, and one per sparse gradient."""
    dense = {(number, g.dtype) for number, g in _occurrences(pairs) if g.layout == torch.strided}
    return len(dense) + sum(g.layout != torch.strided for g, _ in pairs)


def in_place(variable: Tensor) -> bool:
    """Whether a launch can work on the variable in its place."""
    return not variable.is_neg() and layout.same_layout(variable.shape, layout.dense_stride(variable), variable.stride())


def fits(gradient: Tensor, variable: Tensor) -> bool:
    """Whether a launch can read the gradient in its place."""
    return layout.same_layout(variable.shape, layout.dense_stride(variable), gradient.stride())


def _moved(gradient: Tensor, variable: Tensor, kept: Sequence[Plane]) -> int:
    """Bytes of one dense gradient's update; 0 for a sparse one."""
    if gradient.layout != torch.strided:
        return 0
    own = variable.dtype.itemsize
    copies = (0 if in_place(variable) else 4 * own) + (0 if fits(gradient, variable) else 2 * gradient.dtype.itemsize)
    return variable.numel() * (2 * own + gradient.dtype.itemsize + copies) + planes.moved(kept, variable.numel())


def _notes(pairs: Pairs, clips: Clips, buckets: Sequence[BucketDescription], members: Sequence[Pairs]) -> Iterator[str]:
    if len(buckets) > 1:
        yield f"devices, dtypes and precision policies, a bucket for each: {len(buckets)}"
    for device, executor in {bucket.device: bucket.executor for bucket in buckets}.items():
        if executor == "reference":
            yield f"{device}: torch operations, variable by variable; they allocate and move more than is counted here"
    dense = [(g, v) for g, v in pairs if g.layout == torch.strided]
    if len(pairs) > len(dense):
        yield f"sparse gradients, a launch for each on gathered rows, whose bytes are not counted: {len(pairs) - len(dense)}"
    if any(len({g.dtype for g, _ in mine if g.layout == torch.strided}) > 1 for mine in members):
        yield "gradients of several dtypes in one bucket: a launch for each dtype"
    again = sum(number > 0 for number, _ in _occurrences(pairs))
    if again:
        yield f"gradients whose variable had one before in this step, in launches of their own: {again}"
    strided, foreign = sum(not in_place(v) for _, v in dense), sum(not fits(g, v) for g, v in dense)
    if strided:
        yield f"variables with gaps between their elements, copied and written back: {strided}"
    if foreign:
        yield f"gradients laid out otherwise than their variables, copied: {foreign}"
    if clips.by_norm:
        yield "clipnorm and global_clipnorm read the gradients once more, before the step"
