"""Before ranks sum gradients they compare what they are about to do: one small message each, so that no wrong sum and no hang follows."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fused_kopt import collectives, layout
from fused_kopt.collectives import Group
from fused_kopt.errors import PeerError, RankMismatchError

# What a rank's message says it is: about to step; the same, and its variables' values are to be compared; unable to step.
STEP, COMPARE, FAILED = range(3)
Facts = Sequence[tuple[str, str]]
# The digest's unit of work, whose temporaries take 24 bytes an element.
CHUNK = 1 << 20


class Claim(NamedTuple):
    """What a rank is about to do."""

    plan: int
    """`hashed` of what `facts` begin with."""
    numbers: Facts
    """What may change from step to step: iterations, hyperparameters."""
    codes: Any
    """int8, for every pair: the dtype of its gradient, 0 where it is absent here."""
    facts: Callable[[], Facts]
    """What the ranks must have in common, in order, by names that messages show. Only asked for where they have not."""
    values: Callable[[], list[tuple[str, Tensor]]]
    """Tensors that must be equal on all ranks, with their names."""
    compare: bool
    """Whether this rank wants their values compared."""


class Agreement:
    """The ranks of a group, step by step: `agree` before anything is sent, in a block of `reported`."""

    def __init__(self, group: Group = None) -> None:
        self.group = group
        self._open = False  # whether the others wait for this rank's message

    @contextlib.contextmanager
    def reported(self) -> Iterator[None]:
        """A block in which `agree` is called once: an exception before it is told to the other ranks, which raise PeerError."""
        self._open = True
        try:
            yield
        except Exception as error:
            if self._open:
                with contextlib.suppress(Exception):  # this rank's own error is the one to see
                    self._exchange(FAILED, 0, 0, 0)
                    self._tell(error)
            raise
        finally:
            self._open = False

    def agree(self, claim: Claim) -> Any:
        """The codes of all ranks together: 0 for gradients that are absent everywhere.

        Raises RankMismatchError on every rank where the claims differ in anything but who has which gradients, PeerError where another
        rank failed before it could make its claim, or does not answer.
        """
        kind = COMPARE if claim.compare else STEP
        kinds, plans, numbers, codes = self._exchange(kind, claim.plan, hashed(claim.numbers), _hash(claim.codes.tobytes()))
        self._open = False
        if FAILED in kinds:
            self._tell(None)
        if len({*plans}) > 1 or len({*numbers}) > 1:
            _refuse(collectives.objects([*claim.facts(), *claim.numbers], self.group))
        found = claim.codes if len({*codes}) == 1 else self._united(claim)
        if COMPARE in kinds:
            self._compare(claim)
        return found

    def _exchange(self, *message: int) -> list[list[int]]:
        """Every rank's message, by its parts."""
        home = collectives.device(self.group)
        mine = torch.tensor(message, dtype=torch.int64, device=home)
        all_ = torch.empty(collectives.size(self.group) * len(message), dtype=torch.int64, device=home)
        collectives.gather(all_, mine, self.group)()
        return all_.view(-1, len(message)).t().tolist()

    def _tell(self, error: Exception | None) -> None:
        """Exchange errors. Raises PeerError with those of the others, on ranks that have none."""
        text = None if error is None else f"{type(error).__name__}: {error}"
        others = [(rank, told) for rank, told in enumerate(collectives.objects(text, self.group)) if told is not None]
        if error is None:
            told = "; ".join(f"rank {rank}: {told}" for rank, told in others)
            raise PeerError(f"Another rank could not take this step, so none takes it. {told}")

    def _united(self, claim: Claim) -> Any:
        """The codes of all ranks together, where they differ."""
        home = collectives.device(self.group)
        mine = torch.from_numpy(claim.codes).to(home)
        all_ = torch.empty(len(mine) * collectives.size(self.group), dtype=torch.int8, device=home)
        collectives.gather(all_, mine, self.group)()
        table = all_.view(-1, len(mine)).cpu().numpy()
        highest = table.max(axis=0)
        odd = ((table != 0) & (table != highest)).any(axis=0)
        if odd.any():
            pair = int(odd.argmax())
            _refuse([[(f"the dtype of gradient {pair}", str(DTYPES[code]))] if code else [] for code in table[:, pair]])
        return highest

    def _compare(self, claim: Claim) -> None:
        """Raises RankMismatchError where values that must be equal on all ranks are not."""
        named = claim.values()
        digests = [f"{int(digest(tensor)) & 0xFFFFFFFFFFFFFFFF:016x}" for _, tensor in named]
        facts = [(f"the values of {name} (digest)", value) for (name, _), value in zip(named, digests, strict=True)]
        if len({*self._exchange(hashed(facts))[0]}) > 1:
            mend = "They must start equal and stay so: broadcast them from one rank (torch.distributed.broadcast), or load one checkpoint."
            _refuse(collectives.objects(facts, self.group), mend)


def _refuse(facts: Sequence[Facts], mend: str = "Ranks must make the same calls, with the same variables in the same order.") -> None:
    """Raises RankMismatchError with the first difference. facts: every rank's; a rank without any has no say."""
    said = {rank: list(mine) for rank, mine in enumerate(facts) if mine}
    for position in range(max(map(len, said.values()))):
        here: dict[tuple[str, str], list[int]] = {}
        for rank, mine in said.items():
            here.setdefault(tuple(mine[position]) if position < len(mine) else ("nothing more", ""), []).append(rank)  # type: ignore[arg-type]
        if len(here) > 1:
            (name, _), *_ = here
            told = ", ".join(f"{value if name == n else f'{n} {value}'} on rank {_some(ranks)}" for (n, value), ranks in here.items())
            raise RankMismatchError(f"The ranks disagree on {name}: {told}. No rank has taken this step. {mend}")
    raise RankMismatchError(f"The ranks' plans have different hashes, but look alike: {facts[0]}. Do all run one version of fused_kopt?")


def _some(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")


# Codes of gradient dtypes, from 1.
DTYPES = (None, torch.float16, torch.bfloat16, torch.float32, torch.float64)
CODES = {dtype: code for code, dtype in enumerate(DTYPES)}


def hashed(facts: Facts) -> int:
    """64 bits of facts."""
    return _hash(repr(list(facts)).encode())


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


@torch.no_grad()
def digest(tensor: Tensor) -> Tensor:
    """64 bits of a tensor's bits as they lie in memory: int64, 0-d. Any change to a single element changes them."""
    flat = layout.memory_order(tensor.detach())
    patterns = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    weights = torch.arange(min(CHUNK, len(flat)), device=flat.device).mul_(-0x61C8864680B583EB).bitwise_or_(1)  # odd: no bit is lost
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for part in torch.split(patterns, CHUNK):
        total = total * 0x5851F42D4C957F2D + (part.long() * weights[: len(part)]).sum()
    return total


def described(variable: Tensor) -> str:
    """What ranks must have in common of a variable: shape, dtype, kind of device, and its order in memory unless it is row-major."""
    stride = layout.dense_stride(variable)
    order = "" if layout.same_layout(variable.shape, stride, layout.contiguous_stride(variable.shape)) else f", strides {stride}"
    return f"{tuple(variable.shape)} {str(variable.dtype).removeprefix('torch.')} on {variable.device.type}{order}"


def codes(gradients: Sequence[Tensor | None]) -> Any:
    """int8 codes of gradients."""
    return np.array([0 if gradient is None else CODES[gradient.dtype] for gradient in gradients], dtype=np.int8)
