"""The package's own exceptions. Everything else is the ValueError, TypeError or RuntimeError that Keras raises."""


class StaleVariableError(RuntimeError):
    """A variable no longer has the shape, dtype or device it had when its slots were made."""


class TornStepError(RuntimeError):
    """An earlier step was interrupted between two launches: some variables were updated, others not."""


class FusedMismatchError(RuntimeError):
    """An executor's result differs from the reference. Raised before anything is written."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit. Raised before anything is written into an optimizer, a variable or a file."""


class RankMismatchError(RuntimeError):
    """Ranks of a process group are about to take different steps. Raised on every rank, before anything is written."""


class PeerError(RuntimeError):
    """Another rank failed, is gone, or did not answer within the group's timeout."""
