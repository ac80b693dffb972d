"""Checkpoints of many ranks: saved by any number of them, resumed by any other, in the background if need be.

A folder has versions, each complete or none, and a pointer to the newest, which is replaced as one.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import ClassVar

from fused_kopt import collectives
from fused_kopt.checkpoint.neutral import Variables, named
from fused_kopt.checkpoint.storage import FilePath
from fused_kopt.collectives import Group
from fused_kopt.distributed.elastic import loading, ranks, saving, schema, versions
from fused_kopt.distributed.elastic.loading import Blank
from fused_kopt.distributed.elastic.saving import Captured
from fused_kopt.optimizer import Optimizer

logger = logging.getLogger("fused_kopt")


def save(folder: FilePath, optimizer: Optimizer, variables: Variables, group: Group = None, with_values: bool = False) -> None:
    """Write a checkpoint of an optimizer that all ranks have, or have parts of. Every rank of the group calls it.

    Each rank writes its pieces; of what all have, an equal part. The checkpoint does not depend on how many ranks there were. It is a new
    folder `version-...` in `folder`; once all of it is on the disk, the file `latest` names it. Whoever is killed before has left the
    version before. The newest two are kept.

    Args:
        folder: of this run alone, on a file system that all ranks share.
        optimizer: any fused_kopt optimizer, sharded or not, perhaps in a LossScaleOptimizer.
        variables: (name, tensor) pairs, such as `model.named_parameters()`; all that the optimizer has slots for, on every rank.
        group: the ranks that share the optimizer. Default: all; without torch.distributed this process alone.
        with_values: also write the variables' values.

    Raises TornStepError after an interrupted step, ValueError where a slot's variable has no name, CheckpointError where ranks differ or
    settings are not JSON, PeerError where another rank failed, OSError; on all ranks. `latest` is as it was then.
    """
    from fused_kopt.distributed.elastic import commit

    _join_last()
    commit.commit(Path(folder), lambda: saving.capture(optimizer, named(variables), group, with_values), group)


def async_save(
    folder: FilePath, optimizer: Optimizer, variables: Variables, group: Group = None, with_values: bool = False, beside: Group = None
) -> "Saving":
    """`save` in the background: the state is copied to the CPU's memory, then training may go on.

    One save is under way at a time: the next one waits for it, and so does `load`. What `save` raises comes out of the result's `wait`;
    wait for the last one before the process group is destroyed.

    Args:
        folder, optimizer, variables, group, with_values: as for `save`.
        beside: a gloo group of the same ranks that nothing else uses, so that messages of this never meet those of a step. Required with
            a `group`; of all ranks it is made by the first call.

    Raises ValueError for a `group` without `beside`.
    """
    from fused_kopt.distributed.elastic import commit

    _join_last()
    messages = ranks.beside(group, beside)
    captured: Future[Captured] = Future()
    try:
        captured.set_result(saving.capture(optimizer, named(variables), group, with_values))
    except Exception as error:  # for all ranks, which are about to meet
        captured.set_exception(error)
    return Saving(lambda: commit.commit(Path(folder), captured.result, messages))


class Saving:
    """A save under way."""

    _last: "ClassVar[Saving | None]" = None

    def __init__(self, work: Callable[[], None]) -> None:
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name="fused_kopt-save")
        Saving._last = self
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # for `wait`
            self._error = error
            logger.error("A checkpoint was not saved: %s", error)

    def wait(self) -> None:
        """Until the checkpoint is on the disk. Raises what kept it from getting there."""
        self._thread.join()
        if self._error is not None:
            raise self._error


def _join_last() -> None:
    """Wait until no save of this process is under way. Its errors are for who waits for it."""
    if Saving._last is not None:
        Saving._last._thread.join()


def load(
    folder: FilePath, optimizer: Optimizer, variables: Variables, group: Group = None, settings: bool = True, with_values: bool = False
) -> None:
    """Read an optimizer's state from the newest checkpoint of `save`. Every rank of the group calls it; there may be more or fewer now.

    Args:
        folder: as for `save`; or one `version-...` folder in it.
        optimizer: of the class that was saved, sharded or not; its slots are created if it has none yet.
        variables: (name, tensor) pairs with exactly the names, shapes, dtypes and strides that were saved.
        group: as for `save`.
        settings: restore hyperparameters too, as for `fused_kopt.checkpoint.load`.
        with_values: also write the variables' values.

    All files' checksums are compared first. torch.distributed.checkpoint's `.metadata` is unpickled: load only what you trust.

    Raises CheckpointError, with a table of what differs, where there is no checkpoint, a file is damaged or something does not fit, here
    or on another rank; PeerError for anything else there; OSError. Nothing has been written then on any rank.
    """
    from fused_kopt.distributed.elastic import files

    _join_last()
    rank, known = collectives.rank(group), ranks.on_all(lambda: named(variables), group)
    version, found = ranks.on_first(lambda: versions.newest(Path(folder)), group)

    def check() -> None:
        loading.check(found.state, optimizer, known, settings, with_values)
        schema.verify(version, dict(list(found.files.items())[rank :: collectives.size(group)]))

    def read() -> Blank:
        blank = loading.blank(found.state, optimizer, known)
        blank.chunks.update(loading.values(known) if with_values else {})
        files.read(version, blank.chunks)
        return blank

    ranks.on_all(check, group)
    ranks.on_all(lambda: loading.build(found.state, optimizer, known), group)
    blank = ranks.on_all(read, group)
    ranks.on_all(lambda: loading.write(found.state, blank, optimizer, known, settings), group)
