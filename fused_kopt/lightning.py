"""What a Lightning run writes about its optimizers. Importing this module imports lightning."""

from typing import Any

import lightning


class StatsLogger(lightning.Callback):
    """Hands `last_stats()` of the optimizers to the trainer's loggers (CSVLogger, TensorBoardLogger, any other).

        def configure_optimizers(self):
            return fused_kopt.torch_optim.Adam(self.parameters(), lr=1e-3, stats_every=50)

        Trainer(callbacks=[StatsLogger()], logger=CSVLogger("runs"), log_every_n_steps=50)

    The names are `optimizer/gradient_norm` and so on; with several optimizers `optimizer0/...`, `optimizer1/...`. Optimizers
    without `last_stats` are left out.

    every: so many steps of the trainer (`global_step`). Default None: the trainer's `log_every_n_steps`.

    No step waits for its numbers; handing them over waits for the device to have taken the step that was measured.

    Raises ValueError unless `every` is None or > 0. At the start of `fit` raises TypeError where no optimizer has `last_stats`,
    RuntimeError where `stats_every` is 0.
    """

    def __init__(self, every: int | None = None) -> None:
        if every is not None and not (isinstance(every, int) and every > 0):
            raise ValueError(f"`every` must be None or an int > 0. Received: every={every!r}.")
        self._every = every
        self._seen = -1

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Raises what is wrong before the first step."""
        found = _measured(trainer)
        if not found:
            kinds = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
            raise TypeError(f"StatsLogger needs an optimizer of fused_kopt.torch_optim. Received: {kinds}.")
        for optimizer in found.values():
            optimizer.last_stats()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write, if it is time."""
        step = trainer.global_step
        every = self._every or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step == self._seen or not every or step % every:
            return
        self._seen = step
        for prefix, optimizer in _measured(trainer).items():
            stats = optimizer.last_stats()
            if stats is not None:
                for logger in trainer.loggers:
                    logger.log_metrics({f"{prefix}/{name}": value for name, value in stats.items()}, step)


def _measured(trainer: lightning.Trainer) -> dict[str, Any]:
    """The optimizers that have `last_stats`, by what their numbers are called."""
    several = len(trainer.optimizers) > 1
    named = {f"optimizer{i if several else ''}": optimizer for i, optimizer in enumerate(trainer.optimizers)}
    return {name: optimizer for name, optimizer in named.items() if hasattr(optimizer, "last_stats")}
