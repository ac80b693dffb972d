"""A save's course: what ranks tell each other, what each writes, and the new version that all of it is."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed.checkpoint.planner import SavePlan

from fused_kopt import collectives
from fused_kopt.checkpoint import tables
from fused_kopt.collectives import Group
from fused_kopt.distributed.elastic import files, ranks, saving, versions
from fused_kopt.distributed.elastic.saving import Captured
from fused_kopt.errors import CheckpointError


class Told(NamedTuple):
    """What ranks tell each other before a save."""

    digest: str
    """Of what must be the same on all."""
    own: dict[str, dict[str, Any]]
    plan: SavePlan
    version: Path | None


def commit(folder: Path, captured: Callable[[], Captured], group: Group) -> None:
    """Write what every rank has captured as a new version, and point to it."""
    rank = collectives.rank(group)
    shares: list[Captured] = []

    def prepare() -> Told:
        shares.append(captured())
        mine = shares[0]
        plan = files.planned(mine.chunks)
        return Told(_digest(mine.common), mine.own, plan, versions.begun(folder) if rank == 0 else None)

    told = ranks.gathered(prepare, group)
    version, mine = told[0].version, shares[0]
    assert version is not None
    if len({each.digest for each in told}) > 1:
        _refuse(ranks.gathered(lambda: mine.common, group))
    state = saving.merged(mine.common, [each.own for each in told])
    plans, metadata = files.joined([each.plan for each in told])
    written = ranks.gathered(lambda: files.write(version, mine.chunks, plans, rank), group)

    def publish() -> None:
        files.finish(version, metadata, written, state)
        versions.publish(version)

    ranks.on_first(publish, group)


def _digest(common: dict[str, Any]) -> str:
    """Of what must be the same on every rank."""
    try:
        text = json.dumps(common)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"The configuration of this {common['class_name']} cannot be written as JSON: {error}") from error
    return hashlib.sha256(text.encode()).hexdigest()


def _refuse(commons: list[dict[str, Any]]) -> None:
    """Raises CheckpointError for the first rank that differs from rank 0."""
    first = _lines(commons[0])
    for rank, common in enumerate(commons):
        tables.refuse_unless(tables.rows(_lines(common), first), f"Rank {rank} (found) has something else to save than rank 0 (expected):")


def _lines(common: dict[str, Any]) -> dict[str, str]:
    """What must be the same on every rank, entry by entry."""
    found: dict[str, Any] = {}
    for kind, told in common.items():
        found |= {f"{kind}: {name}": value for name, value in told.items()} if isinstance(told, dict) else {kind: told}
    return {name: str(value) for name, value in found.items()}
