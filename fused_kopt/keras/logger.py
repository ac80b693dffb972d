"""A Keras callback that writes what `last_stats` returns."""

import csv
import os
from pathlib import Path
from typing import Any, Literal

import keras

from fused_kopt.recording import StepStats


class StatsLogger(keras.callbacks.Callback):
    """Writes the optimizer's `last_stats()` to a CSV file, to TensorBoard, or to both.

        optimizer = fused_kopt.keras.Adam(1e-3)
        optimizer.stats_every = 50
        model.compile(optimizer, loss="mse")
        model.fit(x, y, callbacks=[StatsLogger(csv="stats.csv", every=50)])

    Args:
        csv: a file with one column per number of `StepStats`; overwritten by the first row of this callback. Default None.
        writer: a `torch.utils.tensorboard.SummaryWriter`, or anything with its `add_scalar`; it gets `optimizer/gradient_norm` and
            so on, over `iterations`. It stays the caller's to close. Default None.
        every: "epoch" (default), or so many batches. A step that was written already is not written again.

    No step waits for its numbers; writing them waits for the device to have taken the step that was measured.

    Raises ValueError where neither `csv` nor `writer` is given or `every` is something else. At the start of `fit` raises TypeError
    for an optimizer without `last_stats`, RuntimeError where its `stats_every` is 0.
    """

    def __init__(self, csv: str | os.PathLike[str] | None = None, writer: Any = None, every: Literal["epoch"] | int = "epoch") -> None:
        super().__init__()
        if csv is None and writer is None:
            raise ValueError("StatsLogger has nowhere to write: pass `csv`, `writer` or both.")
        if every != "epoch" and not (isinstance(every, int) and every > 0):
            raise ValueError(f"`every` must be 'epoch' or an int > 0. Received: every={every!r}.")
        self._file, self._writer, self._every = None if csv is None else Path(csv), writer, every
        self._batches, self._written, self._begun = 0, -1, False

    def on_train_begin(self, logs: Any = None) -> None:
        """Raises what is wrong before the first step."""
        self._stats()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Write, if it is time."""
        self._batches += 1
        if self._every != "epoch" and self._batches % self._every == 0:
            self._write(self._stats())

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Write, if every epoch is."""
        if self._every == "epoch":
            self._write(self._stats())

    def _stats(self) -> StepStats | None:
        optimizer = self.model.optimizer
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        if not hasattr(optimizer, "last_stats"):
            raise TypeError(
                f"StatsLogger needs an optimizer of fused_kopt.keras, or fuse(optimizer). Received: {type(optimizer).__name__}."
            )
        stats: StepStats | None = optimizer.last_stats()
        return stats

    def _write(self, stats: StepStats | None) -> None:
        if stats is None or stats["iterations"] == self._written:
            return
        self._written = stats["iterations"]
        if self._writer is not None:
            for name, value in stats.items():
                self._writer.add_scalar(f"optimizer/{name}", value, stats["iterations"])
        if self._file is not None:
            with self._file.open("a" if self._begun else "w", newline="") as file:
                table = csv.DictWriter(file, list(stats))
                if not self._begun:
                    table.writeheader()
                table.writerow(stats)
            self._begun = True
