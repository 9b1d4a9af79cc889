"""Exit codes of training and evaluation."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of colm_ds; 1 is any unexpected error."""

    DONE = 0
    FAILED = 1
    BAD_INPUT = 2
    """One message says what to change."""
    STOPPED = 3
    """Asked to stop, after a checkpoint."""
    PHASE_TIMEOUT = 4
    """A phase lasted longer than `colm.phase_timeout_s`."""
    DIVERGED = 5
    """Gradients or signals stopped being finite; after a checkpoint."""
    OUT_OF_MEMORY = 6
    EVALUATION_FAILED = 7
    """All steps are done and the trained weights written; measuring them failed."""
